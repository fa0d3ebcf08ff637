"""A tiny training for tests: the text of texts/harbour.txt as bytes, a small model, compiled steps shared."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.config import Config, with_changes
from mor_jax.data import packing
from mor_jax.model.transformer import Transformer
from mor_jax.parallel import mesh as mesh_lib
from mor_jax.training.optimizer import make_optimizer
from mor_jax.training.state import TrainState, abstract_state, initializer
from mor_jax.training.step import make_train_step, split_batch

TEXT = pathlib.Path(__file__).parent / 'texts' / 'harbour.txt'
END_OF_TEXT = 256
SEQ_LEN = 64
MESH = mesh_lib.make_mesh(devices=jax.devices()[:1])

CONFIG = with_changes(
  Config(),
  model={
    'vocab_size': 257,
    'num_layers': 4,
    'num_recursions': 2,
    'd_model': 32,
    'num_heads': 2,
    'num_kv_heads': 1,
    'mlp_dim': 64,
    'init': 'plain',
    'dtype': 'float32',
  },
  data={'tokenizer': 'bytes', 'seq_len': SEQ_LEN},
  train={'steps': 20, 'global_batch': 8, 'warmup_steps': 4, 'learning_rate': 1e-2},
)


@functools.cache
def rows() -> dict[str, np.ndarray]:
  """The text, each paragraph a document, packed: arrays (rows, T); the last row has padding."""
  documents = [list(paragraph.encode()) for paragraph in TEXT.read_text().split('\n\n')]
  packed = packing.concat_and_split(documents, SEQ_LEN, END_OF_TEXT)
  unpacked = [packing.unpack(row) for row in packed]
  return {name: np.stack([row[name] for row in unpacked]) for name in unpacked[0]}


def batches(config: Config = CONFIG, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
  """Consecutive rows of the text, over and over; the batch of a step does not depend on the start."""
  count = len(rows()['tokens'])
  step = start_step
  while True:
    chosen = (np.arange(config.train.global_batch) + step * config.train.global_batch) % count
    yield {name: values[chosen] for name, values in rows().items()}
    step += 1


@dataclasses.dataclass(frozen=True)
class Run:
  """Model, initial state and step of a config."""

  config: Config

  @property
  def model(self) -> Transformer:
    """The module."""
    return Transformer(self.config.model)

  @functools.cached_property
  def abstract(self) -> TrainState:
    """Shapes of the state."""
    return abstract_state(self._initialize)

  @functools.cached_property
  def step(self):
    """(state, batch of rows) -> (state, metrics)."""
    compiled = make_train_step(
      self.model, self.config, make_optimizer(self.config.train, self.config.model), MESH
    )
    return lambda state, batch: compiled(state, self.put(batch))

  def put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Rows as the compiled step takes them."""
    micro_batches = split_batch(batch, self.config.train.accumulation)
    return mesh_lib.put(micro_batches, mesh_lib.micro_batch_sharding(MESH))

  def placed(self, state: TrainState) -> TrainState:
    """A state made by hand where the compiled step expects it; elsewhere the step would be compiled anew."""
    return jax.tree.map(lambda leaf, spec: jax.device_put(leaf, spec.sharding), state, self.abstract)

  def initial(self) -> TrainState:
    """The state at step 0."""
    return self._initialize(jnp.uint32(self.config.train.seed))

  @functools.cached_property
  def _initialize(self):
    return initializer(self.model, make_optimizer(self.config.train, self.config.model), MESH, SEQ_LEN)


@functools.cache
def run(config: Config = CONFIG) -> Run:
  """The run of a config, compiled once for all tests."""
  return Run(config)
