"""The embedding of tokens: a row for each, or the sum of two rows that tokens share (`embed_factor`).

With a factor f token i is quotient[i // f] + remainder[i % f] (Shi et al. 2020, arXiv 1909.02107): a vocabulary of pairs,
such as a node and its successor, then knows from the beginning which tokens have a part in common.
"""

import jax.numpy as jnp
from flax import linen as nn

from mor_jax.config import ModelConfig
from mor_jax.model import kernels


class Embedding(nn.Module):
  """Makes the table (V, D) of embeddings, float32 or quantised."""

  config: ModelConfig

  @nn.compact
  def __call__(self) -> kernels.Kernel:
    cfg = self.config
    init = nn.with_logical_partitioning(nn.initializers.normal(cfg.embedding_std), ('vocab', 'embed'))

    def rows(name, count):
      return kernels.parameter(self, name, init, (count, cfg.d_model))

    return table(cfg, {name: rows(name, count) for name, count in rows_of(cfg).items()})


def rows_of(config: ModelConfig) -> dict[str, int]:
  """Rows of every parameter of the embedding."""
  if config.embed_factor is None:
    return {'embedding': config.vocab_size}
  return {'quotient': -(-config.vocab_size // config.embed_factor), 'remainder': config.embed_factor}


def table(config: ModelConfig, params: dict) -> kernels.Kernel:
  """Embeddings (V, D) of all tokens; those that are sums of two are an array."""
  if config.embed_factor is None:
    return params['embedding']
  tokens_V = jnp.arange(config.vocab_size)
  factor = config.embed_factor
  return kernels.rows(params['quotient'], tokens_V // factor) + kernels.rows(
    params['remainder'], tokens_V % factor
  )
