"""Trains the runs of a sweep in separate processes, several at a time. A failed run does not stop the sweep.

A run with a summary.json in its folder is finished. Unfinished runs are started again and resume by
themselves. Each process holds a lock on its log during its lifetime. A restarted sweep therefore waits for
training processes that outlived the previous one, and never runs two in the same folder.
"""

import collections
import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from mor_jax.errors import RunError
from mor_jax.files import parse_json, write_atomically
from mor_jax.sweeping.plan import Plan, PlannedRun
from mor_jax.sweeping.status import Display, Status

TRAIN = (sys.executable, '-m', 'mor_jax.train')
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
POLL_SECONDS = 0.1
TAIL_LINES, TAIL_BYTES = 15, 16_384
TOLD_TO_STOP = (-signal.SIGTERM, 128 + signal.SIGTERM, 128 + signal.SIGINT)


@dataclasses.dataclass
class Job:
  """A running training process, in one of `parallel` places."""

  run: PlannedRun
  place: int
  process: subprocess.Popen
  log: IO[bytes]
  log_start: int
  told: int = 0  # signals passed on


class Runner:
  """Trains the unfinished runs of a plan.

  Args:
    plan: the runs to train.
    display: shows the progress.
    parallel: number of concurrent runs; each gets an equal share of the cores.
    gpus: devices to divide among them (CUDA_VISIBLE_DEVICES), a multiple of `parallel`; (): unchanged.
    train: the training command, without flags.
  """

  def __init__(
    self,
    plan: Plan,
    display: Display,
    parallel: int = 1,
    gpus: Sequence[str] = (),
    train: Sequence[str] = TRAIN,
  ):
    self._plan, self._display = plan, display
    self._parallel, self._gpus, self._train = parallel, gpus, train
    self.status = read_status(plan)
    self._signals: list[int] = []
    self._jobs: list[Job] = []

  def run(self) -> int | None:
    """Trains all runs. Returns the signal that ended the sweep, or None if no run is left.

    Raises:
      RunError: another sweep is running in this folder.
    """
    (self._plan.folder / 'logs').mkdir(parents=True, exist_ok=True)
    with _lock(self._plan), _Handlers(self._signals), self._display:
      waiting = collections.deque(run for run in self._plan.runs if self.status[run.name].state != 'finished')
      while (waiting and not self._signals) or self._jobs:
        while waiting and len(self._jobs) < self._parallel and not self._signals:
          if not self._start(waiting[0]):
            waiting.rotate(-1)
            break
          waiting.popleft()
        for job in [job for job in self._jobs if job.process.poll() is not None]:
          self._end(job)
        self._pass_on_signals()
        self._display.update([job.run for job in self._jobs], self.status)
        time.sleep(POLL_SECONDS)
    write_status(self._plan, self.status)
    return self._signals[0] if self._signals else None

  def _start(self, run: PlannedRun) -> bool:
    """Starts a run, unless it has finished. Returns False while another process still uses its folder."""
    log = self._plan.log(run).open('ab')
    try:
      fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      log.close()
      self._display.waits_for(run)
      return False
    if run.folder.is_finished(run.config):  # by a process that outlived the sweep which started it
      log.close()
      self.status[run.name] = Status('finished')
      self._display.ended(run, self.status)
      return True
    place = min(set(range(self._parallel)) - {job.place for job in self._jobs})
    process = subprocess.Popen(
      [*self._train, *run.words],
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=subprocess.STDOUT,
      env=self._environment(place),
      start_new_session=True,  # Ctrl-C is for the sweep, which passes it on
    )
    self._pin(process.pid, place)
    self._jobs.append(Job(run, place, process, log, log.tell()))
    self.status[run.name] = Status('running')
    write_status(self._plan, self.status)
    self._display.started(run)
    return True

  def _end(self, job: Job) -> None:
    job.log.close()
    self._jobs.remove(job)
    code = job.process.returncode
    tail = _tail(self._plan.log(job.run), job.log_start)
    if code == 0 and job.run.folder.is_finished(job.run.config):
      status = Status('finished')
    elif self._signals and code in TOLD_TO_STOP:
      status = Status('interrupted', code)
    elif code == 0:
      status = Status('failed', code, f'{tail}\nended without a result ({job.run.folder.path}/summary.json)')
    else:
      status = Status('failed', code, tail)
    self.status[job.run.name] = status
    write_status(self._plan, self.status)
    self._display.ended(job.run, self.status)

  def _environment(self, place: int) -> dict[str, str]:
    environment = {**os.environ, 'PYTHONUNBUFFERED': '1'}
    if self._gpus:
      share = len(self._gpus) // self._parallel
      environment['CUDA_VISIBLE_DEVICES'] = ','.join(self._gpus[place * share : (place + 1) * share])
    return environment

  def _pin(self, pid: int, place: int) -> None:
    """Pins a process to its share of the cores. Sharing all cores between runs would be slower."""
    if not hasattr(os, 'sched_setaffinity'):
      return
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // self._parallel
    if self._parallel > 1 and share:
      os.sched_setaffinity(pid, cores[place * share : (place + 1) * share])

  def _pass_on_signals(self) -> None:
    """Forwards signals to every run as often as received: the first saves and ends, the second ends at once."""
    for job in self._jobs:
      while job.told < len(self._signals):
        job.process.send_signal(signal.SIGTERM)
        job.told += 1


