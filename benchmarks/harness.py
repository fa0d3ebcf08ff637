"""Scores of a Llama checkpoint through our class for lm-evaluation-harness and through the harness's own.

    python -m mor_jax.convert --checkpoint=SMOLLM2 --output=RUN
    python -m benchmarks.harness --model=SMOLLM2 --run=RUN --include_path=TASKS --tasks=local_lambada,local_hellaswag

SMOLLM2 is the folder of the checkpoint as Hugging Face has it, TASKS a folder with YAML files of tasks. Each
side runs in processes of its own, in alternation: in float32, with the same documents, batch size and number
of threads. Their log-likelihoods are compared one by one, and requests per second measured from the tokenised
requests to their scores, after a pass over a few documents that warms up; and, apart from that, what
compiling costs. Needs requirements-parity.txt, `pip install lm_eval accelerate`. Writes benchmarks/results/harness.*.
"""

import json
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
from mor_jax.config import ConfigError

FLAGS = flags.FLAGS
flags.DEFINE_string('model', None, 'folder of the checkpoint, for the Hugging Face class')
flags.DEFINE_string('run', None, 'folder that mor_jax.convert made of it')
flags.DEFINE_list('tasks', None, 'tasks to compare')
flags.DEFINE_string('include_path', None, 'folder with YAML files of tasks')
flags.DEFINE_integer('limit', 200, 'documents of each task')
flags.DEFINE_integer('batch_size', 8, 'texts computed together, by both')
flags.DEFINE_integer('repeats', 2, 'processes of each side, in alternation')
flags.DEFINE_enum('side', None, ['ours', 'theirs'], 'internal: one measurement, written to --output')
flags.DEFINE_string('output', None, 'internal: file for the measurement')

LARGEST_DIFFERENCE = 1e-2
WARM_UP = 4  # documents


def main() -> int:
  """Compares, writes the table; 1 if a goal is missed."""
  if FLAGS.side:
    Path(FLAGS.output).write_text(json.dumps(measure()))
    return 0
  for name in ('model', 'run', 'tasks'):
    if not FLAGS[name].value:
      raise ConfigError(f'--{name} is missing (--help shows an example)')
  measured: dict[str, list[dict]] = {'ours': [], 'theirs': []}
  for _ in range(FLAGS.repeats):
    for side, found in measured.items():
      found.append(in_a_process(side))
      speeds = ', '.join(
        f'{name} {task["requests_per_second"]:.2f}' for name, task in found[-1]['tasks'].items()
      )
      print(f'{side}: requests/s: {speeds}', flush=True)
  rows, met = [], True
  for task in FLAGS.tasks:
    ours, theirs = ([one['tasks'][task] for one in measured[side]] for side in ('ours', 'theirs'))
    differences = np.abs(np.subtract(ours[0]['scores'], theirs[0]['scores']))
    speeds = [statistics.median(one['requests_per_second'] for one in side) for side in (ours, theirs)]
    accuracies = [
      {
        name: value
        for name, value in side[0]['results'].items()
        if name.startswith('acc') and 'stderr' not in name
      }
      for side in (ours, theirs)
    ]
    same = accuracies[0] == accuracies[1]
    met &= bool(differences.max() <= LARGEST_DIFFERENCE) and same and speeds[0] >= speeds[1]
    shown = [
      '; '.join(f'{name.split(",")[0]} {value:.4f}' for name, value in side.items()) for side in accuracies
    ]
    rows.append(
      [task, len(differences), f'{differences.max():.1e}', *shown]
      + [f'{speed:.2f}' for speed in speeds]
      + [f'{speeds[0] / speeds[1]:.2f}']
    )
  columns = ['task', 'requests', 'largest difference, nats', 'ours', 'lm-eval HFLM']
  columns += ['ours, requests/s', 'HFLM, requests/s', 'ratio']
  settings = {
    'documents': FLAGS.limit,
    'batch size': FLAGS.batch_size,
    'dtype': 'float32',
    'measured': f'median of {FLAGS.repeats} processes of each side, in alternation, compiled and warmed up before',
    'compiling and first pass, s': ', '.join(f'{one["first_pass_seconds"]:.1f}' for one in measured['ours']),
  }
  raw = {side: [strip(one) for one in found] for side, found in measured.items()}
  print(results.keep('harness', columns, rows, settings, measurements=raw))
  return 0 if met else 1


