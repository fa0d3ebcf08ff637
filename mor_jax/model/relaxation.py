"""Relaxed sharing: what a recursion step may have of its own beside the shared block (paper, Table 16).

Three options, alone or together, all stacked on a leading R axis: low-rank changes of the
kernels (LoRA), changes of the norm scales (`share_norms=False`), and a learned vector added to
the block's input (recursion encoding). Steps begin alike: the changes start at zero.
"""

import jax
import jax.numpy as jnp
from flax import traverse_util

from mor_jax.config import ModelConfig
from mor_jax.model import axes

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
NORMS = ('attention_norm/scale', 'mlp_norm/scale')


def init_steps(config: ModelConfig, block: dict, key: jax.Array) -> dict:
  """What the R steps have of their own; an empty dict where nothing is relaxed.

  Args:
    block: parameters of the shared layers, leaves (N, ...), for their shapes.
  """
  shapes = traverse_util.flatten_dict(block, sep='/')
  steps = {}
  if config.lora_rank:
    lora_key, key = jax.random.split(key)
    steps['lora'] = {}
    for index, name in enumerate(LORA_TARGETS[config.lora_targets]):
      depth, inputs, outputs = shapes[f'{name}/kernel'].shape
      down_shape = config.recursions, depth, inputs, config.lora_rank
      down = jax.random.normal(jax.random.fold_in(lora_key, index), down_shape) * inputs**-0.5
      up = jnp.zeros((config.recursions, depth, config.lora_rank, outputs))
      steps['lora'][name.replace('/', '_')] = {'down': down, 'up': up}
  if not config.share_norms:
    steps['norms'] = {
      name.split('/')[0]: {'scale': jnp.zeros((config.recursions, *shapes[name].shape))} for name in NORMS
    }
  if config.recursion_encoding:
    encoding_RD = jax.random.normal(key, (config.recursions, config.d_model)) * config.init_std
    steps['encoding'] = {'embedding': encoding_RD}
  return steps


def relax(config: ModelConfig, block: dict, step: dict) -> dict:
  """The block's parameters as one step uses them.

  Low-rank changes are added to the kernels once, which costs less than applying them to every
  token wherever tokens are more than a few times the rank.

  Args:
    step: this step's entry of `init_steps`, without the R axis.
  """
  flat = traverse_util.flatten_dict(block, sep='/')
  for name in LORA_TARGETS[config.lora_targets] if 'lora' in step else ():
    factors = step['lora'][name.replace('/', '_')]
    change = jnp.einsum('NIr,NrO->NIO', factors['down'], factors['up'])
    change = axes.constrain(config.lora_alpha / config.lora_rank * change, 'layers', *axes.KERNELS[name])
    flat[f'{name}/kernel'] = flat[f'{name}/kernel'] + change
  for name in NORMS if 'norms' in step else ():
    flat[name] = flat[name] + step['norms'][name.split('/')[0]]['scale']
  return traverse_util.unflatten_dict(flat, sep='/')


def encode(x: jax.Array, step: dict) -> jax.Array:
  """The block's input: the residual stream plus the step's encoding."""
  if 'encoding' not in step:
    return x
  return x + step['encoding']['embedding'].astype(x.dtype)


def low_rank(residual_IO: jax.Array, rank: int, scale: float) -> tuple[jax.Array, jax.Array]:
  """Factors (down, up) of the best approximation of rank `rank` to a change of a kernel, by SVD.

  Args:
    residual_IO: what sharing lost, (..., inputs, outputs).
    scale: factor that `relax` multiplies the product with, lora_alpha / lora_rank.
  """
  left, values, right = jnp.linalg.svd(residual_IO, full_matrices=False)
  root = jnp.sqrt(values[..., :rank] / scale)
  return left[..., :rank] * root[..., None, :], right[..., :rank, :] * root[..., None]
