"""Sizes of the two batches of a tick, from what the block and the boundary cost.

A pass costs something once, whoever takes part (weights are read, kernels started), and something for each lane (keys
and values, products). Large batches share the first, but both are full only where their lanes together are no more than
the slots; and a lane that is not in use costs as much as one that is. `rate` plays the queue of the slots with tokens
whose depths are drawn from the shares of the model, `choose` takes the sizes with the highest rate. No size changes a
text: what a lane gives does not depend on the others.
"""

import dataclasses
import functools

import numpy as np

from mor_jax.inference.ticks import Batches

TICKS = 160  # that are played, after as many as it takes to come to an even flow
STEPS = 16  # sizes of a batch that are tried


@dataclasses.dataclass(frozen=True)
class Costs:
  """What a pass costs, in seconds: once, and for each lane."""

  block: float
  block_lane: float
  boundary: float
  boundary_lane: float

  def of_block(self, lanes: int) -> float:
    """Seconds of a pass of the block."""
    return self.block + lanes * self.block_lane

  def of_boundary(self, lanes: int) -> float:
    """Seconds of a pass of the boundary."""
    return self.boundary + lanes * self.boundary_lane


@dataclasses.dataclass(frozen=True)
class Flow:
  """Passes of the block and of the boundary for each token, lanes out of use included."""

  ticks: float
  boundaries: float


@functools.lru_cache(maxsize=4096)
def flow(batches: Batches, slots: int, entering: tuple[float, ...], ticks: int = TICKS) -> Flow:
  """How often the two run for a token, as `ticks.run` does it with a queue that never ends.

  Args:
    entering: shares of the tokens that take step 0, 1, ... (`ModelConfig.step_capacities`), falling.
  """
  rng = np.random.default_rng(0)
  left_N, since_N = np.zeros(slots, int), np.arange(slots) - slots  # passes that a token has before it

  def oldest(wants_N, count):
    of = np.flatnonzero(wants_N)
    return of[np.argsort(since_N[of], kind='stable')[:count]]

  tokens = boundaries = passes = 0
  for tick in range(2 * ticks):
    if tick == ticks:
      tokens = boundaries = passes = 0
    while True:
      waiting = int((left_N == 0).sum())
      if not (waiting >= batches.boundary or (waiting and slots - waiting < batches.block)):
        break
      some = oldest(left_N == 0, batches.boundary)
      left_N[some] = (rng.random(len(some))[:, None] < np.array(entering)).sum(axis=1)
      since_N[some] = tick
      tokens, boundaries = tokens + len(some), boundaries + 1
    some = oldest(left_N > 0, batches.block)
    left_N[some] -= 1
    since_N[some], passes = tick, passes + len(some)
  return Flow(sum(entering) * ticks / max(passes, 1), boundaries / max(tokens, 1))


def seconds(costs: Costs, batches: Batches, of: Flow) -> float:
  """Seconds of a token."""
  return of.ticks * costs.of_block(batches.block) + of.boundaries * costs.of_boundary(batches.boundary)


def fewest(slots: int) -> int:
  """The smallest batch that is tried, and with which costs are measured: noise would else be taken for a gain."""
  return max(slots // 4, 1)


def choose(
  costs: Costs,
  slots: int,
  entering: tuple[float, ...],
  block: int | None = None,
  boundary: int | None = None,
  multiple: int = 1,
) -> Batches:
  """The sizes with which a token takes least time.

  Args:
    entering: as in `flow`.
    block, boundary: sizes that are given; None: to be chosen.
    multiple: of which a size is one, where there are as many slots.
  """
  depth = max(sum(entering), 1.0)
  sizes = {slots * n // STEPS // multiple * multiple for n in range(1, STEPS + 1)}
  sizes = sorted({size for size in sizes if size >= fewest(slots)} | {slots})
  pairs = [
    Batches(of_block, of_boundary)
    for of_block in ([block] if block else sizes)
    for of_boundary in ([boundary] if boundary else sizes)
  ]

  def least(pair):  # with every lane in use
    return seconds(costs, pair, Flow(depth / pair.block, 1 / pair.boundary))

  best, found = None, float('inf')
  for pair in sorted(pairs, key=least):
    if least(pair) >= found:
      break
    taken = seconds(costs, pair, flow(pair, slots, entering))
    if taken < found:
      best, found = pair, taken
  return best
