"""Measures a training run: fetches metrics asynchronously, computes router metrics, throughput and data wait."""

import collections
import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from mor_jax.model import router
from mor_jax.runs.metrics import Record
from mor_jax.training.watch import nonfinite
from mor_jax.training.watch.alarm import SpikeAlarm


class Meter:
  """Turns the device metrics of each step into records, fetching them a few steps late.

  Fetching blocks until the step has finished. Because it happens `run_ahead` steps later,
  the device always has the next step queued when it finishes one.

  A record holds the loss, gradient norm and learning rate of its own step. Router metrics
  are noisy over a few rows, so they cover all steps since the previous record, as do
  `loss_zscore` (the maximum) and `loss_spikes` (the count).

  Args:
    tokens: step -> number of tokens in all steps up to and including it.
    is_logged: whether a step gets a record.
    seconds_before: seconds of training that earlier processes spent on this run.
    alarm: scores every loss.
    report: shows a line to the user.
    run_ahead: maximum number of steps queued on the device.
  """

  def __init__(
    self,
    tokens: Callable[[int], int],
    is_logged: Callable[[int], bool],
    seconds_before: float = 0.0,
    alarm: SpikeAlarm | None = None,
    report: Callable[[str], None] = lambda text: None,
    run_ahead: int = 2,
  ):
    self._tokens, self._is_logged, self._run_ahead = tokens, is_logged, run_ahead
    self._alarm, self._report, self._pending = alarm or SpikeAlarm(0.0), report, collections.deque()
    self._begin = time.perf_counter() - seconds_before
    self._restart()

  def _restart(self) -> None:
    self._since, self._steps, self._data_wait, self._counts = time.perf_counter(), 0, 0.0, None
    self._spikes, self._largest_zscore = 0, -math.inf

  def push(self, step: int, metrics: dict[str, Any], data_wait: float) -> list[tuple[int, Record]]:
    """Adds the metrics of a dispatched step; returns (step, record) of every logged step fetched.

    Raises:
      NonFiniteError: a fetched step halted the state.
    """
    self._pending.append((step, metrics, data_wait))
    return self._fetch(keep=self._run_ahead)

  def drain(self) -> list[tuple[int, Record]]:
    """Waits for all dispatched steps; returns and raises as `push` does."""
    return self._fetch(keep=0)

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Excludes the time within, such as validation or a checkpoint, from tokens per second."""
    begin = time.perf_counter()
    yield
    self._since += time.perf_counter() - begin

  def _fetch(self, keep: int) -> list[tuple[int, Record]]:
    records = []
    while len(self._pending) > keep:
      step, metrics, data_wait = self._pending.popleft()
      metrics = jax.device_get(metrics)
      counts = metrics.pop('counts', None)
      values = {name: float(value) for name, value in metrics.items()}
      if values.pop('halted'):
        raise nonfinite.NonFiniteError(step, values, records)
      if nonfinite.is_finite(values):
        self._counts = add_up(self._counts, counts)
        self._judge(step, values['loss'])
      else:
        self._report(f'skipped: {nonfinite.describe(step, values)}, {values["skipped"]:.0f} in all')
        values = {name: value for name, value in values.items() if math.isfinite(value) and name != 'loss'}
      self._steps += 1
      self._data_wait += data_wait
      if self._is_logged(step):
        records.append((step, self._record(step, values)))
        self._restart()
    return records

  def _judge(self, step: int, loss: float) -> None:
    score = self._alarm.z_score(loss)
    self._largest_zscore = max(self._largest_zscore, score)
    if self._alarm.is_spike(score):
      self._spikes += 1
      self._report(f'loss spike: {loss:.4f} at step {step}, {score:.1f} standard deviations above the mean')

  def _record(self, step: int, values: Record) -> Record:
    now, tokens = time.perf_counter(), self._tokens(step)
    if self._counts is not None:
      values |= router_metrics(self._counts)
    if self._largest_zscore > -math.inf:
      values['loss_zscore'] = self._largest_zscore
    values |= {
      'loss_spikes': self._spikes,
      'seconds_per_step': (now - self._since) / self._steps,
      'tokens_per_second': (tokens - self._tokens(step - self._steps)) / (now - self._since),
      'tokens': tokens,
      'data_wait_seconds': self._data_wait / self._steps,
      'seconds': now - self._begin,
    }
    return {f'train/{name}': value for name, value in values.items()}


def add_up(totals: Any, sums: Any) -> Any:
  """Fetches the sums of a batch and adds them to the totals in float64; None counts as zero."""
  if sums is None:
    return totals
  sums = jax.tree.map(lambda value: np.asarray(value, np.float64), jax.device_get(sums))
  return sums if totals is None else jax.tree.map(np.add, totals, sums)


def router_metrics(counts: dict[str, np.ndarray]) -> Record:
  """`router.summarize` applied to counts accumulated on the host."""
  return {name: float(value) for name, value in router.summarize(counts).items()}