class _Handlers:
  """Context manager that collects signals in a list. Ignored signals remain ignored (`nohup`)."""

  def __init__(self, noted: list[int]):
    self._noted, self._previous = noted, {}

  def __enter__(self) -> None:
    for number in SIGNALS:
      if signal.getsignal(number) is not signal.SIG_IGN:
        self._previous[number] = signal.signal(number, self._note)

  def __exit__(self, *_) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _note(self, number: int, _) -> None:
    self._noted.append(number)


def read_status(plan: Plan) -> dict[str, Status]:
  """Status of each run: its folder tells whether it finished, sweep.json why it did not."""
  path = plan.folder / 'sweep.json'
  stored = parse_json(path.read_text())['runs'] if path.exists() else []
  before = {entry['name']: entry for entry in stored}
  result = {}
  for run in plan.runs:
    entry = before.get(run.name, {})
    if run.folder.is_finished(run.config):
      result[run.name] = Status('finished')
    elif entry.get('status') == 'failed':
      result[run.name] = Status('failed', entry['exit_code'], entry['error'])
    else:
      result[run.name] = Status('unfinished' if run.folder.metrics.exists() else 'not started')
  return result


def write_status(plan: Plan, status: dict[str, Status]) -> None:
  """Writes sweep.json: the plan and the status of each run."""
  runs: list[dict[str, Any]] = [
    {
      'name': run.name,
      'overrides': {name: value for name, value in run.overrides.items() if name != 'name'},
      'command': ['python', '-m', 'mor_jax.train', *run.words],
      'status': status[run.name].state,
      'exit_code': status[run.name].exit_code,
      'error': status[run.name].error,
    }
    for run in plan.runs
  ]
  plan.folder.mkdir(parents=True, exist_ok=True)
  document = {'sweep': plan.sweep, 'config': plan.config, 'runs': runs}
  write_atomically(plan.folder / 'sweep.json', json.dumps(document, indent=2) + '\n')


def _lock(plan: Plan) -> IO[str]:
  """An open file that is locked until it is closed."""
  file = (plan.folder / 'sweep.lock').open('a')
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    file.close()
    raise RunError(
      f'another sweep is running in {plan.folder}; wait for it, or choose another --workdir'
    ) from None
  return file


def _tail(path: Path, start: int) -> str:
  """The last lines of a log, ignoring everything before offset `start`."""
  with path.open('rb') as file:
    file.seek(max(start, path.stat().st_size - TAIL_BYTES))
    lines = file.read().decode(errors='replace').splitlines()
  return '\n'.join([line for line in lines if line.strip()][-TAIL_LINES:])
