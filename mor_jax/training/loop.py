"""The training loop: dispatches steps and, between them, logs, validates, saves, and stops on request."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mor_jax.checkpoints.checkpoint import Checkpoints
from mor_jax.config import Config
from mor_jax.data import schedule
from mor_jax.parallel import mesh as mesh_lib
from mor_jax.runs.metrics import MetricsLog, Record
from mor_jax.runs.progress import Progress
from mor_jax.training.meter import Meter
from mor_jax.training.state import TrainState
from mor_jax.training.step import TrainStep, split_batch
from mor_jax.training.watch import goodput
from mor_jax.training.watch.alarm import SpikeAlarm
from mor_jax.training.watch.goodput import Ledger
from mor_jax.training.watch.nonfinite import NonFiniteError
from mor_jax.training.watch.profiling import Profiler
from mor_jax.training.watch.stopping import Interrupted, Stop
from mor_jax.training.watch.watchdog import Watchdog


@dataclasses.dataclass
class Guards:
  """Monitors of a training run: stop requests, hangs, time spent by kind of work, and profiling."""

  stop: Stop
  watchdog: Watchdog
  ledger: Ledger
  profiler: Profiler = dataclasses.field(default_factory=Profiler)

  def finish(self, checkpoints: Checkpoints) -> int | None:
    """Waits for the last checkpoint; the signal that ended the training, if one did."""
    self.watchdog.beat('the last checkpoint')
    with self.ledger.measure(goodput.CHECKPOINT):
      checkpoints.wait()
    stopped = self.stop.settle()
    self.ledger.write()
    return stopped

  def over(self, batches: Iterable[Any]) -> Iterator[Any]:
    """Yields validation batches: allows an interruption between them and resets the watchdog at each."""
    return self.watchdog.over(self.stop.between(batches), 'a batch of the validation')


def train(
  config: Config,
  mesh: Mesh,
  state: TrainState,
  train_step: TrainStep,
  order: schedule.BatchSchedule,
  batches: Iterator[dict[str, np.ndarray]],
  validate: Callable[[Any], Record],
  checkpoints: Checkpoints,
  log: MetricsLog,
  progress: Progress,
  guards: Guards,
) -> TrainState:
  """Trains from the state's step to `train.steps`, or until `guards.stop` requests a stop.

  Returns the final state, which has been saved. The order within a step keeps a killed run
  consistent: all metrics of a step are in metrics.jsonl before its checkpoint begins, so a
  resumed run neither repeats nor misses a line.

  Args:
    train_step: compiled for `mesh`; donates the state.
    order: rows of every step.
    batches: global batches, starting with the batch of the state's step.
    validate: maps the model's variables to the metrics of the validation split.

  Raises:
    NonFiniteError: the loss or gradient is not finite; names the step and the last checkpoint. The
      state on the device remains the one before that step.
  """
  steps, done = config.train.steps, int(state.step)
  stop, watchdog, ledger = guards.stop, guards.watchdog, guards.ledger
  seconds_before = max((record.get('train/seconds', 0.0) for record in log.records), default=0.0)
  meter = Meter(
    lambda step: order.rows_before(step) * config.data.seq_len,
    is_logged=lambda step: step % config.train.log_every == 0 or step in (1, steps),
    seconds_before=seconds_before,
    alarm=SpikeAlarm(config.train.spike_zscore),
    report=progress.report,
  )
  sharding = mesh_lib.micro_batch_sharding(mesh)
  first, saved, position = done, done, None  # the position of data that is read live
  max_unsaved = config.checkpoint.max_unsaved_steps

  def note(records: list[tuple[int, Record]]) -> None:
    for step, record in records:
      log.write(step, record)
      progress.show(step, record)
    ledger.tick()

  def save(validated: Record) -> None:
    nonlocal saved
    with meter.paused(), ledger.measure(goodput.CHECKPOINT):
      ledger.saved(done)
      watchdog.beat(f'the checkpoint of step {done}')
      checkpoints.save(done, state, validated.get('validation/nll'), position, order.rows_before(done))
    saved = done

  def hold() -> None:
    """Waits for the checkpoint being written, where a crash after another step would lose too many."""
    if max_unsaved is None or done - first < max_unsaved:
      return
    with meter.paused(), ledger.measure(goodput.CHECKPOINT):
      watchdog.beat('the checkpoint being written')
      checkpoints.await_finished(done + 1 - max_unsaved)

  def validation() -> Record:
    """Metrics of the validation split; empty if interrupted, so that saving comes first."""
    try:
      with meter.paused(), ledger.measure(goodput.VALIDATION), stop.interruptible():
        return validate(state.variables)
    except Interrupted:
      return {}

  with jax.transfer_guard('disallow'), ledger.measure(goodput.STEPS), guards.profiler:
    try:
      while done < steps and not stop.signal:
        hold()
        guards.profiler.before(done + 1, lambda: note(meter.drain()))
        watchdog.beat(f'step {done + 1}')
        begin = time.perf_counter()
        # A stream is first read up to where it was left, which may take long.
        patience = watchdog.paused() if done == first else contextlib.nullcontext()
        try:
          with patience, stop.interruptible(), ledger.measure(goodput.DATA_WAIT):
            batch = next(batches)
        except Interrupted:
          break
        data_wait = time.perf_counter() - begin
        with guards.profiler.step(done + 1):
          batch = mesh_lib.put(split_batch(batch, order.micro_batches(done)), sharding)
          state, metrics = train_step(state, batch)
        done += 1
        position = getattr(batches, 'position', None)  # not later: an interrupted wait may have moved it
        progress.advance(done)
        note(meter.push(done, metrics, data_wait))
        if stop.poll(done):
          break
        saves = _is_due(done, config.checkpoint.every_steps, steps) or stop.save_wanted
        # The best can only be told among those that were validated.
        validates = _is_due(done, config.train.eval_every, steps) or (
          saves and config.checkpoint.keep_best > 0
        )
        if validates or saves:
          ended = meter.drain()
          validated = validation() if validates else {}
          note(_extended(ended, done, validated | ledger.record()))
        if saves:
          save(validated)
      note(meter.drain())
    except NonFiniteError as error:
      note(error.records)
      error.add(_last_good(checkpoints))
      raise
    if done > saved:
      save({})
  return state


def _is_due(step: int, every: int, steps: int) -> bool:
  """Whether `step` is the last or a multiple of `every` (0: only the last)."""
  return step == steps or (every > 0 and step % every == 0)


def _extended(records: list[tuple[int, Record]], step: int, more: Record) -> list[tuple[int, Record]]:
  """The records with `more` merged into the step's record, which is the last one or does not exist yet."""
  if not more:
    return records
  if records and records[-1][0] == step:
    return [*records[:-1], (step, records[-1][1] | more)]
  return [*records, (step, more)]


def _last_good(checkpoints: Checkpoints) -> str:
  checkpoints.wait()  # one may still be being written
  step = checkpoints.latest_step
  if step is None:
    return 'there is no checkpoint yet'
  return f'the last checkpoint is {checkpoints.path(step)}'
