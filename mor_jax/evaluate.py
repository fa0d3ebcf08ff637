"""Evaluates a trained model on held-out text: python -m mor_jax.evaluate --checkpoint=runs/tiny-mor

Loss, perplexity and bits per byte under top-k routing, as in training, and under threshold routing, which is
causal, and the gap between them; by recursion limit; by position; and what the routers did. The result is
also written to RUN/evaluation.json.

--exits looks at the recursions one by one: what the model says after each of them, with controls and a temperature
(docs/evaluation.md), what routers thought of going on against what it was worth, and how much of their scores token and
position explain. --contrast=0.5 adds contrast decoding, --router=random|all|confidence|oracle evaluates the same weights
with depths that are chosen otherwise. Of data that know how hard their tokens are (data.source=synthetic:...) all is
also told by difficulty.

With --tasks=lambada_openai,hellaswag the tasks of lm-evaluation-harness are run instead, or those that YAML
files in a folder of your own describe (--include_path): python -m mor_jax.evaluate --checkpoint=runs/tiny-mor
--tasks=my_task --include_path=tasks --num_fewshot=5. The result is in the harness's own form, RUN/few_shot.json.
"""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
from absl import flags
from rich.console import Console

from mor_jax import cli
from mor_jax.cli import weights as weight_flags
from mor_jax.config import ConfigError, with_changes
from mor_jax.console import open_console, print_line
from mor_jax.data import loader
from mor_jax.evaluation import choosers, exits, few_shot, held_out, tables
from mor_jax.evaluation.follow import Follow
from mor_jax.files import write_atomically
from mor_jax.model.transformer import Transformer
from mor_jax.parallel import mesh as mesh_lib
from mor_jax.runs.restore import LoadedRun, load_run

FLAGS = flags.FLAGS
ONLY_TASKS = ('include_path', 'num_fewshot', 'limit', 'routing', 'max_len', 'prefix_token', 'use_cache')
NOT_TASKS = ('data', 'data_format', 'rows', 'exits', 'contrast', 'router', 'mean_depth')


def define_flags() -> None:
  """Defines the flags of this command."""
  cli.define_checkpoint()
  flags.DEFINE_integer('step', None, 'step of the checkpoint; default: the newest')
  flags.DEFINE_string(
    'data',
    None,
    'folder of a prepared dataset, or documents as in data.source, all of which are measured; default: the validation '
    'split of the run',
  )
  flags.DEFINE_enum(
    'data_format', None, ['text', 'chat'], 'form of the documents of --data; default: data.format of the run'
  )
  flags.DEFINE_integer(
    'rows', None, 'validation rows to use, 0: all; default: train.eval_rows of the run, of --data all'
  )
  flags.DEFINE_integer('batch_size', None, 'rows computed together; default: 8 for each device')
  flags.DEFINE_enum(
    'dtype', None, ['float32', 'bfloat16'], 'of activations and matrix products; default: as trained'
  )
  weight_flags.define_flags()
  flags.DEFINE_boolean('exits', None, 'look at the recursions one by one')
  flags.DEFINE_list('contrast', None, '--exits: weights w of contrast decoding, z_R + w (z_R - z_1)')
  flags.DEFINE_enum(
    'router',
    None,
    choosers.CHOOSERS,
    "how depths are chosen in place of the model's own ways: by lot, all recursions, by the confidence of the readout "
    '(fitted on the other half of the rows), or by hindsight (optimistic)',
  )
  flags.DEFINE_float(
    'mean_depth',
    None,
    '--router=confidence: recursions of a token in the mean; default: as the capacities say',
  )
  flags.DEFINE_boolean('json', False, 'print the result as JSON, everything else to stderr')
  flags.DEFINE_string(
    'output',
    None,
    'file for the result; default: evaluation.json, evaluation_data.json with --data, evaluation_ROUTER.json with '
    '--router, or few_shot.json with --tasks, in the run folder',
  )
  flags.DEFINE_list('tasks', None, 'tasks of lm-evaluation-harness to run')
  flags.DEFINE_string('include_path', None, '--tasks: folder with YAML files of more tasks')
  flags.DEFINE_integer(
    'num_fewshot', None, '--tasks: examples before each question; default: as the task says'
  )
  flags.DEFINE_float('limit', None, '--tasks: examples of each task to use, below 1 a share of them')
  flags.DEFINE_enum(
    'routing',
    None,
    ['threshold', 'topk'],
    '--tasks: threshold, which is causal, or topk, which looks at the whole text; default: threshold',
  )
  flags.DEFINE_integer('max_len', None, '--tasks: longest text in tokens; default: data.seq_len of the run')
  flags.DEFINE_string(
    'prefix_token', None, '--tasks: token before a text without context; default: data.separator of the run'
  )
  flags.DEFINE_string('use_cache', None, '--tasks: file in which the harness keeps answers for the next time')


def main() -> None:
  """Evaluates, prints and writes. Raises ConfigError for flags that cannot work."""
  _check_flags()
  if FLAGS.tasks:
    few_shot.prepare()
    tasks = few_shot.load(FLAGS.tasks, FLAGS.include_path)  # before the checkpoint, which may be large
  console = open_console(stderr=FLAGS.json)
  run = _load(console)
  result = _few_shot(run, tasks) if FLAGS.tasks else _held_out(console, run)
  output = Path(FLAGS.output) if FLAGS.output else run.folder.path / _name()
  _write(output, result)
  if FLAGS.json:
    print(json.dumps(result))
  elif FLAGS.tasks:
    tables.print_few_shot(console, result)
  else:
    tables.print_held_out(console, result)
  print_line(console, f'written to {output}')


