"""Small models for tests: few parameters, but every one of them away from its trivial value."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.config import Config, ModelConfig, with_changes
from mor_jax.model.transformer import Transformer

SHAPE = {
  'vocab_size': 61,
  'num_layers': 6,
  'd_model': 32,
  'num_heads': 4,
  'num_kv_heads': 2,
  'mlp_dim': 48,
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
  """Drawn with NumPy: compiling the model's own initialiser would take longer than most tests."""
  shapes = jax.eval_shape(made.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    noise = rng.normal(size=leaf.shape).astype(leaf.dtype)
    if path[0].key == 'routing':
      return jnp.zeros(leaf.shape, leaf.dtype)
    if path[-1].key == 'scale':
      return 0.1 * noise + (path[1].key != 'steps')  # what a step has of its own is a change
    return noise * made.config.init_std * (3 if 'router' in path[1].key else 1)

  return jax.tree_util.tree_map_with_path(draw, shapes)


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
