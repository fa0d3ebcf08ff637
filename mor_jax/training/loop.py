"""The training loop: dispatch steps, and between them log, validate and save."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mor_jax.config import Config
from mor_jax.data import schedule
from mor_jax.parallel import mesh as mesh_lib
from mor_jax.training.checkpoint import Checkpoints
from mor_jax.training.meter import Meter
from mor_jax.training.metrics import MetricsLog, Record
from mor_jax.training.nonfinite import NonFiniteError
from mor_jax.training.progress import Progress
from mor_jax.training.state import TrainState
from mor_jax.training.step import TrainStep, split_batch


def train(
  config: Config,
  mesh: Mesh,
  state: TrainState,
  train_step: TrainStep,
  batches: Iterator[dict[str, np.ndarray]],
  validate: Callable[[Any], Record],
  checkpoints: Checkpoints,
  log: MetricsLog,
  progress: Progress,
) -> TrainState:
  """Trains from the state's step to `train.steps` and returns the last state, saved and validated.

  The order within a step keeps a killed run consistent: everything known about a step is in
  metrics.jsonl before the step's checkpoint begins, so a resumed run repeats no line and misses none.

  Args:
    train_step: made for `mesh`; donates the state.
    batches: global batches, beginning with that of the state's step.
    validate: variables of the model -> metrics of the validation split.

  Raises:
    NonFiniteError: the loss or gradient is not finite; names the step and the last checkpoint. The
      state on the device is that before the step, and stays it.
  """
  steps, first = config.train.steps, int(state.step) + 1
  batch_schedule = schedule.of(config.train)
  seconds_before = max((record.get('train/seconds', 0.0) for record in log.records), default=0.0)
  meter = Meter(
    lambda step: batch_schedule.rows_before(step) * config.data.seq_len,
    is_logged=lambda step: step % config.train.log_every == 0 or step in (1, steps),
    seconds_before=seconds_before,
    report=progress.report,
  )
  sharding = mesh_lib.micro_batch_sharding(mesh)

  def note(records: list[tuple[int, Record]]) -> None:
    for step, record in records:
      log.write(step, record)
      progress.show(step, record)

  with jax.transfer_guard('disallow'):
    for step in range(first, steps + 1):
      begin = time.perf_counter()
      batch = next(batches)
      data_wait = time.perf_counter() - begin
      batch = mesh_lib.put(split_batch(batch, batch_schedule.micro_batches(step - 1)), sharding)
      state, metrics = train_step(state, batch)
      progress.advance(step)
      try:
        ended = meter.push(step, metrics, data_wait)
        validates = _is_due(step, config.train.eval_every, steps)
        saves = _is_due(step, config.checkpoint.every_steps, steps)
        if validates or saves:
          ended += meter.drain()
      except NonFiniteError as error:
        note(error.records)
        error.add(_last_good(checkpoints))
        raise
      if validates:
        with meter.paused():
          ended = _extended(ended, step, validate(state.variables))
      note(ended)
      if saves:
        with meter.paused():
          checkpoints.save(step, state)
  return state


def _is_due(step: int, every: int, steps: int) -> bool:
  """Every so many steps (0: never) and at the last."""
  return step == steps or (every > 0 and step % every == 0)


def _extended(records: list[tuple[int, Record]], step: int, more: Record) -> list[tuple[int, Record]]:
  """The records with `more` added to the step's own, which is the last one or missing."""
  if records and records[-1][0] == step:
    return [*records[:-1], (step, records[-1][1] | more)]
  return [*records, (step, more)]


def _last_good(checkpoints: Checkpoints) -> str:
  step = checkpoints.latest_step
  if step is None:
    return 'there is no checkpoint yet'
  return f'the last checkpoint is {checkpoints.path(step)}'
