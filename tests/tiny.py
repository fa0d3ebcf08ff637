"""Small models for tests: few parameters, but every one of them away from its trivial value."""

import functools
import zlib

import jax
import jax.numpy as jnp

from mor_jax.config import Config, ModelConfig
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
  return Config().replace(model={**SHAPE, **overrides}).model


def model(seed: int = 0, **overrides) -> tuple[Transformer, dict]:
  """A model and variables whose norm scales and router scores vary."""
  made = Transformer(config(**overrides))
  return made, _variables(made, seed)


@functools.cache
def _variables(made: Transformer, seed: int) -> dict:
  key = jax.random.key(seed)
  variables = jax.jit(made.init)(key, jnp.zeros((1, 4), jnp.int32))

  def vary(path, leaf):
    noise = jax.random.normal(
      jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode())), leaf.shape
    )
    if path[-1].key == 'scale':
      return leaf + 0.1 * noise
    return 3 * leaf if path[1].key == 'router' else leaf

  return jax.tree_util.tree_map_with_path(vary, variables)


def tokens(batch: int, length: int, seed: int = 1) -> jax.Array:
  """Random token ids (batch, length)."""
  return jax.random.randint(jax.random.key(seed), (batch, length), 0, SHAPE['vocab_size'])


@functools.cache
def apply(made: Transformer, routing: str = 'topk'):
  """`made.apply` compiled for a routing mode, shared by all tests that use the same model."""
  return jax.jit(functools.partial(made.apply, routing=routing), static_argnames=('max_len', 'slack'))
