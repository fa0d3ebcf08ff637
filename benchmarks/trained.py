"""Shared by the studies: trains the runs of a plan, and evaluates them, each once."""

import json
import subprocess
import sys
from typing import Any

from rich.console import Console

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


def evaluate(run: PlannedRun, *flags: str, name: str = 'evaluation') -> dict[str, Any]:
  """The result of `python -m mor_jax.evaluate` with these flags, kept as NAME.json of the run; made if it is missing."""
  path = run.folder.path / f'{name}.json'
  if not path.exists():
    command = [
      sys.executable,
      '-m',
      'mor_jax.evaluate',
      f'--checkpoint={run.folder.path}',
      f'--output={path}',
    ]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)
    if done.returncode:
      raise RunError(f'evaluation of {run.name} failed: {done.stderr[-2000:]}')
  return json.loads(path.read_text())