def _name() -> str:
  """The file of a result. Only that of the run's own text and router is what reports tell of the run."""
  if FLAGS.tasks:
    return 'few_shot.json'
  parts = ['evaluation', *(['data'] if FLAGS.data else []), *([FLAGS.router] if FLAGS.router else [])]
  return f'{"_".join(parts)}.json'


def _check_flags() -> None:
  cli.require_checkpoint()
  weight_flags.check_flags()
  cli.check_least(rows=0, batch_size=1, step=0, num_fewshot=0, max_len=2)
  if FLAGS.mean_depth is not None and (FLAGS.router != 'confidence' or FLAGS.mean_depth < 1):
    raise ConfigError(f'--mean_depth={FLAGS.mean_depth:g} is for --router=confidence, and at least 1')
  if FLAGS.data_format and not FLAGS.data:
    raise ConfigError(f'--data_format={FLAGS.data_format} is the form of --data, which is not given')
  if FLAGS.contrast and not FLAGS.exits:
    raise ConfigError(f'--contrast={",".join(FLAGS.contrast)} is for --exits, which is not given')
  for name in NOT_TASKS if FLAGS.tasks else ONLY_TASKS:
    if FLAGS[name].value is not None:
      given = 'is not used with --tasks' if FLAGS.tasks else 'is for --tasks, which is not given'
      raise ConfigError(f'--{name}={FLAGS[name].value} {given}; leave one of them out')
  if FLAGS.limit is not None and FLAGS.limit <= 0:
    raise ConfigError(f'--limit={FLAGS.limit:g} is not allowed: must be > 0')
  if FLAGS.limit is not None and FLAGS.limit > 1 and FLAGS.limit != int(FLAGS.limit):
    raise ConfigError(f'--limit={FLAGS.limit:g} is not allowed: above 1 it must be a whole number')
  devices = len(jax.devices())
  if FLAGS.batch_size is not None and FLAGS.batch_size % devices:
    raise ConfigError(f'--batch_size={FLAGS.batch_size} does not divide among {devices} devices')
  if FLAGS.output and not Path(FLAGS.output).absolute().parent.is_dir():
    raise ConfigError(f'--output={FLAGS.output}: there is no folder {Path(FLAGS.output).absolute().parent}')


def _load(console: Console) -> LoadedRun:
  run = load_run(FLAGS.checkpoint, FLAGS.step)
  cli.use_compilation_cache(run.config)
  run = weight_flags.quantised(run, mesh_lib.make_mesh(), None, partial(print_line, console))
  if FLAGS.dtype is None:
    return run
  config = with_changes(run.config, model={'dtype': FLAGS.dtype})
  return dataclasses.replace(run, config=config, model=Transformer(config.model))


def _held_out(console: Console, run: LoadedRun) -> dict:
  dataset = held_out.open_data(run, FLAGS.data, partial(print_line, console), FLAGS.data_format)
  default = run.config.train.eval_rows if FLAGS.data is None else 0
  rows = (default if FLAGS.rows is None else FLAGS.rows) or None
  batch_size = FLAGS.batch_size or 8 * len(jax.devices())
  mesh, chooser = mesh_lib.make_mesh(), FLAGS.router
  weights = _weights()
  with Follow(console, run.config.model, dataset, rows, chooser) as follow:
    result = held_out.evaluate(
      run, dataset, mesh, batch_size, rows, follow.begin, follow.advance, chooser, FLAGS.mean_depth
    )
  if FLAGS.exits:
    print_line(console, 'the recursions one by one')
    batches = loader.validation_batches(dataset, batch_size, rows)
    result['exits'] = exits.measure(run.model, run.config, mesh, run.variables, batches, weights)
  return result


def _weights() -> list[float]:
  try:
    return [float(weight) for weight in FLAGS.contrast or ()]
  except ValueError:
    raise ConfigError(f'--contrast={",".join(FLAGS.contrast)} must be numbers, such as 0.25,0.5') from None


def _few_shot(run: LoadedRun, tasks: Any) -> dict:
  from mor_jax.evaluation.harness import HarnessModel  # lm_eval is an optional extra

  batch_size = FLAGS.batch_size or 8 * len(jax.devices())
  routing = FLAGS.routing or 'threshold'
  model = HarnessModel(run, batch_size, FLAGS.max_len, routing, FLAGS.prefix_token)
  limit = int(FLAGS.limit) if FLAGS.limit is not None and FLAGS.limit >= 1 else FLAGS.limit
  return few_shot.run(
    model, FLAGS.tasks, tasks, num_fewshot=FLAGS.num_fewshot, limit=limit, use_cache=FLAGS.use_cache
  )


def _write(path: Path, result: dict) -> None:
  try:
    write_atomically(path, json.dumps(result, indent=2) + '\n')
  except OSError as error:
    raise ConfigError(f'{path} cannot be written ({error.strerror}); choose another with --output') from None


if __name__ == '__main__':
  define_flags()
  cli.run(main, __doc__, with_config=False)
