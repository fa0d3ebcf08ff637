"""Start-up time: imports, and the README's training command up to its first step.

  python -m benchmarks.startup [--rounds=3] [--config_file=configs/tiny.py]

Each import is timed in its own process, after importing jax, which is not counted. The training command runs
twice, each time up to its first step: cold, with an empty cache, so that it prepares the dataset and compiles; and
warm, with a new run folder but the cache of the first. Its output marks the phases. The table shows medians.
Writes benchmarks/results/startup.json and .md.
"""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import flags
from rich.console import Console

from benchmarks import results
from mor_jax import cli

FLAGS = flags.FLAGS
flags.DEFINE_integer('rounds', 3, 'repetitions of everything')
flags.DEFINE_string('config_file', 'configs/tiny.py', 'what is trained')

IMPORTS = {'mor_jax': 1.0, 'mor_jax.model.transformer': 1.0, 'mor_jax.train': None}  # goals in seconds
GOALS = {'cold': 25.0, 'warm': 12.0}
# What a run prints when a phase of its start has ended, in order.
PHASES = {
  'imports, settings': 'preparing the dataset',
  'dataset': '  devices ',
  'tracing, compiling': '  compiled ',
  'state, first step': 'step ',
}

_IMPORT = """
import time
import jax
begin = time.perf_counter()
import {module}
print(time.perf_counter() - begin)
"""


def main() -> None:
  """Measures and writes the table."""
  rows = [_import(module, goal) for module, goal in IMPORTS.items()]
  starts = {'cold': [], 'warm': []}
  for _ in range(FLAGS.rounds):
    with tempfile.TemporaryDirectory() as cache:
      for name, taken in starts.items():
        taken.append(_start(Path(cache), name))
  for name, taken in starts.items():
    whole = statistics.median(sum(phases.values()) for phases in taken)
    rows.append([f'first step, {name}', f'{whole:.1f}', f'{GOALS[name]:.0f}'])
    for phase in taken[0]:
      seconds = statistics.median(phases[phase] for phases in taken)
      rows.append([f'first step, {name}: {phase}', f'{seconds:.1f}', ''])
  used = {'rounds': FLAGS.rounds, 'run': FLAGS.config_file}
  table = results.keep('startup', ('what', 'seconds', 'goal'), rows, used)
  Console().print(table, highlight=False, soft_wrap=True)


def _import(module: str, goal: float | None) -> list:
  """The table row of a module."""
  seconds = []
  for _ in range(FLAGS.rounds + 1):  # the first may write bytecode
    command = [sys.executable, '-c', _IMPORT.format(module=module)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds.append(float(ended.stdout))
  median = statistics.median(seconds[1:])
  return [f'import {module}, beyond jax', f'{median:.2f}', '' if goal is None else f'{goal:.0f}']


def _start(cache: Path, name: str) -> dict[str, float]:
  """Seconds of every start-up phase, beginning with the command."""
  command = [
    sys.executable,
    '-m',
    'mor_jax.train',
    f'--config={FLAGS.config_file}',
    f'--workdir={cache / name}',
    f'--config.data.cache_dir={cache / "cache"}',
  ]
  begin, seconds, phases = time.perf_counter(), {}, list(PHASES.items())
  environment = {**os.environ, 'PYTHONUNBUFFERED': '1'}
  with subprocess.Popen(
    command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
  ) as run:
    printed = []
    for line in run.stdout:
      printed.append(line)
      reached = next((number for number, (_, sign) in enumerate(phases) if line.startswith(sign)), None)
      if reached is not None:  # phases that printed nothing took no time of their own
        now = time.perf_counter()
        seconds[phases[reached][0]], begin = now - begin, now
        phases = phases[reached + 1 :]
      if not phases:
        break
    run.send_signal(signal.SIGKILL)
  if phases:
    raise RuntimeError(f'{" ".join(command)} took no step:\n{"".join(printed)}')
  return seconds


if __name__ == '__main__':
  cli.run(main, __doc__, with_config=False)
