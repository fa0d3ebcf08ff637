"""The decoder layer of Llama and its kin: RMSNorm, rotary attention, SwiGLU, pre-norm residuals.

Written once for training, prefill and decoding. What differs between them is handed in: a memory
(`memory.py`), which says where the keys and values come from, and what a lane has of its own.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from mor_jax.config import ModelConfig
from mor_jax.model import axes, kernels
from mor_jax.model.memory import Memory
from mor_jax.model.rotary import Rotation, only_where, rotate

LAYER_INPUT = 'layer_input'  # name of the residual stream that enters a layer, for remat policies


class Projection(NamedTuple):
  """A kernel of the layer: its sizes, the logical names of its two axes, and whether a bias is added."""

  inputs: int
  outputs: int
  axes: tuple[str, str]
  has_bias: bool = False


def projections(config: ModelConfig) -> dict[str, Projection]:
  """All kernels of a decoder layer by name, 'attention/query' and so on."""
  width, mlp = config.d_model, config.mlp_dim
  some, every = config.attention_bias != 'none', config.attention_bias == 'all'
  heads, kv_heads = (count * config.head_width for count in (config.num_heads, config.num_kv_heads))
  return {
    'attention/query': Projection(width, heads, ('embed', 'heads'), some),
    'attention/key': Projection(width, kv_heads, ('embed', 'kv_heads'), some),
    'attention/value': Projection(width, kv_heads, ('embed', 'kv_heads'), some),
    'attention/output': Projection(heads, width, ('heads', 'embed'), every),
    'mlp/gate': Projection(width, mlp, ('embed', 'mlp')),
    'mlp/up': Projection(width, mlp, ('embed', 'mlp')),
    'mlp/down': Projection(mlp, width, ('mlp', 'embed')),
  }


@struct.dataclass
class PerLayer:
  """What one layer of a stack is handed beside the residual stream; stacked on a leading layer axis.

  Attributes:
    index: number of the layer, or of its pool entry where the memory is a slot cache.
    kept: keys and values that the memory has of this layer: (k_BSKE, v_BSKE), a cache's pool, or None.
    own: changes of kernels and norm scales that differ from lane to lane (relaxed sharing in decoding):
      'lora' with factors down (B, I, r) and up (B, r, O), 'norms' with scales (B, D). Training merges
      these changes into the parameters instead (`relaxation.relax`).
    rotates: whether the layer rotates queries and keys; None: all layers of the model do.
  """

  index: jax.Array
  kept: Any = None
  own: dict = struct.field(default_factory=dict)
  rotates: jax.Array | None = None


class RMSNorm(nn.Module):
  """Root mean square norm (Zhang and Sennrich 2019) with a learned scale (D,); statistics in float32."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x: jax.Array, change_BD: jax.Array | None = None) -> jax.Array:
    """Normed x (..., D) in the model's dtype; `change_BD` is added to the scale of each row of x (B, C, D)."""
    init = nn.with_logical_partitioning(nn.initializers.ones, ('norm',))
    scale = self.param('scale', init, (x.shape[-1],), jnp.float32)
    if change_BD is not None:
      scale = scale + change_BD[:, None]
    x32 = x.astype(jnp.float32)
    root = jax.lax.rsqrt(jnp.square(x32).mean(axis=-1, keepdims=True) + self.config.norm_epsilon)
    return (x32 * (root * scale)).astype(jnp.dtype(self.config.dtype))


class Linear(nn.Module):
  """Matrix product, and bias if any; leading axes are flattened, since XLA is fastest on plain matrices."""

  config: ModelConfig
  projection: Projection
  std: float

  @nn.compact
  def __call__(self, x: jax.Array, factors: dict | None = None) -> jax.Array:
    """x (B, C, I) -> (B, C, O); `factors` of a low-rank change, of each lane: down (B, I, r), up (B, r, O)."""
    cfg, names = self.config, self.projection.axes
    chex.assert_axis_dimension(x, -1, self.projection.inputs)
    init = nn.with_logical_partitioning(nn.initializers.normal(self.std), names)
    shape, dtype = (self.projection.inputs, self.projection.outputs), jnp.dtype(cfg.dtype)
    kernel_IO = kernels.parameter(self, 'kernel', init, shape)
    kernel_IO = kernels.gather(kernels.cast(kernel_IO, dtype), names)
    y = kernels.product(x.reshape(-1, x.shape[-1]).astype(dtype), kernel_IO)
    if self.projection.has_bias:
      init = nn.with_logical_partitioning(nn.initializers.zeros, names[1:])
      bias_O = self.param('bias', init, (self.projection.outputs,), jnp.float32)
      y = y + axes.gather_parameter(bias_O.astype(dtype), names[1:])
    y = y.reshape(*x.shape[:-1], self.projection.outputs)
    if factors is not None:
      low = x.astype(jnp.float32) @ factors['down'] @ factors['up']
      y = (y + cfg.lora_alpha / cfg.lora_rank * low).astype(dtype)
    return axes.constrain(y, 'batch', 'length', 'width' if names[1] == 'embed' else names[1])


