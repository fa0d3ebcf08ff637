"""Compares our lm-evaluation-harness class with the harness's own on a Llama checkpoint: scores and speed.

    python -m mor_jax.convert --checkpoint=SMOLLM2 --output=RUN
    python -m benchmarks.harness --model=SMOLLM2 --run=RUN --include_path=TASKS --tasks=local_lambada,local_hellaswag

SMOLLM2 is a checkpoint folder in Hugging Face's format, TASKS a folder with YAML task files. Both sides
compute in float32 with the same documents, batch size and number of threads. Every measurement runs in its own
process. First each side scores --limit documents of every task, and the log-likelihoods are compared one by
one. Then the sides alternate on the first --timed documents. This measures requests per second, from tokenised
requests to their scores, after a short warm-up and with our compiled programs in the cache. One more
measurement starts with an empty cache. --keep=FOLDER stores the measurements, and a second run reuses them.

Needs requirements-parity.txt and `pip install lm_eval accelerate`. Writes benchmarks/results/harness.*.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from benchmarks import results
from mor_jax import cli
from mor_jax.config import ConfigError, with_changes

FLAGS = flags.FLAGS
flags.DEFINE_string('model', None, 'folder of the checkpoint, for the Hugging Face class')
flags.DEFINE_string('run', None, 'folder that mor_jax.convert made of it')
flags.DEFINE_list('tasks', None, 'tasks to compare')
flags.DEFINE_string('include_path', None, 'folder with YAML files of tasks')
flags.DEFINE_integer('limit', 200, 'documents of each task whose scores are compared')
flags.DEFINE_integer('timed', 32, 'documents of each task in measurements of speed')
flags.DEFINE_integer('batch_size', 8, 'texts computed together, by both')
flags.DEFINE_integer('repeats', 2, 'measurements of speed of each side')
flags.DEFINE_string('keep', None, 'folder for the measurements')
flags.DEFINE_enum('side', None, ['ours', 'theirs'], 'internal: one measurement, written to --output')
flags.DEFINE_string('output', None, 'internal: file for the measurement')

LARGEST_DIFFERENCE = 1e-2
WARM_UP = 4  # documents


def main() -> int:
  """Compares both sides and writes the table; returns 1 if a goal is missed."""
  if FLAGS.side:
    Path(FLAGS.output).write_text(json.dumps(measure()))
    return 0
  for name in ('model', 'run', 'tasks'):
    if not FLAGS[name].value:
      raise ConfigError(f'--{name} is missing (--help shows an example)')
  with tempfile.TemporaryDirectory() as folder:
    folder = Path(FLAGS.keep or folder)
    scores = {
      side: in_a_process(side, folder / f'{side}-scores.json', FLAGS.limit) for side in ('ours', 'theirs')
    }
    speeds = {'ours': [], 'theirs': []}
    for number in range(FLAGS.repeats):
      for side, found in speeds.items():
        found.append(in_a_process(side, folder / f'{side}-speed-{number}.json', FLAGS.timed))
    cold = in_a_process('ours', folder / 'ours-cold.json', FLAGS.timed, cold=True)
  return report(scores, speeds, cold)


def report(scores: dict[str, dict], speeds: dict[str, list[dict]], cold: dict) -> int:
  """Writes and prints the table; returns 1 if a goal is missed."""
  rows, met = [], True
  for task in FLAGS.tasks:
    both = [scores[side]['tasks'][task] for side in ('ours', 'theirs')]
    differences = np.abs(np.subtract(*(one['scores'] for one in both)))
    ours, theirs = (
      statistics.median(one['tasks'][task]['requests_per_second'] for one in speeds[side]) for side in speeds
    )
    accuracies = [accuracy(one['results']) for one in both]
    met &= bool(differences.max() <= LARGEST_DIFFERENCE) and accuracies[0] == accuracies[1] and ours >= theirs
    first = cold['tasks'][task]['requests_per_second']
    numbers = [f'{value:.2f}' for value in (ours, theirs, ours / theirs, first)]
    rows.append([task, len(differences), f'{differences.max():.1e}', *accuracies, *numbers])
  columns = ['task', 'requests', 'largest difference, nats', 'ours', 'HFLM']
  columns += ['ours, requests/s', 'HFLM, requests/s', 'ratio', 'ours, cache empty, requests/s']
  settings = {
    'documents': f'{FLAGS.limit} of each task compared, the first {FLAGS.timed} timed',
    'batch size': FLAGS.batch_size,
    'dtype': 'float32',
    'speed': f'median of {FLAGS.repeats} processes of each side in alternation; HFLM is that of lm_eval',
  }
  raw = {'scores': scores, 'speeds': speeds, 'cold': cold}
  print(results.keep('harness', columns, rows, settings, measurements=strip(raw)))
  return 0 if met else 1


def accuracy(found: dict[str, Any]) -> str:
  """The accuracies in a task's results, as text."""
  names = ('acc,none', 'acc_norm,none')
  return '; '.join(f'{name.split(",")[0]} {found[name]:.4f}' for name in names if name in found)


