"""Relaxed sharing: what a recursion step may have of its own beside the shared block (paper, Table 16).

Three options, alone or together, all stacked on a leading R axis: low-rank changes of the
kernels (LoRA), changes of the norm scales (`share_norms=False`), and a learned vector added to
the block's input (recursion encoding). Steps begin alike: the changes start at zero.

Low-rank changes that a layer has wherever it is used (`Adapters`) are LoRA as Hu et al. (2021) have it, for the layers
of any model. They can be merged into the kernels for good.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from mor_jax.config import ModelConfig
from mor_jax.model import axes, kernels
from mor_jax.model.layers import projections

LORA_TARGETS = {
  'query_value': ('attention/query', 'attention/value'),
  'all': (
    'attention/query',
    'attention/key',
    'attention/value',
    'attention/output',
    'mlp/gate',
    'mlp/up',
    'mlp/down',
  ),
}
NORMS = ('attention_norm', 'mlp_norm')


class Steps(nn.Module):
  """Parameters that the R steps have of their own: lora/..., norms/..., encoding/..., each leaf (R, ...)."""

  config: ModelConfig

  @nn.compact
  def __call__(self) -> dict:
    """The tree of them; empty where nothing is relaxed."""
    cfg, steps = self.config, {}
    stacked = (cfg.recursions, cfg.shared_depth)
    if cfg.own_lora:
      steps['lora'] = _LowRank(cfg, stacked, ('recursions', 'layers'), name='lora')()
    if not cfg.share_norms:
      steps['norms'] = _NormScales(cfg, stacked, name='norms')()
    if cfg.recursion_encoding:
      names, init = ('recursions', 'norm'), nn.initializers.normal(cfg.weight_std)
      steps['encoding'] = axes.Leaf(
        'embedding', (cfg.recursions, cfg.d_model), names, init, name='encoding'
      )()
    return steps


class Adapters(nn.Module):
  """Low-rank changes that are the same in all recursions: first/..., block/..., last/..., as `adapted_parts` says."""

  config: ModelConfig

  @nn.compact
  def __call__(self) -> dict:
    """The tree of them; leaves of the block have a leading axis N."""
    cfg = self.config
    stacked = {'block': ((cfg.shared_depth,), ('layers',))}
    return {part: _LowRank(cfg, *stacked.get(part, ((), ())), name=part)() for part in cfg.adapted_parts}


class _LowRank(nn.Module):
  """Factors down (..., inputs, r) and up (..., r, outputs) for each target kernel, stacked on leading axes."""

  config: ModelConfig
  stacked: tuple[int, ...]
  stacked_on: tuple[str, ...]

  @nn.compact
  def __call__(self) -> dict:
    cfg, linear = self.config, projections(self.config)
    return {
      name.replace('/', '_'): _Factors(
        linear[name], cfg.lora_rank, self.stacked, self.stacked_on, name=name.replace('/', '_')
      )()
      for name in LORA_TARGETS[cfg.lora_targets]
    }


class _Factors(nn.Module):
  projection: tuple
  rank: int
  stacked: tuple[int, ...]
  stacked_on: tuple[str, ...]

  @nn.compact
  def __call__(self) -> dict:
    inputs, outputs, (from_axis, to_axis) = self.projection[:3]
    # The short axis is split over devices where the other is not split by 'embed'.
    down_axes = (*self.stacked_on, from_axis, None if from_axis == 'embed' else 'rank')
    up_axes = (*self.stacked_on, None if to_axis == 'embed' else 'rank', to_axis)
    down_init = nn.with_logical_partitioning(nn.initializers.normal(inputs**-0.5), down_axes)
    up_init = nn.with_logical_partitioning(nn.initializers.zeros, up_axes)
    return {
      'down': self.param('down', down_init, (*self.stacked, inputs, self.rank), jnp.float32),
      'up': self.param('up', up_init, (*self.stacked, self.rank, outputs), jnp.float32),
    }


class _NormScales(nn.Module):
  """Changes (R, N, D) of the scales of the two norms."""

  config: ModelConfig
  stacked: tuple[int, int]

  @nn.compact
  def __call__(self) -> dict:
    names, shape = ('recursions', 'layers', 'norm'), (*self.stacked, self.config.d_model)
    return {name: axes.Leaf('scale', shape, names, nn.initializers.zeros, name=name)() for name in NORMS}


def relax(config: ModelConfig, layers: dict, changes: dict) -> dict:
  """The parameters of some layers with what changes them: the block's as one step uses them, or a single layer's.

  Low-rank changes are added to the kernels once, which costs less than applying them to every
  token wherever tokens are more than a few times the rank.

  Args:
    layers: parameters of stacked layers, leaves (N, ...), or of one.
    changes: this step's entry of `Steps`, without the R axis; or {'lora': the layers' entry of `Adapters`}.
  """
  if 'lora' not in changes and 'norms' not in changes:
    return layers
  flat, linear = traverse_util.flatten_dict(layers, sep='/'), projections(config)
  for name in LORA_TARGETS[config.lora_targets] if 'lora' in changes else ():
    factors = changes['lora'][name.replace('/', '_')]
    change = jnp.einsum('...Ir,...rO->...IO', factors['down'], factors['up'])
    names = ('layers', *linear[name].axes)[-change.ndim :]
    change = axes.constrain(config.lora_alpha / config.lora_rank * change, *names)
    flat[f'{name}/kernel'] = kernels.plus(flat[f'{name}/kernel'], change)
  for name in NORMS if 'norms' in changes else ():
    flat[f'{name}/scale'] = flat[f'{name}/scale'] + changes['norms'][name]['scale']
  return traverse_util.unflatten_dict(flat, sep='/')


def merged(config: ModelConfig, params: dict) -> dict:
  """A model's parameters with its `Adapters` merged into the kernels; changes of single recursions stay."""
  others = {name: part for name, part in params.items() if name != 'lora'}
  changed = {
    part: relax(config, params[part], {'lora': params['lora'][part]}) for part in config.adapted_parts
  }
  return others | changed


def encode(x: jax.Array, step: dict) -> jax.Array:
  """The block's input: the residual stream plus the step's encoding, added (and its gradient summed) in float32."""
  if 'encoding' not in step:
    return x
  return (x.astype(jnp.float32) + step['encoding']['embedding']).astype(x.dtype)


def low_rank(residual_IO: jax.Array, rank: int, scale: float) -> tuple[jax.Array, jax.Array]:
  """Factors (down, up) of the best approximation of rank `rank` to a change of a kernel, by SVD.

  Args:
    residual_IO: what sharing lost, (..., inputs, outputs).
    scale: factor that `relax` multiplies the product with, lora_alpha / lora_rank.
  """
  left, values, right = jnp.linalg.svd(residual_IO, full_matrices=False)
  root = jnp.sqrt(values[..., :rank] / scale)
  return left[..., :rank] * root[..., None, :], right[..., :rank, :] * root[..., None]
