"""Weights in 8 and 4 bits: losses by recursion, depths, tasks, bytes, and tokens per second.

    python -m benchmarks.quantise --runs=original=RUN,mor=RUN --text=files:TEXT/*.txt --held_out=files:OTHER/*.txt

For each run, in float32: the weights as they are, rounded by themselves (int8, int4 plain), and with scales chosen on
--calibration rows of TEXT in all recursions (int8, int4) and, for models with recursions, in the first alone. The loss of
--rows rows of OTHER by the most recursions of a token, with causal routing; the share of tokens whose depth is that of
float32; the bytes of all variables. --tasks with --include_path adds accuracies of lm-evaluation-harness, of --limit
documents each. --speed adds tokens per second of the engine with 1 and 16 texts, --repeats calls of each kind in
alternation, and --products single products of a kernel of the shape of the model's MLP in several forms, with what XLA
says that they read and write. What was measured is kept in --keep and not measured again; --only leaves the others for
another call, as speed wants a machine to itself. Writes benchmarks/results/quantise.*.
"""

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import results
from mor_jax import cli
from mor_jax.config import ConfigError, with_changes
from mor_jax.data import loader
from mor_jax.evaluation import few_shot, held_out, nll
from mor_jax.inference.engine import Engine
from mor_jax.inference.requests import Request
from mor_jax.inference.scheduler import Scheduler
from mor_jax.model import kernels
from mor_jax.model.transformer import Transformer
from mor_jax.parallel import mesh as mesh_lib
from mor_jax.quantisation import rounding, weights
from mor_jax.runs.restore import LoadedRun, load_run

FLAGS = flags.FLAGS
flags.DEFINE_list('runs', None, 'NAME=FOLDER of each run')
flags.DEFINE_string('text', None, 'text to choose scales on, as in data.source')
flags.DEFINE_string('held_out', None, 'text to measure on')
flags.DEFINE_integer('calibration', 64, 'rows of --text')
flags.DEFINE_integer('rows', 64, 'rows of --held_out')
flags.DEFINE_integer('seq_len', 128, 'tokens in a row')
flags.DEFINE_list('tasks', None, 'tasks of lm-evaluation-harness')
flags.DEFINE_string('include_path', None, 'folder with YAML files of tasks')
flags.DEFINE_integer('limit', 100, 'documents of each task')
flags.DEFINE_boolean('speed', False, 'measure tokens per second')
flags.DEFINE_boolean('products', False, 'measure single products')
flags.DEFINE_integer('repeats', 5, 'calls that are timed')
flags.DEFINE_list('kinds', 'int8 plain,int4 plain,int8,int4,int4 first', 'besides float32')
flags.DEFINE_string('keep', None, 'folder for measurements')
flags.DEFINE_enum('only', None, ['losses', 'speed', 'products'], 'measure nothing else')

BATCHES = (1, 16)
NEW_TOKENS = 48


def main() -> None:
  """Measures, prints and keeps the table."""
  for name in ('runs', 'text', 'held_out'):
    if not FLAGS[name].value:
      raise ConfigError(f'--{name} is missing (--help says what it is)')
  mesh, rows, raw = mesh_lib.make_mesh(devices=jax.devices()[:1]), [], {}
  for named in FLAGS.runs:
    name, _, folder = named.partition('=')
    run = load(folder, mesh)
    found = kept(f'{name}-losses', 'losses', functools.partial(measure, run, mesh))
    speeds = kept(f'{name}-speed', 'speed', functools.partial(speed, run, mesh)) if FLAGS.speed else {}
    raw[name] = {'losses': found, 'speed': speeds}
    for kind, one in found.items():
      rows.append([name, kind, *cells(one, found['float32'], speeds.get(kind))])
  if FLAGS.products:
    raw['products'] = kept('products', 'products', lambda: {str(count): products(count) for count in BATCHES})
  if FLAGS.only:
    return
  columns = [
    'model',
    'weights',
    'loss',
    'change',
    'change by recursion',
    'same depth',
    'bytes, share',
    'tasks',
  ]
  columns += [f'tokens/s, {count} texts' for count in BATCHES]
  settings = {
    'loss': f'nats per token of {FLAGS.rows} rows of {FLAGS.seq_len} tokens, causal routing',
    'scales': f'plain: of the largest values; else chosen on {FLAGS.calibration} rows, in all recursions or the first',
    'speed': f'median of {FLAGS.repeats} calls in alternation, {NEW_TOKENS} new tokens a text, float32',
    'tasks': f'{FLAGS.limit} documents each' if FLAGS.tasks else 'not measured',
  }
  print(results.keep('quantise', columns, rows, settings, measurements=raw))


