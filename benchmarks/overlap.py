"""Measures how much of the time the device runs steps while a training run reads data, logs and saves.

  python -m benchmarks.overlap [--config_file=configs/tiny.py] [--steps=300] [--save_every=100]

Trains as `mor_jax.train` does and measures from the dispatch of the first step to the end of the last. A step
occupies the device from its dispatch, or from the end of the previous step if that is later, until its results
are ready; a separate thread waits for them. Validation also occupies the device, so its time is excluded and
shown separately. Time that the device spends waiting for checkpoints, metrics or data counts as idle. The table
also shows what the host waits for, which does no harm while the device is busy. Finally the same steps run with
nothing around them. Writes benchmarks/results/overlap.json and .md.
"""

import queue
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
from absl import flags
from rich.console import Console

from benchmarks import results
from mor_jax import cli, train
from mor_jax.checkpoints.checkpoint import Checkpoints
from mor_jax.training import loop, phases
from mor_jax.training.meter import Meter

FLAGS = flags.FLAGS
flags.DEFINE_string('config_file', 'configs/tiny.py', 'what is trained')
flags.DEFINE_integer('steps', 300, 'steps')
flags.DEFINE_integer('save_every', 100, 'steps between two checkpoints')
flags.DEFINE_integer('alone', 60, 'steps with nothing around them')

GOAL = 0.97
VALIDATION, METRICS, SAVE, DATA = (
  'validation',
  'metrics, device to host',
  'checkpoint, device to host',
  'data',
)

Span = tuple[float, float]  # of time.perf_counter


class Watch:
  """Records when steps run and what the host waits for."""

  def __init__(self):
    self.steps: list[Span] = []
    self.host: dict[str, list[Span]] = {name: [] for name in (VALIDATION, METRICS, SAVE, DATA)}
    self.last: tuple = ()
    self._queue = queue.SimpleQueue()
    self._thread = threading.Thread(target=self._wait, daemon=True)
    self._thread.start()

  def step(self, call: Callable) -> Callable:
    """Wraps `PhasedStep.__call__` to record its steps."""

    def watched(steps, state, batch):
      begin = time.perf_counter()
      state, metrics = call(steps, state, batch)
      self._queue.put((begin, metrics['loss']))
      self.last = steps, state, batch
      return state, metrics

    return watched

  def of_host(self, name: str, call: Callable) -> Callable:
    """Wraps a function so that its calls count as waiting for `name`."""

    def watched(*args, **kwargs):
      begin = time.perf_counter()
      try:
        return call(*args, **kwargs)
      finally:
        self.host[name].append((begin, time.perf_counter()))

    return watched

  def close(self) -> None:
    """Waits for all dispatched steps."""
    self._queue.put(None)
    self._thread.join()

  def _wait(self) -> None:
    ended = 0.0
    while (dispatched := self._queue.get()) is not None:
      begin, result = dispatched
      result.block_until_ready()
      begin, ended = max(begin, ended), time.perf_counter()
      self.steps.append((begin, ended))


def main() -> None:
  """Trains, measures and writes the table."""
  changes = {
    'train.steps': FLAGS.steps,
    'train.eval_every': FLAGS.steps // 2,
    'train.eval_rows': 64,
    'train.sample_tokens': 0,
    'checkpoint.every_steps': FLAGS.save_every,
  }
  config = cli.load_config(FLAGS.config_file, changes)
  watch = Watch()
  with (
    tempfile.TemporaryDirectory() as folder,
    mock.patch.object(phases.PhasedStep, '__call__', watch.step(phases.PhasedStep.__call__)),
    mock.patch.object(train, '_validator', _timed_results(watch, VALIDATION, train._validator)),
    mock.patch.object(Meter, '_fetch', watch.of_host(METRICS, Meter._fetch)),
    mock.patch.object(Checkpoints, 'save', watch.of_host(SAVE, Checkpoints.save)),
    mock.patch.object(loop, 'next', watch.of_host(DATA, next), create=True),
  ):
    if train.main(config, folder) != 0:
      raise RuntimeError('the training was stopped')
    watch.close()
    alone = _alone(*watch.last)
  settings = {
    'run': FLAGS.config_file,
    **changes,
    'goal': f'inside device steps: at least {GOAL:.0%} of the time without validation',
  }
  columns = ('what', 'seconds', 'share', 'how often')
  table = results.keep('overlap', columns, _rows(watch, alone), settings)
  Console().print(table, highlight=False, soft_wrap=True)


def _timed_results(watch: Watch, name: str, make: Callable) -> Callable:
  """Wraps a factory so that calls of its functions count as waiting for `name`."""
  return lambda *args: watch.of_host(name, make(*args))


def _alone(steps: phases.PhasedStep, state: Any, batch: Any) -> float:
  """Seconds per step when steps run back to back."""
  with jax.transfer_guard('allow'):
    state, _ = jax.block_until_ready(steps(state, batch))
    begin = time.perf_counter()
    for _ in range(FLAGS.alone):
      state, metrics = steps(state, batch)
      metrics['loss'].block_until_ready()
  return (time.perf_counter() - begin) / FLAGS.alone


def _rows(watch: Watch, alone: float) -> list[list]:
  window = watch.steps[0][0], watch.steps[-1][1]
  inside = {
    name: [span for span in spans if window[0] < span[1] <= window[1]] for name, spans in watch.host.items()
  }
  validated = _seconds(inside[VALIDATION])
  whole = window[1] - window[0] - validated
  busy = _seconds(watch.steps)

  def row(name: str, seconds: float, often: int | str) -> list:
    return [name, f'{seconds:.2f}', f'{seconds / whole:.2%}', often]

  rows = [
    row('first to last step, without validation', whole, 1),
    row('inside device steps', busy, len(watch.steps)),
    row('device without a step', whole - busy, ''),
    row('left out: validation', validated, len(inside[VALIDATION])),
  ]
  rows += [
    row(f'host waits for {name}', _seconds(inside[name]), len(inside[name])) for name in (METRICS, SAVE, DATA)
  ]
  return [*rows, row('as many steps with nothing around them', alone * len(watch.steps), FLAGS.alone)]


def _seconds(spans: list[Span]) -> float:
  return sum(end - begin for begin, end in spans)


if __name__ == '__main__':
  cli.run(main, __doc__, with_config=False)