def strip(value: Any) -> Any:
  """The measurements without the scores of single requests."""
  if isinstance(value, dict):
    return {
      name: strip(part) for name, part in value.items() if not (name == 'scores' and isinstance(part, list))
    }
  return [strip(part) for part in value] if isinstance(value, list) else value


def in_a_process(side: str, output: Path, limit: int, cold: bool = False) -> dict[str, Any]:
  """Runs `measure` in its own process, or reads its result if the file exists."""
  if not output.exists():
    forwarded = {name: FLAGS[name].value for name in ('model', 'run', 'include_path', 'batch_size')}
    given = [f'--{name}={value}' for name, value in forwarded.items() if value is not None]
    program = [sys.executable, '-m', 'benchmarks.harness', f'--tasks={",".join(FLAGS.tasks)}', *given]
    with tempfile.TemporaryDirectory() as empty:
      environment = os.environ | ({'JAX_COMPILATION_CACHE_DIR': empty} if cold else {})
      command = [*program, f'--limit={limit}', f'--side={side}', f'--output={output}']
      subprocess.run(command, check=True, env=environment)
  found = json.loads(output.read_text())
  speeds = ', '.join(f'{name} {task["requests_per_second"]:.2f}' for name, task in found['tasks'].items())
  print(f'{output.stem}: requests/s: {speeds}', flush=True)
  return found


def measure() -> dict[str, Any]:
  """Measures one side: per task, its results, the scores of all requests in order, and requests per second."""
  from mor_jax.evaluation import few_shot

  few_shot.prepare()
  managers = {task: few_shot.load([task], FLAGS.include_path) for task in FLAGS.tasks}
  model = ours() if FLAGS.side == 'ours' else theirs()
  stopwatch, measured = Stopwatch(model), {}
  for task, manager in managers.items():
    few_shot.run(model, [task], manager, limit=WARM_UP, bootstrap_iters=0)
    stopwatch.restart()
    found = few_shot.run(model, [task], manager, limit=FLAGS.limit, bootstrap_iters=0)
    measured[task] = {
      'results': found['results'][task],
      'scores': list(stopwatch.scores),  # the next task's warm-up adds to it
      'requests_per_second': len(stopwatch.scores) / stopwatch.seconds,
    }
  return {'tasks': measured}


class Stopwatch:
  """Times a model's scoring of tokenised requests and keeps the scores in request order."""

  def __init__(self, model: Any):
    self._score = model._loglikelihood_tokens
    model._loglikelihood_tokens = self._measured
    self.restart()

  def restart(self) -> None:
    """Resets time and scores."""
    self.seconds, self.scores = 0.0, []

  def _measured(self, requests, **options):
    begin = time.perf_counter()
    found = self._score(requests, **options)
    self.seconds += time.perf_counter() - begin
    self.scores += [float(score) for score, _ in found]
    return found


def ours() -> Any:
  """Our harness class, in float32."""
  import dataclasses

  from mor_jax.evaluation.harness import HarnessModel
  from mor_jax.model.transformer import Transformer
  from mor_jax.runs.restore import load_run

  run = load_run(FLAGS.run)
  config = with_changes(run.config, model={'dtype': 'float32'})
  run = dataclasses.replace(run, config=config, model=Transformer(config.model))
  cli.use_compilation_cache(config)
  return HarnessModel(run, FLAGS.batch_size)


def theirs() -> Any:
  """The harness's own class for Hugging Face models."""
  from lm_eval.models.huggingface import HFLM

  return HFLM(pretrained=FLAGS.model, device='cpu', dtype='float32', batch_size=FLAGS.batch_size)


if __name__ == '__main__':
  cli.run(main, __doc__, with_config=False)