def kept(name: str, part: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
  """The measurement in the file of this name, else a new one, unless --only names another part."""
  path = Path(FLAGS.keep or '.') / f'{name}.json'
  if FLAGS.keep and path.exists():
    return json.loads(path.read_text())
  if FLAGS.only not in (None, part):
    return {}
  made = json.dumps(make(), indent=2)
  if FLAGS.keep:
    path.write_text(made + '\n')
  return json.loads(made)


def load(folder: str, mesh: Any) -> LoadedRun:
  """A run in float32, for rows of --seq_len tokens."""
  run = load_run(folder, mesh=mesh)
  config = with_changes(run.config, model={'dtype': 'float32'}, data={'seq_len': FLAGS.seq_len})
  return dataclasses.replace(run, config=config, model=Transformer(config.model))


def quantised(run: LoadedRun, kind: str, mesh: Any) -> LoadedRun:
  """The run with weights of a kind, one of --kinds."""
  bits, _, way = kind.partition(' ')
  if way == 'plain':
    return weights.quantise_run(run, bits, mesh, rows=0)
  recursions = 1 if way == 'first' else None
  return weights.quantise_run(run, bits, mesh, FLAGS.text, FLAGS.calibration, recursions)


def measure(run: LoadedRun, mesh: Any) -> dict[str, dict[str, Any]]:
  """All figures of a run by kind of weights."""
  kinds = [kind for kind in FLAGS.kinds if run.config.model.can_stop_early or not kind.endswith('first')]
  made = {'float32': run}
  for kind in kinds:
    begin = time.perf_counter()
    made[kind] = quantised(run, kind, mesh)
    print(f'{kind}: quantised in {time.perf_counter() - begin:.0f} s', flush=True)
  data = held_out.open_data(run, FLAGS.held_out, form='text')
  losses, depths = loss_functions(run, data, mesh)
  found: dict[str, dict[str, Any]] = {}
  for kind, one in made.items():
    found[kind] = {
      'bytes': weights.resident_bytes(one.variables),
      'losses': losses(one.variables),
      'depths': depths(one.variables),
    }
    if FLAGS.tasks:
      found[kind]['tasks'] = tasks(one)
    print(kind, found[kind]['losses'], found[kind].get('tasks', ''), flush=True)
  own = found['float32']['depths']
  for one in found.values():
    theirs = one.pop('depths')
    one['same_depth'] = None if own is None else float((theirs == own).mean())
  return found


def loss_functions(run: LoadedRun, data: loader.Dataset, mesh: Any) -> tuple[Callable, Callable]:
  """Variables -> losses by most recursions; and -> depths of all tokens, None without a router."""
  model = run.config.model
  routing = 'threshold' if model.kind == 'mor' else 'topk'
  limits = range(1 if model.can_stop_early else model.recursions, model.recursions + 1)
  steps = {limit: nll.make_nll_step(run.model, run.config, mesh, routing, limit) for limit in limits}

  def batches():
    return loader.validation_batches(data, 8, FLAGS.rows)

  def losses(variables):
    return {limit: nll.evaluate(step, variables, batches(), mesh)['nll'] for limit, step in steps.items()}

  @jax.jit
  def chosen(variables, batch):
    about = {'segment_ids': batch['segment_ids'], 'positions': batch['positions'], 'with_logits': False}
    return run.model.apply(variables, batch['tokens'], routing=routing, **about).routing.depth_BT

  def depths(variables):
    if model.kind != 'mor':
      return None
    return np.concatenate(
      [np.asarray(chosen(variables, batch))[batch['segment_ids'] > 0] for batch in batches()]
    )

  return losses, depths


def tasks(run: LoadedRun) -> dict[str, float]:
  """Accuracies by task."""
  from mor_jax.evaluation.harness import HarnessModel

  few_shot.prepare()
  loaded = few_shot.load(FLAGS.tasks, FLAGS.include_path)
  found = few_shot.run(HarnessModel(run, 8), FLAGS.tasks, loaded, limit=FLAGS.limit, bootstrap_iters=0)
  return {task: found['results'][task]['acc,none'] for task in FLAGS.tasks}


# ---- speed ----


def speed(run: LoadedRun, mesh: Any) -> dict[str, dict[int, list[float]]]:
  """Tokens per second by kind and number of texts, calls in alternation; how scales were chosen makes no difference."""
  made = {'float32': run} | {kind: weights.quantise_run(run, kind, mesh, rows=0) for kind in weights.BITS}
  found: dict[str, dict[int, list[float]]] = {kind: {} for kind in made}
  for count in BATCHES:
    schedulers = {
      kind: Scheduler(
        Engine(one.model, one.variables, slots=count, max_len=FLAGS.seq_len), ticks_per_call=1000
      )
      for kind, one in made.items()
    }
    requests = [Request(tuple(range(5 + n, 13 + n)), max_new_tokens=NEW_TOKENS) for n in range(count)]
    for number in range(FLAGS.repeats + 1):
      for kind, scheduler in schedulers.items():
        begin = time.perf_counter()
        scheduler.run(requests)
        if number:  # the first compiles
          found[kind].setdefault(count, []).append(count * NEW_TOKENS / (time.perf_counter() - begin))
    print(count, {kind: statistics.median(one[count]) for kind, one in found.items()}, flush=True)
  return found


def products(
  count: int, inputs: int = 576, outputs: int = 1536, layers: int = 24
) -> dict[str, dict[str, float]]:
  """Microseconds of a product with `count` rows, and bytes that XLA counts for it, of kernels that fill no cache."""
  rng = np.random.default_rng(0)
  kernels_NIO = rng.normal(size=(layers, inputs, outputs)).astype(np.float32)
  x = jnp.asarray(rng.normal(size=(count, inputs)), jnp.float32)

  def dynamic(x, kernel):
    step_N1 = jnp.abs(x).max(axis=1, keepdims=True) / 127
    rounded = jnp.round(x / step_N1).astype(jnp.int8)
    sums = jax.lax.dot(rounded, kernel.values, preferred_element_type=jnp.int32)
    return sums.astype(jnp.float32) * step_N1 * kernel.scales

  forms = {
    'float32': (lambda x, kernel: x @ kernel, jnp.asarray),
    'int8, as the engine has it': (kernels.product, lambda kernel: rounding.quantise(kernel, 8)),
    'int8, made floats': (lambda x, kernel: x @ kernel.whole(), lambda kernel: rounding.quantise(kernel, 8)),
    'int8 x int8, inputs rounded to 8 bits': (dynamic, lambda kernel: rounding.quantise(kernel, 8)),
    'int4, as the engine has it': (kernels.product, lambda kernel: rounding.quantise(kernel, 4)),
  }
  return {
    name: _timed(x, function, [make(one) for one in kernels_NIO]) for name, (function, make) in forms.items()
  }


def _timed(x, function, layers):
  @jax.jit
  def run(x, layers):
    for kernel in layers:
      y = function(x, kernel)
      x = x + 1e-3 * y[:, :1]
    return x, y

  compiled = run.lower(x, layers).compile()
  cost = compiled.cost_analysis()
  cost = cost[0] if isinstance(cost, list) else cost
  times = []
  for _ in range(3 * FLAGS.repeats):
    begin = time.perf_counter()
    jax.block_until_ready(compiled(x, layers))
    times.append(time.perf_counter() - begin)
  return {
    'microseconds': 1e6 * statistics.median(times[1:]) / len(layers),
    'bytes_accessed': cost['bytes accessed'] / len(layers),
    'bytes_stored': weights.resident_bytes(layers) / len(layers),
  }


def cells(one: dict[str, Any], exact: dict[str, Any], speeds: dict[str, list[float]] | None) -> list[str]:
  """A row of the table."""
  changes = [loss - exact['losses'][limit] for limit, loss in one['losses'].items()]
  last = list(one['losses'].values())[-1]
  return [
    f'{last:.4f}',
    f'{changes[-1]:+.4f}',
    ' '.join(f'{change:+.4f}' for change in changes),
    '-' if one['same_depth'] is None else f'{one["same_depth"]:.4f}',
    f'{one["bytes"] / exact["bytes"]:.4f}',
    ', '.join(f'{Path(task).name} {value:.3f}' for task, value in one.get('tasks', {}).items()) or '-',
    *(f'{statistics.median(speeds[str(count)]):.1f}' if speeds else '-' for count in BATCHES),
  ]


if __name__ == '__main__':
  cli.run(main, __doc__, with_config=False)
