"""Phases: consecutive parts of a training run, each with its own compiled program.

Capacities and the number of micro-batches are static sizes: changing one recompiles the step.
A capacity warm-up or a batch ramp therefore moves in a few stairs, and the program of each
stair is compiled before training begins. So is that of each stage that trains other parameters.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from jax.sharding import Mesh

from mor_jax.config import Config, with_changes
from mor_jax.data import schedule
from mor_jax.data.packing import ROW_ARRAYS
from mor_jax.model.transformer import Transformer
from mor_jax.parallel import device_memory
from mor_jax.training import capacities, distillation, growth, handover, stairs, trainable
from mor_jax.training.distillation import Teacher
from mor_jax.training.optimizer import make_optimizer
from mor_jax.training.state import TrainState
from mor_jax.training.step import TrainStep, abstract_batch, make_train_step
from mor_jax.training.targets import Batch


def plan(config: Config) -> list[tuple[int, Config]]:
  """Returns (updates completed at its start, config) of every phase; one phase where nothing changes.

  The config of a phase has a fixed batch size and no ramp, and trains the same all the time.
  """
  batches, grown = schedule.of(config.train), growth.stairs(config)
  trained = trainable.stages_of(config.train)
  left = stairs.MOST_PROGRAMS - sum(len(changes) - 1 for changes in (batches.stages, grown, trained))
  warmed = capacities.stairs(config, max(1, left - 1))
  phases = []
  for first in sorted({first for first, _ in (*warmed, *batches.stages, *grown, *trained)}):
    own = stairs.at(warmed, first)
    constant = {'growth': None, 'stages': None}
    changing = {'recursions': stairs.at(grown, first), 'trainable': stairs.at(trained, first)}
    phase = with_changes(config, train={**changing, **constant})
    if len(batches.stages) > 1:
      batch = {'global_batch': batches.rows(first), 'accumulation': batches.micro_batches(first)}
      phase = with_changes(phase, train={**batch, 'ramp_batch': None, 'ramp_steps': 0})
    phases.append((first, phase if own is None else with_changes(phase, model={'capacities': own})))
  return phases


def remaining(phases: list[tuple[int, Config]], done: int) -> list[tuple[int, Config]]:
  """The phases that are still needed after `done` updates."""
  ends = [first for first, _ in phases[1:]] + [math.inf]
  return [phase for phase, end in zip(phases, ends, strict=True) if end > done]


def compile_remaining(
  config: Config,
  mesh: Mesh,
  state: TrainState,
  teacher: Teacher | None,
  done: int,
  arrays: Sequence[str] = ROW_ARRAYS,
) -> Iterator['Program']:
  """The program of every phase that is still to come after `done` updates, as soon as it is compiled.

  Args:
    state: shapes and shardings of that after `done` updates (`handover.abstract_after`).
    arrays: names of what rows of the data have.
  """
  planned = plan(config)
  theirs = (distillation.abstract_parameters(teacher, mesh),) if teacher else ()
  for first, phase in remaining(planned, done):
    begin, enter = time.perf_counter(), None
    if first >= done and handover.begins_stage(config, first):
      enter = handover.compile_entry(config, mesh, first)
      state = handover.abstract_after(config, mesh, first + 1)
    optimizer = make_optimizer(config.train, config.model, first)
    step = make_train_step(Transformer(phase.model), phase, optimizer, mesh, teacher)
    compiled = step.lower(state, abstract_batch(phase, mesh, arrays), *theirs).compile()
    size = device_memory.bytes_on_a_device(state.opt_state)
    is_only = len(planned) == 1
    yield Program(first, phase, compiled, time.perf_counter() - begin, is_only, size, enter)


class Program(NamedTuple):
  """The compiled step of a phase.

  Attributes:
    first: updates done before the phase.
    config: of the phase.
    step: the compiled step.
    seconds: that compiling took.
    is_only: the training has no other phase.
    optimizer_bytes: of the optimiser's state on a device.
    enter: makes of the state that the phase before leaves the one that the step takes; None: they are the same.
  """

  first: int
  config: Config
  step: TrainStep
  seconds: float
  is_only: bool
  optimizer_bytes: int = 0
  enter: Callable[[TrainState], TrainState] | None = None


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
    if program.enter is not None and program.first == self._done:
      state = program.enter(state)
    self._done += 1
    return program.step(state, batch, *self._theirs)
