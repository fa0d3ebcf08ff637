"""Models whose low-rank changes are merged into their kernels."""

import dataclasses
from collections.abc import Iterator
from functools import cached_property

import numpy as np

from mor_jax.config import ConfigError, ModelConfig
from mor_jax.interop.weights import Weights
from mor_jax.model import relaxation

_ADAPTERS, _KERNEL = 'params/lora/', '/kernel'


class MergedWeights:
  """Weights of the model that computes the same without low-rank changes, merged leaf by leaf in float32.

  Args:
    inner: weights of a model whose changes are the same wherever a layer is used.

  Raises:
    ConfigError: each recursion has changes of its own, which no shared kernel can hold.
  """

  def __init__(self, inner: Weights):
    if inner.config.own_lora:
      raise ConfigError(
        f'model.lora_sharing=own with model.lora_rank={inner.config.lora_rank} gives each of the '
        f'{inner.config.recursions} recursions low-rank changes of its own, which cannot be merged into kernels that '
        f'they share; train with --config.model.lora_sharing=one to merge'
      )
    self._inner = inner
    self.shapes = {path: shape for path, shape in inner.shapes.items() if not path.startswith(_ADAPTERS)}
    self.dtypes = {path: inner.dtypes[path] for path in self.shapes}

  @cached_property
  def config(self) -> ModelConfig:
    """Settings of the merged model."""
    return dataclasses.replace(self._inner.config, lora_rank=0, lora_sharing='own', lora_layers='shared')

  def leaf(self, path: str) -> np.ndarray:
    """One leaf, in the dtype that it was stored in."""
    leaf = self._inner.leaf(path)
    _, part, *name = path.split('/')
    target = '/'.join(name).removesuffix(_KERNEL)
    config = self._inner.config
    if part not in config.adapted_parts or target not in relaxation.LORA_TARGETS[config.lora_targets]:
      return leaf
    where = f'{_ADAPTERS}{part}/{target.replace("/", "_")}'
    down, up = (self._inner.leaf(f'{where}/{name}').astype(np.float32) for name in ('down', 'up'))
    change = config.lora_alpha / config.lora_rank * np.matmul(down, up)
    return (leaf.astype(np.float32) + change).astype(leaf.dtype)

  def leaves(self) -> Iterator[tuple[str, np.ndarray]]:
    """(path, leaf) of all, one at a time."""
    for path in self.shapes:
      yield path, self.leaf(path)


def without_adapters(weights: Weights) -> Weights:
  """The weights, merged if the model has low-rank changes that can be."""
  return MergedWeights(weights) if weights.config.adapted_parts and not weights.config.own_lora else weights
