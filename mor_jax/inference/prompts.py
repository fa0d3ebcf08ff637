"""Prompts on their way into slots: computed in batches of lanes, and chunk by chunk, so that others need not wait."""

import collections
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from mor_jax.inference.engine import Engine
from mor_jax.inference.prefill import Filling, Prefix
from mor_jax.inference.prefixes import Prefixes
from mor_jax.inference.requests import Result
from mor_jax.inference.state import DecodeState

Entry = tuple[int, Result]
"""A slot, and the request that will have it."""


class Computed(NamedTuple):
  """A request whose prompt is computed, in a lane of the prefix."""

  prefix: Prefix
  lane: int
  slot: int
  result: Result


class Prompts:
  """Prompts that wait to be computed, and the batch of them that is being computed.

  Attributes:
    overflow: tokens of the batches that are done which found no place, by recursion step.
    tokens, reused: of all prompts so far, and those of them that were copied.
  """

  def __init__(self, engine: Engine):
    self._engine = engine
    # Of every batch, by lane, the slots that get what the lane computes.
    self._batches: collections.deque[list[list[Entry]]] = collections.deque()
    self._filling: Filling | None = None
    self.overflow: np.ndarray | int = 0
    self.tokens = self.reused = 0

  @property
  def entries(self) -> list[Entry]:
    """All that are on their way, in order."""
    return [entry for lanes in self._batches for entries in lanes for entry in entries]

  def add(self, admitted: list[Entry]) -> None:
    """Requests whose prompts have more than one token, and the slots that they will have."""
    self._batches.extend(_lanes(admitted, self._engine))

  def advance(
    self, most: int | None, state: Callable[[], DecodeState], prefixes: Prefixes
  ) -> Iterator[Computed]:
    """Computes up to so many tokens of the longest prompts (None: all), and gives those that are complete.

    Args:
      state, prefixes: the slots as they are, and what they hold.
    """
    left = most
    while self._batches and (left is None or left > 0):
      lanes = self._batches[0]
      if self._filling is None:
        self._filling = self._begin(lanes, state(), prefixes)
      before = max(map(len, self._filling.left))
      remaining = self._engine.fill(self._filling, left)
      left = None if left is None else left - (before - remaining)
      if remaining:
        continue
      prefix, self._filling = self._filling.prefix, None
      self._batches.popleft()
      self.overflow = self.overflow + np.asarray(prefix.overflow_GP).sum(axis=0)
      for lane, entries in enumerate(lanes):
        for slot, result in entries:
          yield Computed(prefix, lane, slot, result)

  def _begin(self, lanes: list[list[Entry]], state: DecodeState, prefixes: Prefixes) -> Filling:
    requests = [entries[0][1].request if entries else None for entries in lanes]
    each = len(lanes) // self._engine.parts
    reused = [request and prefixes.find(request, lane // each) for lane, request in enumerate(requests)]
    self.tokens += sum(len(request.prompt) for request in requests if request)
    self.reused += sum(found.length for found in reused if found)
    return self._engine.begin(requests, state, reused)

  def cancel(self, result: Result) -> None:
    """Gives up the slot of a request; a lane that nobody wants any more is computed to its end, for nothing."""
    for lanes in self._batches:
      for lane, entries in enumerate(lanes):
        lanes[lane] = [entry for entry in entries if entry[1] is not result]
    while self._batches and not any(self._batches[-1]):  # but for a batch of such lanes
      if len(self._batches) == 1:
        self._filling = None
      self._batches.pop()

  def clear(self) -> list[Result]:
    """Forgets all, and gives the requests back, in order."""
    results = [result for _, result in self.entries]
    self._batches.clear()
    self._filling = None
    return results


def _lanes(admitted: list[Entry], engine: Engine) -> Iterator[list[list[Entry]]]:
  """Groups prompts into prefill batches: for each lane the slots, of its part of the mesh, that get what it computes.

  Every part has as many lanes (`Engine.lanes_for`). Requests whose prompts are computed alike, such as samples of
  one prompt, share a lane. Where nothing may depend on who is there, those to be scored, which take another program, are
  not computed beside others.
  """
  if engine.batch_invariant:
    for is_scored in (False, True):
      yield from _grouped(
        [entry for entry in admitted if entry[1].request.prompt_logprobs == is_scored], engine
      )
  else:
    yield from _grouped(admitted, engine)


def _grouped(admitted: list[Entry], engine: Engine) -> Iterator[list[list[Entry]]]:
  each = engine.prefill_lanes // engine.parts
  waiting: dict[int, dict[Any, list[Entry]]] = collections.defaultdict(dict)
  for slot, result in admitted:
    request = result.request
    alike = request.prompt, request.max_recursions, request.threshold_shift, request.prompt_logprobs
    waiting[engine.part_of(slot)].setdefault(alike, []).append((slot, result))
  for start in range(0, max(map(len, waiting.values()), default=0), each):
    parts = [list(waiting[part].values())[start : start + each] for part in range(engine.parts)]
    is_scored = any(entry[1].request.prompt_logprobs for some in parts for lane in some for entry in lane)
    width = engine.lanes_for(max(map(len, parts)), is_scored)
    yield [lane for some in parts for lane in [*some, *[[]] * (width - len(some))]]
