"""Phases: consecutive parts of a training run, each with its own compiled program.

Capacities and the number of micro-batches are static sizes: changing one recompiles the step.
A capacity warm-up or a batch ramp therefore moves in a few stairs, and the program of each
stair is compiled before training begins.
"""

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import optax
from jax.sharding import Mesh

from mor_jax.config import Config, with_changes
from mor_jax.data import schedule
from mor_jax.data.packing import ROW_ARRAYS
from mor_jax.model.transformer import Transformer
from mor_jax.training import distillation, growth
from mor_jax.training.distillation import Teacher
from mor_jax.training.state import TrainState
from mor_jax.training.step import TrainStep, abstract_batch, make_train_step
from mor_jax.training.targets import Batch

MAX_SIZES = 8  # programs of a training


def plan(config: Config) -> list[tuple[int, Config]]:
  """Returns (updates completed at its start, config) of every phase; one phase where nothing changes.

  The capacities of a stair are c + (1 - c) * (1 + cos(pi * t / T)) / 2 with t at the middle of
  the stair and T = `model.capacity_warmup_steps` (the authors' formula; their t counts
  micro-batches). The config of a phase has a fixed batch size and no ramp.
  """
  batches, grown = schedule.of(config.train), growth.stairs(config)
  left = MAX_SIZES - (len(batches.stages) - 1) - (len(grown) - 1)
  stairs = _capacity_stairs(config, max(1, left - 1))
  phases = []
  for first in sorted({first for first, _ in (*stairs, *batches.stages, *grown)}):
    capacities = _at(stairs, first)
    phase = with_changes(config, train={'recursions': _at(grown, first), 'growth': None})
    if len(batches.stages) > 1:
      batch = {'global_batch': batches.rows(first), 'accumulation': batches.micro_batches(first)}
      phase = with_changes(phase, train={**batch, 'ramp_batch': None, 'ramp_steps': 0})
    phases.append(
      (first, phase if capacities is None else with_changes(phase, model={'capacities': capacities}))
    )
  return phases


def _at(stairs: list[tuple[int, Any]], step: int) -> Any:
  """What holds after so many steps."""
  return next(value for begin, value in reversed(stairs) if begin <= step)


def remaining(phases: list[tuple[int, Config]], done: int) -> list[tuple[int, Config]]:
  """The phases that are still needed after `done` updates."""
  ends = [first for first, _ in phases[1:]] + [math.inf]
  return [phase for phase, end in zip(phases, ends, strict=True) if end > done]


def _capacity_stairs(config: Config, most: int) -> list[tuple[int, tuple[float, ...] | None]]:
  """(updates completed at its start, capacities) of at most `most` stairs, then None: the config's capacities."""
  warmup = config.model.capacity_warmup_steps if config.model.kind == 'mor' else 0
  count = min(most, warmup)
  stairs = []
  for stair in range(count):
    share = (1 + math.cos(math.pi * (stair + 0.5) / count)) / 2
    capacities = tuple(c + (1 - c) * share for c in config.model.step_capacities)
    stairs.append((stair * warmup // count, capacities))
  return [*stairs, (warmup, None)]


def compile_remaining(
  config: Config,
  optimizer: optax.GradientTransformation,
  mesh: Mesh,
  state: TrainState,
  teacher: Teacher | None,
  done: int,
  arrays: Sequence[str] = ROW_ARRAYS,
) -> Iterator['Program']:
  """The program of every phase that is still to come after `done` updates, as soon as it is compiled.

  Args:
    state: its shapes and shardings.
    arrays: names of what rows of the data have.
  """
  planned = plan(config)
  theirs = (distillation.abstract_parameters(teacher, mesh),) if teacher else ()
  for first, phase in remaining(planned, done):
    begin = time.perf_counter()
    step = make_train_step(Transformer(phase.model), phase, optimizer, mesh, teacher)
    compiled = step.lower(state, abstract_batch(phase, mesh, arrays), *theirs).compile()
    yield Program(first, phase, compiled, time.perf_counter() - begin, is_only=len(planned) == 1)


class Program(NamedTuple):
  """The compiled step of a phase.

  Attributes:
    first: updates done before the phase.
    config: of the phase.
    step: the compiled step.
    seconds: that compiling took.
    is_only: the training has no other phase.
  """

  first: int
  config: Config
  step: TrainStep
  seconds: float
  is_only: bool


class PhasedStep:
  """Takes each step with the program of its phase.

  Args:
    programs: of every phase to come, in order.
    done: updates done already.
    theirs: further arguments that every program takes: a teacher's parameters.
  """

  def __init__(self, programs: list[Program], done: int, theirs: tuple = ()):
    self._programs, self._done, self._theirs = programs, done, theirs

  def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
    """Takes one optimiser step; see `make_train_step`."""
    program = next(program for program in reversed(self._programs) if program.first <= self._done)
    self._done += 1
    return program.step(state, batch, *self._theirs)