class Attention(nn.Module):
  """Grouped-query attention from the layer's tokens to what the memory gives them."""

  config: ModelConfig
  uses: int = 1

  @nn.compact
  def __call__(
    self, x_BCD: jax.Array, layer: PerLayer, memory: Memory, rotation: Rotation
  ) -> tuple[jax.Array, Any]:
    cfg = self.config
    batch, length, _ = x_BCD.shape
    linears, lora = projections(cfg), layer.own.get('lora', {})
    turns = only_where(layer.rotates, rotation)

    def linear(name, x):
      std = cfg.output_std(self.uses) if name == 'output' else cfg.weight_std
      made = Linear(cfg, linears[f'attention/{name}'], std, name=name)
      return made(x, lora.get(f'attention_{name}'))

    def heads(name, count):
      return linear(name, x_BCD).reshape(batch, length, count, cfg.head_width)

    def turned(name, count):
      x_BCHE = heads(name, count)
      if cfg.qk_norm:
        x_BCHE = RMSNorm(cfg, name=f'{name}_norm')(x_BCHE)
      return rotate(x_BCHE, turns)

    def own_keys_and_values():
      return turned('key', cfg.num_kv_heads), heads('value', cfg.num_kv_heads)

    q_BCHE = turned('query', cfg.num_heads)
    out_BCHE, kept = memory.attend(q_BCHE, own_keys_and_values, layer, cfg.attention, cfg.sliding_window)
    chex.assert_equal_shape([q_BCHE, out_BCHE])
    return linear('output', out_BCHE.reshape(batch, length, -1)), kept


class MLP(nn.Module):
  """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x))."""

  config: ModelConfig
  uses: int = 1

  @nn.compact
  def __call__(self, x_BCD: jax.Array, layer: PerLayer) -> jax.Array:
    cfg = self.config
    linears, lora = projections(cfg), layer.own.get('lora', {})

    def linear(name):
      std = cfg.output_std(self.uses) if name == 'down' else cfg.weight_std
      return Linear(cfg, linears[f'mlp/{name}'], std, name=name)

    gate_BCF = linear('gate')(x_BCD, lora.get('mlp_gate'))
    up_BCF = linear('up')(x_BCD, lora.get('mlp_up'))

    # The backward pass keeps only the two inputs of this: writing silu, its parts and the product to memory
    # and reading them back takes longer than computing them again.
    @nn.remat
    def close(down, gate_BCF, up_BCF):
      return down(nn.silu(gate_BCF) * up_BCF, lora.get('mlp_down'))

    return close(linear('down'), gate_BCF, up_BCF)


class DecoderLayer(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)); also returns what the memory keeps of the layer.

  Attributes:
    uses: how often a token passes the layer, for its initial weights.
  """

  config: ModelConfig
  uses: int = 1

  @nn.compact
  def __call__(
    self, x_BCD: jax.Array, layer: PerLayer, memory: Memory, rotation: Rotation
  ) -> tuple[jax.Array, Any]:
    """One layer on C tokens of each row or lane.

    Args:
      x_BCD: residual stream.
      layer: what this layer has of its own.
      memory: which keys and values the tokens attend to, and what is kept of theirs.
      rotation: cosines and sines of the tokens' positions.
    """
    cfg = self.config
    chex.assert_shape(x_BCD, (None, None, cfg.d_model))
    x_BCD = checkpoint_name(x_BCD, LAYER_INPUT)
    norms = layer.own.get('norms', {})

    def normed(name, x_BCD):
      return RMSNorm(cfg, name=name)(x_BCD, norms[name]['scale'] if name in norms else None)

    attention = Attention(cfg, self.uses, name='attention')
    attended_BCD, kept = attention(normed('attention_norm', x_BCD), layer, memory, rotation)
    x_BCD = x_BCD + attended_BCD
    return x_BCD + MLP(cfg, self.uses, name='mlp')(normed('mlp_norm', x_BCD), layer), kept
