"""Kills trainings of two processes at random moments until each is done: python -m benchmarks.chaos [--runs=40]

Each run loses one process or both, by SIGKILL or SIGTERM, while it trains, writes a checkpoint or starts, some
of them twice, and is started again until it has finished. Checked: every start goes on behind the newest
finished checkpoint, no more steps are done again than promised, and the final state equals that of an
undisturbed run bit for bit. Then every kind of damage (damage.py) is done to the newest checkpoint of a run,
which must go on from the one before. Takes half an hour on two quiet cores.
Writes benchmarks/results/chaos.json and .md; interrupted, the same command goes on where it stopped.
"""

import functools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import numpy as np
from absl import flags
from etils import epath

from benchmarks import results
from benchmarks.damage import DAMAGE, newest
from mor_jax import cli
from mor_jax.checkpoints import integrity
from mor_jax.checkpoints.checkpoint import Checkpoints
from mor_jax.config import ModelConfig, TrainConfig
from mor_jax.model.transformer import Transformer
from mor_jax.parallel import mesh as mesh_lib
from mor_jax.runs.run_folder import RunFolder
from mor_jax.training.optimizer import make_optimizer
from mor_jax.training.state import TrainState, abstract_state, initializer

FLAGS = flags.FLAGS
flags.DEFINE_integer('runs', 40, 'runs that are killed')
flags.DEFINE_string(
  'scratch', '/tmp/mor_jax_chaos', 'folder for the runs; kept until the benchmark is complete'
)
flags.DEFINE_integer('seed', 0, 'of the moments and kinds of the kills')
flags.DEFINE_integer('parallel', 2, 'runs at the same time')

# A checkpoint is begun every 5 steps and finished at least every 6.
STEPS, EVERY, INTERVAL = 60, 5, 6
SETTINGS = {
  'data.tokenizer': 'bytes',
  'data.seq_len': 64,
  'data.max_documents': 40,
  'model.num_layers': 4,
  'model.num_recursions': 2,
  'model.d_model': 32,
  'model.num_heads': 2,
  'model.num_kv_heads': 1,
  'model.mlp_dim': 64,
  'model.dtype': 'float32',
  'train.steps': STEPS,
  'train.global_batch': 4,
  'train.warmup_steps': 4,
  'train.log_every': 1,
  'train.eval_every': 0,
  'train.eval_rows': 4,
  'train.sample_tokens': 0,
  'checkpoint.every_steps': EVERY,
  'checkpoint.max_unsaved_steps': INTERVAL,
}

# The command line of mor_jax.train, made slow enough to be hit, which notes its steps and marks its saves.
PROGRAM = """
import os, runpy, sys, time
from pathlib import Path
sys.modules['torch'] = None  # where it is installed, TensorBoard's writer would take seconds to import it
from mor_jax.data import loader
from mor_jax.checkpoints.checkpoint import Checkpoints

notes, process = Path(sys.argv[1]), sys.argv[2]
sys.argv = ['train', *sys.argv[3:]]
batches, save, finish = loader.train_batches, Checkpoints.save, Checkpoints._finish
marker = notes / f'saving.{process}'

def noted(*arguments, start_step, **options):
  with (notes / f'steps.{process}').open('a', buffering=1) as file:
    file.write(f'start {start_step}\\n')
    for step, batch in enumerate(batches(*arguments, start_step=start_step, **options), start_step + 1):
      time.sleep(0.03)
      file.write(f'step {step}\\n')
      yield batch

def marked_save(self, step, *arguments, **options):
  self._join()
  marker.write_text(str(step))
  save(self, step, *arguments, **options)

def marked_finish(self, *arguments):
  time.sleep(0.1)
  finish(self, *arguments)
  marker.unlink(missing_ok=True)

loader.train_batches, Checkpoints.save, Checkpoints._finish = noted, marked_save, marked_finish
runpy.run_module('mor_jax.train', run_name='__main__')
"""


