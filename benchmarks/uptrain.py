"""Uptrains a real model to MoR: python -m benchmarks.uptrain --model=SMOLLM2 --corpus='files:FOLDER/*.txt' [--steps=20]

Measures the validation NLL right after the conversion and after --steps steps, for two and three recursions
(configs/uptrain_smollm2_135m.py) and every init.method. Compares with random weights, with the original before and
after the same training, and with distillation. All runs see the same batches. Writes benchmarks/results/uptrain.*
after every run.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from benchmarks import results
from mor_jax import cli
from mor_jax.config import Config, ConfigError, with_changes
from mor_jax.data import loader, schedule
from mor_jax.evaluation import nll
from mor_jax.interop import pretrained
from mor_jax.interop.uptraining import METHODS
from mor_jax.model import flops
from mor_jax.model.transformer import Transformer
from mor_jax.parallel import mesh as mesh_lib
from mor_jax.training import distillation
from mor_jax.training.optimizer import make_optimizer
from mor_jax.training.state import begin_from, initializer
from mor_jax.training.step import make_train_step, split_batch

FLAGS = flags.FLAGS
flags.DEFINE_string('model', None, 'folder of the original, a Llama checkpoint of SmolLM2-135M')
flags.DEFINE_string('corpus', None, 'data.source')
flags.DEFINE_integer('steps', 20, 'optimiser steps of each training')
flags.DEFINE_integer('rows', 2, 'rows in a step')
flags.DEFINE_integer('seq_len', 128, 'tokens in a row')
flags.DEFINE_integer('eval_rows', 16, 'rows of the validation split')
flags.DEFINE_float('learning_rate', 5e-4, 'peak')
flags.DEFINE_list('recursions', ['2', '3'], 'numbers of recursions')
flags.DEFINE_list('methods', list(METHODS), 'init.method of the trainings')
flags.DEFINE_string('distilled', 'stepwise', 'init.method that is also trained with distillation')
flags.DEFINE_string('cache', None, 'data.cache_dir')
flags.DEFINE_float('alpha', 2.0, 'router_alpha of the MoR models')

COLUMNS = ['model', 'layers', 'parameters, M', 'begins from', 'NLL at first', 'NLL after', 'seconds per step']


@dataclasses.dataclass
class Setup:
  """One kind of model, compiled once for all its initial weights."""

  config: Config
  mesh: Any
  dataset: Any
  teacher: Any = None

  def __post_init__(self):
    self.model = Transformer(self.config.model)
    optimizer = make_optimizer(self.config.train, self.config.model)
    self.initialize = initializer(self.model, optimizer, self.mesh, self.config.data.seq_len)
    self.step = make_train_step(self.model, self.config, optimizer, self.mesh, self.teacher)
    self.nll_step = nll.make_nll_step(self.model, self.config, self.mesh)

  def evaluate(self, variables) -> float:
    """Validation NLL in nats per token, under top-k routing."""
    batches = loader.validation_batches(self.dataset, self.config.train.global_batch, FLAGS.eval_rows)
    return nll.evaluate(self.nll_step, variables, batches, self.mesh)['nll']

  def train(self, weights: Any, theirs: tuple = ()) -> tuple[float, float, float]:
    """Trains from `weights` (None: random); returns (initial NLL, final NLL, seconds per step)."""
    state = self.initialize(jnp.uint32(0))
    state = state if weights is None else begin_from(state, weights)
    first, begin = self.evaluate(state.variables), 0.0
    batches = loader.train_batches(self.dataset, self.config.data, schedule.of(self.config.train))
    for number in range(self.config.train.steps):
      if number == 1:  # the first compiles
        jax.block_until_ready(state)
        begin = time.perf_counter()
      rows = mesh_lib.put(split_batch(next(batches), 1), mesh_lib.micro_batch_sharding(self.mesh))
      state, _ = self.step(state, rows, *theirs)
    jax.block_until_ready(state)
    seconds = (time.perf_counter() - begin) / max(1, self.config.train.steps - 1)
    return first, self.evaluate(state.variables), seconds


def main() -> None:
  """Trains all models and writes the table."""
  if not FLAGS.model or not FLAGS.corpus:
    raise ConfigError('--model and --corpus are needed (--help shows an example)')
  vanilla = settings('vanilla', 1)
  mesh = mesh_lib.make_mesh(vanilla.parallel)
  dataset = loader.open_dataset(vanilla.data, report=print)
  source = pretrained.open_source(vanilla)
  source.check_tokenizer(vanilla, dataset.tokenizer)
  rows: list[list[Any]] = []

  def add(setup: Setup, begins: str, weights: Any, theirs: tuple = ()) -> None:
    first, after, seconds = setup.train(weights, theirs)
    model = setup.config.model
    name = 'original' if model.kind == 'vanilla' else f'MoR R={model.num_recursions}'
    million = flops.count_parameters(model).total / 1e6
    rows.append(
      [
        name,
        model.num_layers,
        round(million, 1),
        begins,
        *(round(x, 3) for x in (first, after)),
        round(seconds, 2),
      ]
    )
    print(keep(rows), flush=True)

  add(Setup(vanilla, mesh, dataset), 'itself', pretrained.initial_weights(vanilla, source))
  for recursions in map(int, FLAGS.recursions):
    config = settings('mor', recursions)
    setup = Setup(config, mesh, dataset)
    for method in FLAGS.methods:
      chosen = with_changes(config, init={'method': method})
      add(setup, method, pretrained.initial_weights(chosen, source))
    # The recipe's small init_std is meant for routers alone.
    from_scratch = with_changes(config, model={'init': 'plain', 'init_std': None})
    add(Setup(from_scratch, mesh, dataset), 'random weights', None)
    if FLAGS.distilled:
      config = with_changes(config, init={'method': FLAGS.distilled}, distill={'weight': 1.0})
      teacher = pretrained.make_teacher(config, source)
      theirs = distillation.load_parameters(pretrained.abstract_teacher(teacher, mesh), source.weights)
      setup = Setup(config, mesh, dataset, teacher)
      add(setup, f'{FLAGS.distilled}, distilled', pretrained.initial_weights(config, source), (theirs,))


def settings(variant: str, recursions: int) -> Config:
  """The recipe, adapted to a CPU: float32, short rows, no capacity warm-up."""
  changes = {
    'model.num_recursions': recursions,
    'model.dtype': 'float32',
    'model.capacity_warmup_steps': 0,
    'data.source': FLAGS.corpus,
    'data.seq_len': FLAGS.seq_len,
    'data.cache_dir': FLAGS.cache,
    'train.steps': FLAGS.steps,
    'train.warmup_steps': max(1, FLAGS.steps // 10),
    'train.global_batch': FLAGS.rows,
    'train.accumulation': 1,
    'train.learning_rate': FLAGS.learning_rate,
  }
  if variant == 'mor':
    changes['model.router_alpha'] = FLAGS.alpha
  config = cli.load_config(f'configs/uptrain_smollm2_135m.py:{variant}', changes)
  return pretrained.with_source(config, FLAGS.model)


def keep(rows: list[list[Any]]) -> str:
  """Writes the table of the rows so far and returns it."""
  about = {
    'original': Path(FLAGS.model).name,
    'training': f'{FLAGS.steps} steps of {FLAGS.rows} x {FLAGS.seq_len} tokens, peak learning rate {FLAGS.learning_rate}',
    'validation': f'{FLAGS.eval_rows} rows of {FLAGS.seq_len} tokens, nats per token, top-k routing',
    'gating': f'residual, router_alpha {FLAGS.alpha}, no capacity warm-up',
  }
  return results.keep('uptrain', COLUMNS, rows, about)


if __name__ == '__main__':
  cli.run(main, __doc__, with_config=False)
