"""What a model would have said of every token after each recursion, and what its routers thought of going on."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mor_jax.data.tokenizer import Tokenizer
from mor_jax.model.recursion import Given
from mor_jax.model.transformer import Transformer

BEST = 5  # tokens told after each recursion


class Recursions:
  """Looks at texts once more, with the depths that their tokens took.

  What a recursion says is the readout of the stream after it by last layer and head, if all tokens had left there
  (`prefix(k)` of docs/evaluation.md). Texts are filled up to `max_len`, so that one program serves all.
  """

  def __init__(self, model: Transformer, variables: dict[str, Any], tokenizer: Tokenizer, max_len: int):
    self._model, self._variables, self._tokenizer, self._max_len = model, variables, tokenizer, max_len
    self._look = jax.jit(functools.partial(model.apply, method=_look))

  @staticmethod
  def can_look(model: Transformer) -> bool:
    """Whether the model has recursions that it could stop after, and routers whose thoughts are numbers."""
    return model.config.can_stop_early and not (model.config.kind == 'mor' and model.config.random_router)

  def look(
    self,
    tokens: Sequence[int],
    depths: Sequence[int],
    shift: float = 0.0,
    start: int = 0,
    place: Mapping[str, np.ndarray] | None = None,
  ) -> list[dict[str, Any]]:
    """Of each token that was processed 'depth'; 'best', by recursion, [token, probability] of the likeliest next tokens;
    and of expert-choice models 'logits' and 'thresholds', by recursion.

    Args:
      depths: recursions of the tokens; of the last ones, which were not processed, none.
      shift: what the request added to the thresholds.
      start: the first token that is told of.
      place: 'segment_ids' and 'positions' (max_len,) of a row; None: it is a single text.
    """
    tokens_1T, depths_1T = np.zeros((2, 1, self._max_len), np.int32)
    count = min(len(depths), len(tokens))
    if start >= count:
      return []
    tokens_1T[0, : len(tokens)], depths_1T[0, :count] = tokens, depths[:count]
    if place is None:
      place = {
        'segment_ids': np.ones(self._max_len, np.int32),
        'positions': np.arange(self._max_len, dtype=np.int32),
      }
    place_1T = {name: values[None] for name, values in place.items()}
    best, said, logits = jax.device_get(self._look(self._variables, tokens_1T, depths_1T, place_1T))
    threshold_R = np.zeros(len(best))
    if (stored := self._variables.get('routing', {}).get('threshold')) is not None:
      threshold_R = np.asarray(stored)
    spelled = functools.cache(self._tokenizer.spelled)
    made = []
    for index in range(start, count):
      entry: dict[str, Any] = {'depth': int(depths_1T[0, index])}
      entry['best'] = [
        [[spelled(int(token)), round(float(p), 4)] for token, p in zip(ids, values, strict=True)]
        for ids, values in zip(best[:, index], said[:, index], strict=True)
      ]
      if logits is not None:
        entry['logits'] = [round(float(value), 4) for value in logits[:, index]]
        entry['thresholds'] = [round(float(value) + shift, 4) for value in threshold_R[: len(logits)]]
      made.append(entry)
    return made


def _look(
  model: Transformer, tokens_1T: jax.Array, depths_1T: jax.Array, place: Mapping[str, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """Ids (R, T, k) and probabilities of the likeliest next tokens after each recursion, and logits (R, T) of routers."""
  states_E1TD, _ = model.trajectory(tokens_1T, given=Given(depths_BT=depths_1T), **place)
  hidden_R1TD, _ = model.read(states_E1TD[1:], **place)

  def best(x_1TD):
    probability_TV = jax.nn.softmax(model.logits(x_1TD)[0])
    return jax.lax.top_k(probability_TV, min(BEST, probability_TV.shape[-1]))

  said_RTK, best_RTK = jax.lax.map(best, hidden_R1TD)
  logits_RT = None
  if model.config.kind == 'mor' and model.config.router == 'expert_choice':
    logits_RT = model.router_logits(states_E1TD[:-1])[:, 0]
  return best_RTK, said_RTK, logits_RT
