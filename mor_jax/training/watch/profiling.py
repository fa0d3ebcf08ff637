"""Profiles selected training steps on devices and host, for XProf or Perfetto (docs/performance.md)."""

import re
from collections.abc import Callable
from pathlib import Path

import jax

from mor_jax.config import ConfigError

_SPAN = re.compile(r'(\d+):(\d+)')


def parse_span(text: str | None, steps: int) -> range:
  """The steps of `--profile=START:STOP`, STOP left out; none without the flag.

  Raises:
    ConfigError: it says something else, or begins after the last of all `steps`.
  """
  if text is None:
    return range(0)
  match = _SPAN.fullmatch(text)
  span = range(int(match[1]), int(match[2])) if match else range(0)
  if not span or span.start < 1:
    raise ConfigError(
      f'--profile={text} is not allowed: write START:STOP with 1 <= START < STOP, as in --profile=10:15 for steps '
      f'10 to 14'
    )
  if span.start > steps:
    raise ConfigError(f'--profile={text} begins after the last step, {steps}')
  return span


class Profiler:
  """Traces the steps of a span. Use as a context, which ends a running trace.

  Args:
    span: steps; none: does nothing.
    folder: each host writes its own files there.
    report: shows a line to the user.
    done: steps that were trained before.
  """

  def __init__(
    self,
    span: range = range(0),
    folder: Path | None = None,
    report: Callable[[str], None] = print,
    done: int = 0,
  ):
    if span and done >= span.start:
      report(f'--profile: step {span.start} was trained before, so nothing is traced')
    self._span, self._folder, self._report = span, folder, report
    self._traces, self._last = False, 0

  def __enter__(self) -> 'Profiler':
    return self

  def __exit__(self, *_) -> None:
    self._stop()

  def before(self, step: int, drain: Callable[[], None]) -> None:
    """Call before dispatching a step. `drain` waits for the earlier steps, so that a trace holds whole steps."""
    if self._traces and step >= self._span.stop:
      drain()
      self._stop()
    elif self._span and step == self._span.start:
      drain()
      with jax.transfer_guard('allow'):
        jax.profiler.start_trace(self._folder)
      self._traces = True

  def step(self, number: int) -> jax.profiler.StepTraceAnnotation:
    """Context manager that names a step in the trace."""
    self._last = number
    return jax.profiler.StepTraceAnnotation('train', step_num=number)

  def _stop(self) -> None:
    if self._traces:
      with jax.transfer_guard('allow'):
        jax.profiler.stop_trace()
      self._traces = False
      self._report(f'the trace of steps {self._span.start} to {self._last} is in {self._folder}')
