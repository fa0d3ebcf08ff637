"""Shared by the training benchmarks: flags for the model shape, and a compiled training step to time."""

import time
from typing import Any

import jax
import numpy as np
from absl import flags

from mor_jax import cli
from mor_jax.config import Config, with_changes
from mor_jax.model.transformer import Transformer
from mor_jax.parallel import mesh as mesh_lib
from mor_jax.planning import chips
from mor_jax.training.optimizer import make_optimizer
from mor_jax.training.state import SEED, abstract_state, initializer
from mor_jax.training.step import abstract_batch, make_train_step, split_batch

FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # what is defined below belongs to the benchmark that asks for it

SIZES = ('small', '135m', '360m', '1p7b')
SMALL = {'layers': 14, 'width': 384, 'rows': 4, 'seq_len': 512, 'vocabulary': 4096, 'dtype': 'float32'}
SHAPE_FLAGS = ('size', *SMALL, 'remat')


def define_flags() -> None:
  """Defines the flags for the model shape, which `base_config` reads."""
  flags.DEFINE_enum('size', 'small', SIZES, 'small, for a CPU; or a shape of configs/, in bfloat16, 8 x 2048')
  flags.DEFINE_integer('layers', None, 'unrolled depth; small: 14, 2 more than a multiple of 2, 3 and 4')
  flags.DEFINE_integer('width', None, 'model width, a multiple of 64; small: 384')
  flags.DEFINE_integer('vocabulary', None, 'entries of the vocabulary; small: 4096')
  flags.DEFINE_integer('rows', None, 'rows of a batch; small: 4, else 8')
  flags.DEFINE_integer('seq_len', None, 'tokens of a row; small: 512, else 2048')
  flags.DEFINE_enum('dtype', None, ('float32', 'bfloat16'), 'of activations; small: float32, else bfloat16')
  flags.DEFINE_string('remat', 'none', 'model.remat')


def base_config(**model: Any) -> Config:
  """The config described by the flags, with the given model settings. Raises ConfigError if it is invalid."""
  given = {name: FLAGS[name].value for name in SMALL if FLAGS[name].value is not None}
  if FLAGS.size == 'small':
    given = SMALL | given
    base = Config()
  else:
    base = cli.load_config(f'configs/{FLAGS.size}.py:vanilla', {'train.flops_budget': None})
    given = {'rows': 8, 'seq_len': 2048, 'dtype': 'bfloat16'} | given
  shape = {'remat': FLAGS.remat, 'dtype': given['dtype']}
  if 'width' in given:
    width = given['width']
    shape |= {
      'd_model': width,
      'mlp_dim': width * 8 // 3,
      'num_heads': width // 64,
      'num_kv_heads': width // 64,
    }
  if 'layers' in given:
    shape['num_layers'] = given['layers']
  if 'vocabulary' in given:
    shape['vocab_size'] = given['vocabulary']
  return with_changes(
    base,
    model={**shape, **model},
    data={'seq_len': given['seq_len'], 'segment_mask': True},
    train={
      'global_batch': given['rows'],
      'accumulation': 1,
      'warmup_steps': 0,
      'steps': 10**6,
      'learning_rate': 1e-3,
    },
  )


def random_tokens(config: Config, turn: int) -> np.ndarray:
  """Tokens (B, T) of a turn, the same for all sides."""
  shape = config.train.global_batch, config.data.seq_len
  return np.random.default_rng(turn).integers(0, config.model.vocab_size, shape, np.int32)


class TrainingStep:
  """A model with its training state and compiled optimiser step.

  Attributes:
    state: training state, initialised with seed 0.
    compiled: the compiled step.
  """

  def __init__(self, config: Config):
    self.config = config
    self._mesh = mesh_lib.make_mesh()
    model, optimizer = Transformer(config.model), make_optimizer(config.train)
    initialize = initializer(model, optimizer, self._mesh, config.data.seq_len)
    step = make_train_step(model, config, optimizer, self._mesh)
    arguments = abstract_state(initialize), abstract_batch(config, self._mesh)
    traced = step.trace(*arguments)
    self.jaxpr = traced.jaxpr
    self.compiled = traced.lower().compile()
    self.state = initialize(np.zeros((), SEED.dtype))

  def run(self, turn: int) -> tuple[float, float]:
    """(seconds, loss) of one step on the tokens of a turn. The copy to the device is not timed."""
    tokens_BT = random_tokens(self.config, turn)
    ones_BT = np.ones_like(tokens_BT)
    rows = {'tokens': tokens_BT, 'segment_ids': ones_BT, 'positions': ones_BT.cumsum(1, dtype=np.int32) - 1}
    batch = mesh_lib.put(split_batch(rows, 1), mesh_lib.micro_batch_sharding(self._mesh))
    jax.block_until_ready(batch)
    begin = time.perf_counter()
    self.state, metrics = self.compiled(self.state, batch)
    jax.block_until_ready((self.state, metrics))
    return time.perf_counter() - begin, float(metrics['loss'])


def utilization(flops_per_second: float, device_kind: str) -> float | None:
  """Fraction of the device's peak bfloat16 FLOPs; None for a device not listed in `chips`."""
  chip = chips.of_kind(device_kind)
  return flops_per_second / chip.flops if chip else None
