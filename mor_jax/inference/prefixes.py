"""Beginnings of prompts that a slot still holds: they are copied, not computed again.

Routing is causal and places are counted in order of position, so whatever follows, the first k tokens of a sequence
have the same keys, values and places. A slot keeps them until another sequence takes it.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from mor_jax.inference.engine import Engine
from mor_jax.inference.requests import Request

LEAST = 8  # tokens that are worth a copy


class Reused(NamedTuple):
  """The first `length` tokens of what a slot holds."""

  slot: int
  length: int


@dataclasses.dataclass(frozen=True)
class Held:
  """What a slot holds.

  Attributes:
    tokens_T: those that were computed in full.
    rules: what else decides on keys, values and places.
    is_scored: whether the log-probabilities of its prompt are known.
  """

  tokens_T: np.ndarray
  rules: tuple[Any, ...]
  is_scored: bool


class Prefixes:
  """What the slots of an engine hold."""

  def __init__(self, engine: Engine):
    self._engine = engine
    self._held: dict[int, Held] = {}
    self._used: dict[int, int] = {}
    self._clock = 0

  def last_use(self, slot: int) -> int:
    """When a slot was used last, as a rising number; 0: never. The one that was used longest ago is taken first."""
    return self._used.get(slot, 0)

  def _use(self, slot: int) -> None:
    self._clock += 1
    self._used[slot] = self._clock

  def keep(self, slot: int, request: Request, tokens_T: np.ndarray) -> None:
    """A slot holds these tokens of a request."""
    if self._engine.batch_invariant:  # what an answer adds was computed by ticks
      tokens_T = tokens_T[: len(request.prompt) - 1]
    self._held[slot] = Held(tokens_T, _rules(request), request.prompt_logprobs)
    self._use(slot)

  def clear(self) -> None:
    """Nothing is held any more."""
    self._held.clear()

  def find(self, request: Request, part: int) -> Reused | None:
    """The longest beginning of a prompt that a slot of this part of the mesh holds.

    The last token of a prompt is always left, and of a prompt to be scored the last of the common ones too, since what
    was said after it was said of another token.
    """
    prompt_T, found = np.array(request.prompt[:-1]), None
    for slot, held in self._held.items():
      if held.rules != _rules(request) or self._engine.part_of(slot) != part:
        continue
      if request.prompt_logprobs != held.is_scored and (
        request.prompt_logprobs or self._engine.batch_invariant
      ):
        continue
      size = min(len(prompt_T), len(held.tokens_T))
      differs = np.flatnonzero(prompt_T[:size] != held.tokens_T[:size])
      length = int(differs[0]) if len(differs) else size
      length -= request.prompt_logprobs
      if self._engine.batch_invariant:  # whole chunks, which are computed as they would be anew
        length -= length % self._engine.chunks[0]
      if length >= max(LEAST, found.length + 1 if found else 0):
        found = Reused(slot, length)
    if found is not None:
      self._use(found.slot)
    return found


def _rules(request: Request) -> tuple[Any, ...]:
  return request.max_recursions, request.threshold_shift