def strip(measurement: dict[str, Any]) -> dict[str, Any]:
  """Without the scores of single requests."""
  tasks = {
    name: {key: value for key, value in task.items() if key != 'scores'}
    for name, task in measurement['tasks'].items()
  }
  return {**measurement, 'tasks': tasks}


def in_a_process(side: str) -> dict[str, Any]:
  """What `measure` returns in a process of its own."""
  with tempfile.TemporaryDirectory() as folder:
    output = Path(folder) / 'measured.json'
    forwarded = [
      f'--{name}={FLAGS[name].value}' for name in ('model', 'run', 'include_path', 'limit', 'batch_size')
    ]
    forwarded = [flag for flag in forwarded if not flag.endswith('=None')]
    program = [sys.executable, '-m', 'benchmarks.harness', f'--tasks={",".join(FLAGS.tasks)}', *forwarded]
    subprocess.run([*program, f'--side={side}', f'--output={output}'], check=True)
    return json.loads(output.read_text())


def measure() -> dict[str, Any]:
  """Scores of every request in order, results and requests per second of every task, for one side."""
  from mor_jax.evaluation import few_shot

  few_shot.prepare()
  manager = few_shot.load(FLAGS.tasks, FLAGS.include_path)
  model = ours() if FLAGS.side == 'ours' else theirs()
  stopwatch = Stopwatch(model)
  begin = time.perf_counter()
  if FLAGS.side == 'ours':
    few_shot.run(model, FLAGS.tasks, manager, limit=FLAGS.limit, bootstrap_iters=0)  # every shape once
  else:
    few_shot.run(model, FLAGS.tasks, manager, limit=WARM_UP, bootstrap_iters=0)
  first_pass = time.perf_counter() - begin
  measured = {}
  for task in FLAGS.tasks:
    stopwatch.restart()
    manager = few_shot.load([task], FLAGS.include_path)
    found = few_shot.run(model, [task], manager, limit=FLAGS.limit, bootstrap_iters=0)
    measured[task] = {
      'results': found['results'][task],
      'scores': stopwatch.scores,
      'requests_per_second': len(stopwatch.scores) / stopwatch.seconds,
    }
  return {'first_pass_seconds': first_pass, 'tasks': measured}


class Stopwatch:
  """Measures a model's scoring of tokenised requests, and keeps the scores in the order of the requests."""

  def __init__(self, model: Any):
    self._score = model._loglikelihood_tokens
    model._loglikelihood_tokens = self._measured
    self.restart()

  def restart(self) -> None:
    """Begins anew."""
    self.seconds, self.scores = 0.0, []

  def _measured(self, requests, **options):
    begin = time.perf_counter()
    found = self._score(requests, **options)
    self.seconds += time.perf_counter() - begin
    self.scores += [float(score) for score, _ in found]
    return found


def ours() -> Any:
  """Our class."""
  import dataclasses

  from mor_jax.evaluation.harness import HarnessModel
  from mor_jax.model.transformer import Transformer
  from mor_jax.training.restore import load_run

  run = load_run(FLAGS.run)
  config = run.config.replace(model={'dtype': 'float32'})
  run = dataclasses.replace(run, config=config, model=Transformer(config.model))
  cli.use_compilation_cache(config)
  return HarnessModel(run, FLAGS.batch_size)


def theirs() -> Any:
  """The harness's class for models of Hugging Face."""
  from lm_eval.models.huggingface import HFLM

  return HFLM(pretrained=FLAGS.model, device='cpu', dtype='float32', batch_size=FLAGS.batch_size)


if __name__ == '__main__':
  cli.run(main, __doc__, with_config=False)
