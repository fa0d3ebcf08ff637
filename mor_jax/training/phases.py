"""Phases: stretches of a training whose compiled programs differ in static sizes (capacity warm-up).

A capacity is the static size of a recursion step, so that it cannot fall smoothly without
compiling anew at every step. It falls in a few stairs instead, each compiled before the
training begins.
"""

import math

from mor_jax.config import Config
from mor_jax.training.loss import Batch
from mor_jax.training.state import TrainState
from mor_jax.training.step import TrainStep

MAX_SIZES = 8  # stairs of the warm-up and the final capacities


def plan(config: Config) -> list[tuple[int, Config]]:
  """(updates done before, config) of every phase; a single one without capacity warm-up.

  Stair by stair the capacities follow c + (1 - c) * (1 + cos(pi * t / T)) / 2 at the stair's
  middle, T being `model.capacity_warmup_steps` (the authors' formula; their t counts micro-batches).
  """
  warmup = config.model.capacity_warmup_steps if config.model.kind == 'mor' else 0
  stairs = min(MAX_SIZES - 1, warmup)
  phases = []
  for stair in range(stairs):
    share = (1 + math.cos(math.pi * (stair + 0.5) / stairs)) / 2
    capacities = tuple(c + (1 - c) * share for c in config.model.step_capacities)
    phases.append((stair * warmup // stairs, config.replace(model={'capacities': capacities})))
  return [*phases, (warmup, config)]


class PhasedStep:
  """Takes each step with the program of its phase.

  Args:
    programs: (updates done before, compiled step) of every phase, in order.
    done: updates done already.
  """

  def __init__(self, programs: list[tuple[int, TrainStep]], done: int):
    self._programs, self._done = programs, done

  def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
    """One optimiser step, see `make_train_step`."""
    program = next(step for begin, step in reversed(self._programs) if begin <= self._done)
    self._done += 1
    return program(state, batch)