class Run:
  """A training of two processes (or one), and its notes."""

  def __init__(self, name: str):
    self.folder = Path(FLAGS.scratch) / name
    self.notes = self.folder / 'notes'
    self.run = self.folder / 'run'
    self.notes.mkdir(parents=True, exist_ok=True)

  def start(self, processes: int = 2) -> list[subprocess.Popen]:
    """Starts the training command."""
    for marker in self.notes.glob('saving.*'):
      marker.unlink()
    with socket.socket() as free:
      free.bind(('localhost', 0))
      address = f'localhost:{free.getsockname()[1]}'
    settings = [f'--config.{name}={value}' for name, value in SETTINGS.items()]
    settings += [
      f'--config.data.cache_dir={FLAGS.scratch}/cache',
      f'--workdir={self.run}',
      '--config=configs/tiny.py',
    ]
    started = []
    for process in range(processes):
      command = [sys.executable, '-c', PROGRAM, str(self.notes), str(process), *settings]
      if processes > 1:
        command += [f'--coordinator={address}', f'--num_processes={processes}', f'--process_id={process}']
      log = (self.notes / f'log.{process}').open('ab')
      environment = os.environ | {'JAX_PLATFORMS': 'cpu'}
      started.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment))
    return started

  @property
  def finished(self) -> bool:
    """Whether the run has its result."""
    return (self.run / 'summary.json').exists()

  @property
  def good(self) -> int:
    """Step of the newest checkpoint whose files are all right, 0 without any."""
    steps = [int(path.name) for path in (self.run / 'checkpoints').glob('*') if path.name.isdigit()]
    folder = epath.Path(self.run / 'checkpoints')
    return max((step for step in steps if not integrity.problems(folder / str(step))), default=0)

  def starts(self, process: int = 0) -> list[list[int]]:
    """[step it started after, last step it took] of every start."""
    found = []
    path = self.notes / f'steps.{process}'
    for line in path.read_text().splitlines() if path.exists() else ():
      kind, _, step = line.partition(' ')
      if kind == 'start':
        found.append([int(step), int(step)])
      elif step.isdigit():
        found[-1][1] = int(step)
    return found

  def final_state(self) -> dict[str, np.ndarray]:
    """Everything in the last checkpoint, by path."""
    config = RunFolder(self.run).read_config()
    with Checkpoints(self.run / 'checkpoints', config.checkpoint, read_only=True) as checkpoints:
      assert checkpoints.newest_good() == STEPS
      state = checkpoints.restore(STEPS, shapes(config.model, config.train, config.data.seq_len))
    return {
      jax.tree_util.keystr(path): np.asarray(leaf)
      for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


@functools.cache
def shapes(model: ModelConfig, train: TrainConfig, seq_len: int) -> TrainState:
  """What the state of a run looks like."""
  mesh, optimizer = mesh_lib.make_mesh(), make_optimizer(train, model)
  return abstract_state(initializer(Transformer(model), optimizer, mesh, seq_len))


def wait(processes: list[subprocess.Popen], seconds: float = 300) -> list[int]:
  """Exit codes, once all have ended."""
  return [process.wait(timeout=seconds) for process in processes]


def disturb(run: Run, rng: random.Random, moment: str, start_seconds: float) -> dict:
  """Starts the run and kills one process or both; returns what was done and the result.

  Args:
    moment: 'start', 'save' or 'steps': when to kill.
    start_seconds: how long an undisturbed start takes until its first step.
  """
  before = run.good
  number, both = rng.choice([signal.SIGKILL, signal.SIGTERM]), rng.random() < 0.5
  victims = [0, 1] if both else [rng.randrange(2)]
  after = rng.randrange(EVERY, STEPS - EVERY)
  earlier = [len(run.starts(process)) for process in (0, 1)]
  processes = run.start()
  if moment == 'start':
    time.sleep(rng.uniform(0, start_seconds))
  else:
    hit = _until(run, processes, earlier[0], after, in_save=moment == 'save')
    assert hit, f'{run.folder} ended by itself: exit codes {wait(processes)}, see {run.notes}'
    time.sleep(rng.uniform(0, 0.08 if moment == 'save' else 0.3))
  inside = any((run.notes / f'saving.{process}').exists() for process in victims)
  for victim in victims:
    processes[victim].send_signal(number)
  begin = time.monotonic()
  codes = wait(processes)
  if number == signal.SIGKILL:  # it cannot have come out of the save: its marker is still there
    inside = inside and any((run.notes / f'saving.{process}').exists() for process in victims)
  own = [run.starts(process)[earlier[process] :] for process in (0, 1)]
  started = {start[0] for starts in own for start in starts} or {before}
  # A step takes both processes: one that is left alone may begin another, and cannot do it.
  reached = min(starts[0][1] for starts in own) if all(own) else before
  assert started == {before}, f'started after step {started}, the newest good checkpoint was {before}'
  return {
    'kind': f'{number.name} of {"both" if both else f"process {victims[0]}"}',
    'moment': moment,
    'inside_save': inside,
    'started_after': before,
    'killed_at': reached if all(own) else 'no step',
    'newest': run.good,
    'repeated': max(0, reached - run.good),
    'exit_codes': codes,
    'seconds_to_end': round(time.monotonic() - begin, 1),
  }


def _until(run: Run, processes: list[subprocess.Popen], earlier: int, step: int, in_save: bool) -> bool:
  """Returns when the start after the `earlier` ones has got to the step, or to a save behind it.

  False if it ended before.
  """
  while all(process.poll() is None for process in processes):
    own = run.starts()[earlier:]
    reached = own and own[0][1] >= min(step, own[0][0] + 2 * EVERY)
    if reached and (not in_save or any(run.notes.glob('saving.*'))):
      return True
    time.sleep(0.01)
  return False


def complete(run: Run, processes: int = 2) -> int:
  """Starts the run until it has finished; returns the step it went on after."""
  for _ in range(5):
    before = run.good
    earlier = len(run.starts())
    codes = wait(run.start(processes))
    assert len(run.starts()) > earlier, f'{run.folder} did not start: exit codes {codes}, see {run.notes}'
    assert run.starts()[-1][0] == before, f'went on after {run.starts()[-1][0]}, not {before}'
    if run.finished:
      return before
  raise SystemExit(f'{run.folder} does not finish: exit codes {codes}, see {run.notes}')


def moments(number: int) -> list[str]:
  """When the run of this number is killed: half of the runs inside a save, some twice, some while they start."""
  first = ['save', 'steps', 'save', 'start'][number % 4]
  return [first, 'steps', 'save'][: 1 if number % 4 else 2]


def endure(number: int, expected: dict[str, np.ndarray], start_seconds: float) -> dict:
  """Kills a run until it is done; the record of what happened, which is kept beside it."""
  run = Run(f'run-{number:02d}')
  record = run.folder / 'record.json'
  if not record.exists():
    shutil.rmtree(run.folder)
    run = Run(run.folder.name)
    rng = random.Random(f'{FLAGS.seed} {number}')
    kills = [disturb(run, rng, moment, start_seconds) for moment in moments(number)]
    went_on = complete(run)
    assert went_on == kills[-1]['newest']
    with _COMPARING:
      equal = same(run.final_state(), expected)
    record.write_text(json.dumps({'kills': kills, 'went_on_after': went_on, 'equal': equal}))
  entry = json.loads(record.read_text())
  print(f'run {number}: {[kill["kind"] for kill in entry["kills"]]}, equal {entry["equal"]}', flush=True)
  return entry


def undisturbed() -> tuple[Run, float]:
  """The run that nothing happens to, and the seconds that a start took until its first step."""
  run = Run('undisturbed')
  record = run.notes / 'start_seconds'
  if not run.finished:
    begin = time.monotonic()
    processes = run.start()
    while not run.starts() and all(process.poll() is None for process in processes):
      time.sleep(0.05)
    record.write_text(str(time.monotonic() - begin))
    wait(processes)
    assert run.finished, f'see {run.notes}'
  return run, float(record.read_text())


def main() -> None:
  """Runs, checks and writes the tables."""
  reference, start_seconds = undisturbed()
  expected = reference.final_state()
  with ThreadPoolExecutor(FLAGS.parallel) as pool:
    entries = list(pool.map(lambda number: endure(number, expected, start_seconds), range(FLAGS.runs)))
  rows = [
    [number, *(kill[name] for name in COLUMNS.values()), entry['went_on_after'], entry['equal']]
    for number, entry in enumerate(entries)
    for kill in entry['kills']
  ]
  kills = [kill for entry in entries for kill in entry['kills']]
  settings = {
    'steps': STEPS,
    'a checkpoint is begun every': EVERY,
    'and finished at least every': INTERVAL,
    'runs': len(entries),
    'kills': len(kills),
    'kills inside a save': sum(kill['inside_save'] for kill in kills),
    'kills while starting': sum(kill['moment'] == 'start' for kill in kills),
    'most steps repeated': max(kill['repeated'] for kill in kills),
    'all final states equal bit for bit': all(entry['equal'] for entry in entries),
  }
  print(results.keep('chaos', ['run', *COLUMNS, 'run went on after', 'equal'], rows, settings))
  damaged = [[name, *damage(name, reference, expected)] for name in DAMAGE]
  survived = {'steps': STEPS, 'survived': f'{sum(row[-1] for row in damaged)} of {len(damaged)}'}
  print(results.keep('damage', ['damage', 'newest', 'went on after', 'equal'], damaged, survived))
  for name, value in (settings | survived).items():
    print(f'{name}: {value}')
  shutil.rmtree(FLAGS.scratch)


_COMPARING = threading.Lock()
COLUMNS = {
  'kill': 'kind',
  'moment': 'moment',
  'inside a save': 'inside_save',
  'started after': 'started_after',
  'killed at': 'killed_at',
  'newest finished': 'newest',
  'steps repeated': 'repeated',
  'exit codes': 'exit_codes',
  'seconds until all had ended': 'seconds_to_end',
}


def damage(name: str, reference: Run, expected: dict[str, np.ndarray]) -> tuple[int, int, bool]:
  """(newest checkpoint, step the run went on after, whether the result is the same) for a kind of damage."""
  run = Run(f'damage-{name.replace(" ", "-")}')
  shutil.rmtree(run.run, ignore_errors=True)
  shutil.copytree(reference.run, run.run)
  (run.run / 'summary.json').unlink()
  hurt = newest(run.run / 'checkpoints')
  DAMAGE[name](run.run / 'checkpoints')
  went_on = complete(run)
  print(f'damage {name}: newest {hurt.name}, went on after {went_on}')
  return int(hurt.name), went_on, went_on < int(hurt.name) and same(run.final_state(), expected)


def same(state: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
  """Whether two states are equal bit for bit."""
  return state.keys() == expected.keys() and all(
    leaf.tobytes() == expected[path].tobytes() for path, leaf in state.items()
  )


if __name__ == '__main__':
  cli.run(main, __doc__, with_config=False)
