"""Time, FLOPs and memory of a training step, vanilla against recursive and MoR, side by side.

  python -m benchmarks.train_step [--rounds=7] [--layers=14] [--width=384] [--rows=4] [--seq_len=512]

All models have the same depth, width and tokens; their steps alternate in one process, and medians
count. "Delivered" is the time ratio over the ratio of executed FLOPs: 1 where the whole saving arrives.
Writes benchmarks/results/train_step.json and .md.
"""

import statistics
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.progress import track

from benchmarks import results
from mor_jax import cli
from mor_jax.config import Config
from mor_jax.model import flops
from mor_jax.model.transformer import Transformer
from mor_jax.parallel import mesh as mesh_lib
from mor_jax.training.optimizer import make_optimizer
from mor_jax.training.state import abstract_state, initializer
from mor_jax.training.step import abstract_batch, make_train_step, split_batch

FLAGS = flags.FLAGS
flags.DEFINE_integer('rounds', 7, 'steps of every model that are timed')
flags.DEFINE_integer('layers', 14, 'unrolled depth; 2 more than a multiple of 2 and 3')
flags.DEFINE_integer('width', 384, 'model width, a multiple of 64')
flags.DEFINE_integer('rows', 4, 'rows of a batch')
flags.DEFINE_integer('seq_len', 512, 'tokens of a row')

MODELS = {
  'vanilla': {'kind': 'vanilla'},
  'recursive R=2': {'kind': 'recursive', 'num_recursions': 2},
  'mor R=2': {'num_recursions': 2},
  'mor R=3': {'num_recursions': 3},
  'mor R=3, shared KV': {'num_recursions': 3, 'kv': 'shared'},
  'mor R=3, token-choice': {'num_recursions': 3, 'router': 'token_choice', 'token_capacity_factor': 1.0},
}


class Contender:
  """A model with its state and compiled step."""

  def __init__(self, change: dict):
    heads = FLAGS.width // 64
    shape = {
      'd_model': FLAGS.width,
      'num_heads': heads,
      'num_kv_heads': heads,
      'mlp_dim': FLAGS.width * 8 // 3,
    }
    self.config = Config().replace(
      model={**shape, 'num_layers': FLAGS.layers, 'vocab_size': 4096, 'dtype': 'float32', **change},
      data={'seq_len': FLAGS.seq_len},
      train={'global_batch': FLAGS.rows},
    )
    mesh, optimizer = mesh_lib.make_mesh(), make_optimizer(self.config.train)
    model = Transformer(self.config.model)
    initialize = initializer(model, optimizer, mesh, FLAGS.seq_len)
    step = make_train_step(model, self.config, optimizer, mesh)
    self._step = step.lower(abstract_state(initialize, mesh), abstract_batch(self.config, mesh)).compile()
    self._state = initialize(jnp.uint32(0))
    tokens_BT = np.random.default_rng(0).integers(0, 4096, (FLAGS.rows, FLAGS.seq_len), np.int32)
    ones_BT = np.ones_like(tokens_BT)
    rows = {'tokens': tokens_BT, 'segment_ids': ones_BT, 'positions': ones_BT.cumsum(1, dtype=np.int32) - 1}
    self._batch = mesh_lib.put(split_batch(rows, 1), mesh_lib.micro_batch_sharding(mesh))

  def run(self) -> float:
    """Seconds of one step."""
    begin = time.perf_counter()
    self._state, metrics = self._step(self._state, self._batch)
    jax.block_until_ready(metrics)
    return time.perf_counter() - begin

  def figures(self, seconds: float) -> dict[str, float]:
    """Step time and what it is measured against."""
    memory = self._step.memory_analysis()
    return {
      'seconds': seconds,
      'tokens_per_second': FLAGS.rows * FLAGS.seq_len / seconds,
      'flops_per_token': flops.train_flops_per_token(self.config.model, FLAGS.seq_len),
      'temporary_bytes': memory.temp_size_in_bytes,
    }


def main() -> None:
  """Measures all models and writes the table."""
  contenders = {name: Contender(change) for name, change in track(MODELS.items(), 'compiling')}
  seconds = {name: [] for name in MODELS}
  for index in track(range(FLAGS.rounds + 1), 'measuring'):
    for name, contender in contenders.items():
      taken = contender.run()
      if index:  # the first round warms up
        seconds[name].append(taken)
  figures = {name: c.figures(statistics.median(seconds[name])) for name, c in contenders.items()}
  flag_values = {name: FLAGS[name].value for name in ('rounds', 'layers', 'width', 'rows', 'seq_len')}
  table = results.keep('train_step', COLUMNS, list(_rows(figures)), flag_values, models=figures)
  Console().print(table, highlight=False, soft_wrap=True)


COLUMNS = ('model', 'step, ms', 'tokens/s', 'time ratio', 'FLOP ratio', 'delivered', 'temporaries ratio')


def _rows(figures: dict[str, dict[str, float]]) -> Iterator[list[str]]:
  base = figures['vanilla']
  for name, own in figures.items():
    times, work = own['seconds'] / base['seconds'], own['flops_per_token'] / base['flops_per_token']
    memory = own['temporary_bytes'] / base['temporary_bytes']
    speed = [f'{own["seconds"] * 1e3:,.0f}', f'{own["tokens_per_second"]:,.0f}']
    yield [name, *speed, f'{times:.3f}', f'{work:.3f}', f'{times / work:.2f}', f'{memory:.2f}']


if __name__ == '__main__':
  cli.run(main, __doc__, with_config=False)
