"""Log-likelihoods of continuations: many (context, continuation) pairs of tokens with few compiled programs.

Texts of similar length are batched, repeated texts are computed once, and logits are computed only where
requested. Threshold routing is causal, and the number of its slots depends on `max_len` instead of the row's
length, so a score depends on its own text only.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.config import ConfigError
from mor_jax.model.transformer import Transformer
from mor_jax.parallel import mesh as mesh_lib
from mor_jax.parallel import rules
from mor_jax.training.vocabulary_loss import token_nll

Pair = tuple[Sequence[int], Sequence[int]]  # tokens of context and continuation
Score = tuple[
  float, bool
]  # log-likelihood in nats, whether every token of the continuation was the likeliest

LEAST_STEP = 16  # lengths of rows are multiples of this or, of long ones, of an eighth of a power of two
TOKENS_AT_ONCE = (64, 512)  # sizes of the groups of tokens whose logits are computed together


@dataclasses.dataclass
class _Row:
  """A text and the tokens to score in it."""

  tokens: tuple[int, ...]
  asked: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)  # pair, position, target


class Scorer:
  """A model that scores pairs.

  Attributes:
    max_len: maximum length of a text in tokens; longer ones are truncated at the start.
    routing: 'threshold', or 'topk', which uses the whole text. With 'topk', rows have no padding, because
      padding would change the number of selected tokens, so every length needs a program.
  """

  def __init__(
    self,
    model: Transformer,
    variables: dict[str, Any],
    max_len: int,
    batch_size: int = 8,
    routing: str = 'threshold',
  ):
    """Prepares the scorer. Programs are compiled on first use.

    Args:
      batch_size: texts per batch, a multiple of the number of devices.
    """
    self.max_len, self.routing, self._batch_size = max_len, routing, batch_size
    self._variables, self._mesh = variables, mesh_lib.make_mesh()

    def hidden(variables, batch):
      segment_ids = batch['segment_ids']
      routed = {'routing': routing, 'max_len': max_len, 'segment_ids': segment_ids}
      return model.apply(variables, batch['tokens'], **routed, with_logits=False).hidden

    def judge(variables, x_BTD, places_N, targets_N):
      """Log-likelihood of each target, and whether it is the most likely token, after some places in the rows."""
      x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])[places_N]
      logits_NV = model.apply(variables, x_ND, method=Transformer.logits)
      return -token_nll(logits_NV, targets_N), logits_NV.argmax(axis=-1) == targets_N

    self._hidden = jax.jit(rules.on_mesh(self._mesh, hidden))
    self._judge = jax.jit(rules.on_mesh(self._mesh, judge), out_shardings=mesh_lib.replicated(self._mesh))

  def score(self, pairs: Sequence[Pair], done: Callable[[int], None] = lambda count: None) -> list[Score]:
    """Returns the scores in the order of the pairs. An empty continuation has (0, True).

    Args:
      done: called after every batch with the number of completed pairs.

    Raises:
      ConfigError: a continuation is longer than `max_len`, or the context is empty.
    """
    totals = np.zeros(len(pairs))
    greedy = np.ones(len(pairs), bool)
    rows = self._rows(pairs)
    done(len(pairs) - len({pair for row in rows for pair, _, _ in row.asked}))
    queued = None
    for batch in self._batches(rows):
      begun = self._begin(batch)
      if queued is not None:
        _collect(queued, totals, greedy, done)  # while the next batch is being computed
      queued = begun
    if queued is not None:
      _collect(queued, totals, greedy, done)
    return list(zip(totals.tolist(), greedy.tolist(), strict=True))

  def _rows(self, pairs: Sequence[Pair]) -> list[_Row]:
    """The distinct texts without their last token, longest first."""
    rows: dict[tuple[int, ...], _Row] = {}
    for index, (context, continuation) in enumerate(pairs):
      if not continuation:
        continue
      if not context or len(continuation) > self.max_len:
        raise ConfigError(
          f'a continuation of {len(continuation)} tokens after {len(context)} cannot be scored within '
          f'--max_len={self.max_len}; raise it' + ('' if context else ', and give a context')
        )
      tokens = (*context, *continuation)[-(self.max_len + 1) :]
      row = rows.setdefault(tokens[:-1], _Row(tokens[:-1]))
      first = len(tokens) - 1 - len(continuation)
      row.asked += [(index, first + place, target) for place, target in enumerate(continuation)]
    return sorted(rows.values(), key=lambda row: (-len(row.tokens), row.tokens))

  def _batches(self, rows: list[_Row]) -> Iterator[list[_Row]]:
    start = 0
    while start < len(rows):
      end = start + self._batch_size
      if self.routing == 'topk':
        length = len(rows[start].tokens)
        end = next((i for i in range(start, min(end, len(rows))) if len(rows[i].tokens) != length), end)
      yield rows[start:end]
      start = min(end, len(rows))

  def _begin(self, batch: list[_Row]) -> tuple[int, list[tuple[np.ndarray, Any]]]:
    """Queues a batch. Returns the number of pairs it completes, and (pairs, results) of every group."""
    longest = len(batch[0].tokens)
    length = longest if self.routing == 'topk' else min(row_length(longest), self.max_len)
    tokens_BT = np.zeros((self._batch_size, length), np.int32)
    segments_BT = np.zeros((self._batch_size, length), np.int32)
    for index, row in enumerate(batch):
      tokens_BT[index, : len(row.tokens)] = row.tokens
      segments_BT[index, : len(row.tokens)] = 1
    batch_BT = {'tokens': tokens_BT, 'segment_ids': segments_BT}
    x_BTD = self._hidden(self._variables, mesh_lib.put(batch_BT, mesh_lib.batch_sharding(self._mesh)))
    asked = np.array(
      [
        (pair, index * length + place, target)
        for index, row in enumerate(batch)
        for pair, place, target in row.asked
      ]
    )
    judged = [(part[:, 0], self._group(x_BTD, part)) for part in _groups(asked)]
    return len(np.unique(asked[:, 0])), judged

  def _group(self, x_BTD: jax.Array, asked: np.ndarray) -> tuple[jax.Array, jax.Array]:
    size = next((size for size in TOKENS_AT_ONCE if size >= len(asked)), TOKENS_AT_ONCE[-1])
    filled = np.zeros((size, 3), np.int32)
    filled[: len(asked)] = asked
    return self._judge(self._variables, x_BTD, jnp.asarray(filled[:, 1]), jnp.asarray(filled[:, 2]))


def _groups(asked: np.ndarray) -> Iterator[np.ndarray]:
  largest = TOKENS_AT_ONCE[-1]
  for start in range(0, len(asked), largest):
    yield asked[start : start + largest]


def _collect(queued, totals: np.ndarray, greedy: np.ndarray, done: Callable[[int], None]) -> None:
  finished, groups = queued
  for pairs_N, results in groups:
    log_likelihood_N, likeliest_N = (np.asarray(result)[: len(pairs_N)] for result in jax.device_get(results))
    np.add.at(totals, pairs_N, log_likelihood_N.astype(np.float64))
    np.logical_and.at(greedy, pairs_N, likeliest_N)
  done(finished)


def row_length(length: int) -> int:
  """Row length for a text: at most an eighth longer, so that few programs are needed."""
  step = max(LEAST_STEP, 2 ** (max(length - 1, 1).bit_length() - 4))
  return -(-length // step) * step
