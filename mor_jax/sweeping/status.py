"""Progress of a sweep: a bar on a terminal, otherwise lines, and the remaining time."""

import contextlib
import dataclasses
import datetime
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TaskProgressColumn, TimeElapsedColumn

from mor_jax.console import Bar, print_line
from mor_jax.files import parse_json
from mor_jax.sweeping.plan import Plan, PlannedRun

UPDATE_SECONDS = 2.0
LINE_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class Status:
  """The status of a run.

  Attributes:
    state: finished, failed, running, interrupted, unfinished (trained in part) or not started.
    exit_code: of the training that failed or was interrupted.
    error: the end of its output.
  """

  state: str
  exit_code: int | None = None
  error: str = ''


class Display:
  """Shows the start and end of runs and the progress of the sweep. Use as a context manager."""

  def __init__(self, console: Console, plan: Plan):
    self._console, self._plan = console, plan
    self._begin = time.monotonic()
    self._done_before = self._done = 0.0
    self._updated = self._said = -LINE_SECONDS
    self._waited_for: set[str] = set()
    self._bar = Bar(
      console,
      '{task.fields[ended]}/{task.fields[runs]} runs',
      BarColumn(bar_width=None),
      TaskProgressColumn(),
      '{task.fields[running]}',
      TimeElapsedColumn(),
      'ETA {task.fields[left]}',
      total=sum(run.work for run in plan.runs),
      ended=0,
      runs=len(plan.runs),
      running='',
      left='-',
    )

  def __enter__(self) -> 'Display':
    self._begin = time.monotonic()
    self._done_before = sum(work_done(run) for run in self._plan.runs)
    self._bar.__enter__()
    return self

  def __exit__(self, *_) -> None:
    self._bar.__exit__()

  def started(self, run: PlannedRun) -> None:
    """Notes that a run started or resumed."""
    place = next(index for index, other in enumerate(self._plan.runs, 1) if other is run)
    verb = 'resuming' if work_done(run) else 'training'
    self._print(f'[{place}/{len(self._plan.runs)}] {verb} {run.name}')

  def waits_for(self, run: PlannedRun) -> None:
    """Notes that a process of an earlier sweep is still training the run."""
    if run.name not in self._waited_for:
      self._waited_for.add(run.name)
      self._print(f'{run.name} is still being trained by a process of an earlier sweep; waiting for it')

  def ended(self, run: PlannedRun, status: Mapping[str, Status]) -> None:
    """Notes that a run ended, successfully or not."""
    mine = status[run.name]
    ended = sum(one.state in ('finished', 'failed') for one in status.values())
    text = f'{run.name} {mine.state}'
    if mine.state == 'finished':
      result = run.folder.read_summary()
      text += f': validation loss {result["validation/nll"]:.4f}, {result["validation/bits_per_byte"]:.4f} bits per byte'
    elif mine.state == 'failed':
      last = mine.error.splitlines()[-1] if mine.error else 'no output'
      text += f' with exit code {mine.exit_code}: {last[:200]} ({self._plan.log(run)})'
    self._done = sum(work_done(each) for each in self._plan.runs)
    self._print(f'{text}; {ended} of {len(self._plan.runs)} runs done, ETA {self._left(status)}')

  def update(self, running: Sequence[PlannedRun], status: Mapping[str, Status]) -> None:
    """Called regularly while runs are active."""
    now = time.monotonic()
    if now < self._updated + UPDATE_SECONDS:
      return
    self._updated = now
    self._done = sum(work_done(run) for run in self._plan.runs)
    shares = ', '.join(f'{run.name} {work_done(run) / run.work:.0%}' for run in running)
    ended = sum(one.state in ('finished', 'failed') for one in status.values())
    self._bar.update(completed=self._done, ended=ended, running=escape(shares), left=self._left(status))
    if not self._console.is_terminal and now > self._said + LINE_SECONDS and shares:
      self._print(f'running: {shares}; ETA {self._left(status)}')

  def _left(self, status: Mapping[str, Status]) -> str:
    """Estimated time until the last run ends, without failed runs."""
    left = sum(
      run.work - work_done(run)
      for run in self._plan.runs
      if status[run.name].state not in ('finished', 'failed')
    )
    fresh = self._done - self._done_before
    if not left:
      return '0:00:00'
    if fresh <= 0:
      return '-'
    return str(datetime.timedelta(seconds=round((time.monotonic() - self._begin) * left / fresh)))

  def _print(self, text: str) -> None:
    self._said = time.monotonic()
    print_line(self._console, text)


def work_done(run: PlannedRun) -> float:
  """The part of `run.work` that is complete according to the metrics in its folder."""
  if run.folder.is_finished(run.config):
    return run.work
  return run.work * min(1.0, _last_step(run.folder.metrics) / run.config.train.steps)


def _last_step(path: Path) -> int:
  """The step in the last complete line of a metrics.jsonl; 0 if there is none."""
  with contextlib.suppress(OSError), path.open('rb') as file:
    file.seek(0, os.SEEK_END)
    file.seek(max(0, file.tell() - 16_384))
    for line in reversed(file.read().splitlines()):
      with contextlib.suppress(ValueError, KeyError, TypeError):
        return int(parse_json(line)['step'])
  return 0
