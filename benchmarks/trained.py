"""Shared by the studies: trains the runs of a plan, and evaluates them, each once."""

import dataclasses
import json
import os
import queue
import subprocess
import sys
from collections.abc import Sequence
from concurrent import futures
from typing import Any

from rich.console import Console
from rich.progress import Progress

from mor_jax.errors import RunError
from mor_jax.sweeping.plan import Plan, PlannedRun
from mor_jax.sweeping.runner import Runner
from mor_jax.sweeping.status import Display


def train(made: Plan, console: Console, parallel: int) -> Runner:
  """Trains what has not finished yet, so many runs at a time; the runner knows the status of each.

  Raises:
    RunError: a run failed, or a signal stopped them.
  """
  runner = Runner(made, Display(console, made), parallel)
  if runner.run():
    raise RunError('stopped; the same command goes on')
  failed = [run for run in made.runs if runner.status[run.name].state != 'finished']
  if failed:
    raise RunError(f'{failed[0].name} failed: {runner.status[failed[0].name].error}')
  return runner


@dataclasses.dataclass(frozen=True)
class Measurement:
  """Something to be found out about a run once.

  Attributes:
    name: of its file in the run's folder, NAME.json.
    flags: of the command, besides --checkpoint.
    command: what finds it out; --output=FILE says where to, unless it knows.
  """

  run: PlannedRun
  name: str = 'evaluation'
  flags: tuple[str, ...] = ()
  command: str = 'mor_jax.evaluate'


def measure(wanted: Measurement, cores: set[int] | None = None) -> dict[str, Any]:
  """What was found out, now if it is missing.

  Args:
    cores: that the command may use; None: all.

  Raises:
    RunError: the command failed.
  """
  path = wanted.run.folder.path / f'{wanted.name}.json'
  if not path.exists():
    flags = [f'--checkpoint={wanted.run.folder.path}', *wanted.flags]
    if wanted.command == 'mor_jax.evaluate':
      flags.append(f'--output={path}')
    process = subprocess.Popen(
      [sys.executable, '-m', wanted.command, *flags],
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
    )
    if cores:
      os.sched_setaffinity(process.pid, cores)
    _, errors = process.communicate()
    if process.returncode:
      raise RunError(f'{wanted.command} of {wanted.run.name} failed: {errors[-2000:]}')
  return json.loads(path.read_text())


def measure_all(wanted: Sequence[Measurement], parallel: int, console: Console) -> list[dict[str, Any]]:
  """What was found out by each, so many at a time, each on its share of the cores."""
  shares: queue.SimpleQueue[set[int]] = queue.SimpleQueue()
  cores = sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else []
  share = len(cores) // parallel
  for place in range(parallel):
    shares.put(set(cores[place * share : (place + 1) * share]))

  def one(item: Measurement) -> dict[str, Any]:
    mine = shares.get()
    try:
      return measure(item, mine)
    finally:
      shares.put(mine)

  with futures.ThreadPoolExecutor(parallel) as pool, Progress(console=console) as progress:
    return list(progress.track(pool.map(one, wanted), len(wanted), description='measuring'))
