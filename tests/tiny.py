"""Small models for tests: few parameters, but every one of them away from its trivial value."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mor_jax.config import Config, ModelConfig, with_changes
from mor_jax.model import sharing
from mor_jax.model.context import TokenContext
from mor_jax.model.layers import DecoderLayer, PerLayer
from mor_jax.model.memory import Row, SharedMemory
from mor_jax.model.rotary import rotation
from mor_jax.model.transformer import Transformer, abstract_variables

SHAPE = {
  'vocab_size': 61,
  'num_layers': 6,
  'd_model': 32,
  'num_heads': 4,
  'num_kv_heads': 2,
  'mlp_dim': 48,
  'init': 'plain',
  'init_std': 0.1,
  'dtype': 'float32',
}


def config(**overrides) -> ModelConfig:
  """A validated ModelConfig of 6 layers and width 32 in float32, changed as asked."""
  return with_changes(Config(), model={**SHAPE, **overrides}).model


def model(seed: int = 0, **overrides) -> tuple[Transformer, dict]:
  """A model and variables whose norm scales and router scores vary."""
  made = Transformer(config(**overrides))
  return made, _variables(made, seed)


@functools.cache
def _variables(made: Transformer, seed: int) -> dict:
  """Drawn with NumPy: compiling the model's own initialiser would take longer than most tests.

  All unique layers are drawn as one stack, so that models that differ only in what they share have the same.
  """
  config, shapes = made.config, nn.unbox(abstract_variables(made.config))
  parts = {name: leaves for name, leaves in shapes['params'].items() if name in ('first', 'block', 'last')}
  others = {name: leaves for name, leaves in shapes['params'].items() if name not in parts}
  rng = np.random.default_rng(seed)

  def stacked(leaf):
    return jax.ShapeDtypeStruct((config.num_unique_layers, *leaf.shape[1:]), leaf.dtype)

  def draw(path, leaf):
    noise = rng.normal(size=leaf.shape).astype(leaf.dtype)
    if path[0].key == 'routing':
      return jnp.zeros(leaf.shape, leaf.dtype)
    if path[-1].key == 'scale':
      return 0.1 * noise + (path[1].key != 'steps')  # what a step has of its own is a change
    return noise * config.init_std * (3 if 'router' in path[1].key else 1)

  every = {**shapes, 'params': {**others, 'layers': jax.tree.map(stacked, parts['block'])}}
  drawn = jax.tree_util.tree_map_with_path(draw, every)
  layers, ends = drawn['params'].pop('layers'), config.unique_ends
  cuts = {'first': 0, 'block': slice(ends, config.num_unique_layers - ends), 'last': -1}
  drawn['params'] |= {name: jax.tree.map(lambda leaf, at=cuts[name]: leaf[at], layers) for name in parts}
  return drawn


def layer_parameters(config: ModelConfig, params: dict, slot: int) -> dict:
  """Parameters of one of the unique layers."""
  part, index = sharing.place(config, slot)
  return params[part] if index is None else jax.tree.map(lambda leaf: leaf[index], params[part])


def run_layer(
  config: ModelConfig, params: dict, x_BTD: jax.Array, context: TokenContext, memory: tuple | None = None
) -> tuple[jax.Array, tuple]:
  """One decoder layer by itself, and the keys and values that it made, or that it was handed to read."""
  row = Row(context, remembers=True) if memory is None else SharedMemory(context, context)
  turns = rotation(config, context.positions_BC)
  layer = PerLayer(jnp.zeros((), jnp.int32), memory)
  x_BTD, made = DecoderLayer(config).apply({'params': params}, x_BTD, layer, row, turns)
  return x_BTD, memory or made


def final_norm(config: ModelConfig, params: dict, x_BTD: jax.Array) -> np.ndarray:
  """The root mean square norm by its formula."""
  x_BTD = np.asarray(x_BTD, np.float64)
  root_BT1 = np.sqrt((x_BTD**2).mean(-1, keepdims=True) + config.norm_epsilon)
  return x_BTD / root_BT1 * params['final_norm']['scale']


def tokens(batch: int, length: int, seed: int = 1) -> jax.Array:
  """Random token ids (batch, length)."""
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.integers(0, SHAPE['vocab_size'], (batch, length)), jnp.int32)


@functools.cache
def apply(made: Transformer, routing: str = 'topk'):
  """`made.apply` compiled for a routing mode, shared by all tests that use the same model."""
  return jax.jit(functools.partial(made.apply, routing=routing), static_argnames=('max_len', 'slack'))


def assert_same_gradients(gradients: dict, expected: dict) -> None:
  """Every leaf within 1e-3 of the expected one, relative to its norm."""
  for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
    reference = expected
    for entry in path:
      reference = reference[entry.key]
    error = np.linalg.norm(gradient - reference) / np.linalg.norm(reference)
    assert error < 1e-3, f'gradient of {jax.tree_util.keystr(path)} differs by {error:.1e}'
