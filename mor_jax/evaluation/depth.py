"""Depths and router scores of the tokens of a text, and mean depths by kind of word."""

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mor_jax.config import Config
from mor_jax.data.token_texts import token_texts
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.model import router
from mor_jax.model.transformer import Transformer
from mor_jax.training import targets as targets_lib

# Closed-class words of English: articles, pronouns, prepositions, conjunctions, auxiliaries, particles.
_CLOSED_CLASS = """
  a about above after against all although am among an and another any are as at be because been before being
  below between both but by can could did do does doing down during each either every few for from had has have
  having he her hers herself him himself his how i if in into is it its itself just may me might more most must
  my myself neither no nor not of off on once one only or other ought our ours ourselves out over own same shall
  she should since so some such than that the their theirs them themselves then there these they this those
  though through to too under until up upon us very was we were what when where whether which while who whom
  whose why will with within without would yet you your yours yourself yourselves
"""
FUNCTION_WORDS = frozenset(_CLOSED_CLASS.split())
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?|\d+|[^\w\s]|_")


@dataclasses.dataclass(frozen=True)
class RoutedRow:
  """A row of T tokens and its routing.

  Attributes:
    tokens_T, segments_T: token ids, and segment ids of the documents (0: padding).
    depth_T: number of recursions of each token, 0 to R.
    scores_RT: gates in the units of the router's activation, for each recursion step; nan for
      tokens that did not reach the step.
    place: 'segment_ids' and 'positions' (T,) as the model sees them.
  """

  tokens_T: np.ndarray
  segments_T: np.ndarray
  depth_T: np.ndarray
  scores_RT: np.ndarray
  place: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Word:
  """A word of a text, the mean depth of its tokens, and its kind."""

  text: str
  depth: float
  kind: str  # 'function word', 'content word', 'number' or 'punctuation'


def route_rows(
  config: Config,
  variables: Any,
  batches: Iterable[dict[str, np.ndarray]],
  routing: str = 'threshold',
) -> list[RoutedRow]:
  """Runs a Mixture-of-Recursions model over batches (B, T) of a dataset. Skips padding rows.

  Raises:
    ValueError: the model has no router.
  """
  if config.model.kind != 'mor':
    raise ValueError(f'a {config.model.kind} model has no router, so its tokens have no depth of their own')
  model = Transformer(config.model)

  @jax.jit
  def route(variables, batch):
    batch = targets_lib.visible_batch(batch, config.data.segment_mask)
    place = {name: batch[name] for name in ('segment_ids', 'positions')}
    routed = model.apply(
      variables,
      batch['tokens'],
      routing=routing,
      **place,
      with_logits=False,
      rngs={'routing': router.evaluation_key(batch['tokens'])},
    ).routing
    return routed.depth_BT, _scores(config, routed), place

  rows = []
  for batch in batches:
    depth_BT, scores_RBT, place = jax.device_get(route(variables, dict(batch)))
    for index in np.flatnonzero(batch['segment_ids'].any(axis=1)):
      routed = depth_BT[index], scores_RBT[:, index], {name: rows[index] for name, rows in place.items()}
      rows.append(RoutedRow(batch['tokens'][index], batch['segment_ids'][index], *routed))
  return rows


def _scores(config: Config, routed: router.RoutingOutput) -> jax.Array:
  """Activated logits (R, B, T), what a random router drew; nan where a token did not reach the step."""
  logits = jax.numpy.moveaxis(routed.logits_RBT, 0, -1)
  random = config.model.random_router
  gates = jax.nn.sigmoid(logits) if random else router.activate(config.model, logits)
  gates = jax.numpy.moveaxis(gates, -1, 0)
  return jax.numpy.where(routed.entered_RBT, gates, jax.numpy.nan)


def depth_by_position(rows: Sequence[RoutedRow], bins: int = 32) -> tuple[np.ndarray, np.ndarray]:
  """(midpoint of each bin of positions in the row, mean depth in the bin)."""
  depth_NT = np.stack([row.depth_T for row in rows]).astype(np.float64)
  real_NT = np.stack([row.segments_T for row in rows]) > 0
  edges = np.unique(np.linspace(0, depth_NT.shape[1], min(bins, depth_NT.shape[1]) + 1).astype(int))
  sums = np.add.reduceat(np.where(real_NT, depth_NT, 0).sum(0), edges[:-1])
  counts = np.add.reduceat(real_NT.sum(0), edges[:-1])
  return (edges[:-1] + edges[1:] - 1) / 2, sums / np.maximum(counts, 1)


def words(tokenizer: Tokenizer, row: RoutedRow) -> list[Word]:
  """The words of a row's documents. A word's depth is the mean over all tokens that overlap it."""
  found = []
  for segment in range(1, int(row.segments_T.max()) + 1):
    inside_T = row.segments_T == segment
    pieces = token_texts(tokenizer, row.tokens_T[inside_T])
    depth_by_character = np.repeat(row.depth_T[inside_T], [len(piece) for piece in pieces])
    for match in _WORD.finditer(''.join(pieces)):
      depth = float(depth_by_character[match.start() : match.end()].mean())
      found.append(Word(match.group(), depth, _kind(match.group())))
  return found


def _kind(word: str) -> str:
  if word.lower() in FUNCTION_WORDS:
    return 'function word'
  if word[0].isalpha():
    return 'content word'
  return 'number' if word[0].isdigit() else 'punctuation'


class Mean(NamedTuple):
  """A mean over `count` words, and its standard error, as if they were independent; not a number for one word."""

  mean: float
  count: int
  error: float


def mean_by_kind(found: Iterable[Word]) -> dict[str, Mean]:
  """Mean depth by kind of word."""
  return _means((word.kind, word.depth) for word in found)


def mean_by_word(found: Iterable[Word], least: int = 5) -> dict[str, Mean]:
  """Mean depth of every word that occurs at least `least` times, in order of depth."""
  means = _means((word.text, word.depth) for word in found)
  kept = {word: mean for word, mean in means.items() if mean.count >= least}
  return dict(sorted(kept.items(), key=lambda item: item[1].mean))


def _means(pairs: Iterable[tuple[str, float]]) -> dict[str, Mean]:
  collected = collections.defaultdict(list)
  for name, value in pairs:
    collected[name].append(value)
  return {name: _mean(values) for name, values in collected.items()}


def _mean(values: list[float]) -> Mean:
  count = len(values)
  error = float(np.std(values, ddof=1) / np.sqrt(count)) if count > 1 else float('nan')
  return Mean(float(np.mean(values)), count, error)
