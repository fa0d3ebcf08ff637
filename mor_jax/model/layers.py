"""The decoder layer of Llama and SmolLM: RMSNorm, rotary attention, SwiGLU, pre-norm residuals."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from mor_jax.config import ModelConfig
from mor_jax.model import attention, axes, tokens
from mor_jax.model.context import TokenContext


@struct.dataclass
class Memory:
  """Keys and values that stand ready before a layer runs (recursive KV sharing).

  Attributes:
    keys: rotated keys (N, B, S, K, E) of N layers; inside a layer without the leading axis.
    values: values (N, B, S, K, E).
    context: positions and segments of the S remembered tokens.
    indices_BC: places that the layer's own tokens overwrite with their own keys and values
      before attending (the paper's hybrid); None: the memory is only read, and the layer
      computes queries alone.
    chosen_BC: which of the layer's tokens may write.
  """

  keys: jax.Array
  values: jax.Array
  context: TokenContext
  indices_BC: jax.Array | None = None
  chosen_BC: jax.Array | None = None

  def overwritten(self, k_BCKE: jax.Array, v_BCKE: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values of one layer with those of its own tokens put in their places."""
    writes_BC11 = self.chosen_BC[..., None, None]

    def put(old_BSKE, new_BCKE):
      kept_BCKE = jnp.where(writes_BC11, new_BCKE, tokens.take(old_BSKE, self.indices_BC))
      return tokens.put(old_BSKE, self.indices_BC, kept_BCKE)

    return put(self.keys, k_BCKE), put(self.values, v_BCKE)


@struct.dataclass
class LayerInputs:
  """What every layer of a stack needs beside its own input, computed once for all of them.

  Attributes:
    cos_BC1E, sin_BC1E: rotation of the tokens.
    queries: where they come from.
    keys: where those that they attend to come from; None: they attend to one another.
  """

  cos_BC1E: jax.Array
  sin_BC1E: jax.Array
  queries: TokenContext
  keys: TokenContext | None


class Linear(nn.Module):
  """Matrix product without bias; leading axes are flattened, since XLA is fastest on plain matrices.

  `axes` are the logical names of the kernel's two axes.
  """

  features: int
  config: ModelConfig
  axes: tuple[str, str]

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    init = nn.initializers.normal(self.config.init_std)
    kernel_IO = self.param('kernel', init, (x.shape[-1], self.features), jnp.float32)
    dtype = jnp.dtype(self.config.dtype)
    kernel_IO = axes.gather_parameter(kernel_IO.astype(dtype), self.axes)
    y = x.reshape(-1, x.shape[-1]).astype(dtype) @ kernel_IO
    y = y.reshape(*x.shape[:-1], self.features)
    return axes.constrain(y, 'batch', 'length', 'width' if self.axes[1] == 'embed' else self.axes[1])


def rotation(config: ModelConfig, positions_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Cosines and sines (B, C, 1, E/2) of the rotary position embedding (Su et al. 2021)."""
  half = config.head_width // 2
  frequencies_E = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  if config.rope_scaling == 'linear':
    frequencies_E /= config.rope_scaling_factor
  elif config.rope_scaling == 'llama3':
    turns_E = config.rope_original_length * frequencies_E / (2 * jnp.pi)
    low, high = config.rope_low_frequency_factor, config.rope_high_frequency_factor
    kept_E = jnp.clip((turns_E - low) / (high - low), 0, 1)
    frequencies_E *= kept_E + (1 - kept_E) / config.rope_scaling_factor
  angles_BC1E = positions_BC[:, :, None, None].astype(jnp.float32) * frequencies_E
  return jnp.cos(angles_BC1E), jnp.sin(angles_BC1E)


def rotate(x_BCHE: jax.Array, cos_BC1E: jax.Array, sin_BC1E: jax.Array) -> jax.Array:
  """Rotates element i together with element i + E/2, as Llama does."""
  left, right = jnp.split(x_BCHE.astype(jnp.float32), 2, axis=-1)
  rotated = left * cos_BC1E - right * sin_BC1E, right * cos_BC1E + left * sin_BC1E
  return jnp.concatenate(rotated, axis=-1).astype(x_BCHE.dtype)


class Attention(nn.Module):
  """Grouped-query attention among the given tokens, or from them to a memory."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self, x_BCD: jax.Array, inputs: LayerInputs, memory: Memory | None
  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    cfg = self.config
    batch, length, _ = x_BCD.shape

    def heads(name, count):
      linear = Linear(count * cfg.head_width, cfg, axes.KERNELS[f'attention/{name}'], name=name)
      return linear(x_BCD).reshape(batch, length, count, -1)

    q_BCHE = rotate(heads('query', cfg.num_heads), inputs.cos_BC1E, inputs.sin_BC1E)
    if memory is not None and memory.indices_BC is None:
      keys_and_values = memory.keys, memory.values
    else:
      k_BCKE = rotate(heads('key', cfg.num_kv_heads), inputs.cos_BC1E, inputs.sin_BC1E)
      v_BCKE = heads('value', cfg.num_kv_heads)
      keys_and_values = (k_BCKE, v_BCKE) if memory is None else memory.overwritten(k_BCKE, v_BCKE)
    out_BCHE = attention.attend(q_BCHE, *keys_and_values, inputs.queries, inputs.keys, cfg.attention)
    output = Linear(cfg.d_model, cfg, axes.KERNELS['attention/output'], name='output')
    return output(out_BCHE.reshape(batch, length, -1)), keys_and_values


class MLP(nn.Module):
  """SwiGLU: down(silu(gate(x)) * up(x))."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BCD: jax.Array) -> jax.Array:
    cfg = self.config
    gate_BCF = Linear(cfg.mlp_dim, cfg, axes.KERNELS['mlp/gate'], name='gate')(x_BCD)
    up_BCF = Linear(cfg.mlp_dim, cfg, axes.KERNELS['mlp/up'], name='up')(x_BCD)
    down = Linear(cfg.d_model, cfg, axes.KERNELS['mlp/down'], name='down')

    # Of this only the two inputs are kept for the backward pass: writing silu, its parts and the product to memory
    # and reading them back takes longer than computing them again.
    @nn.remat
    def close(down, gate_BCF, up_BCF):
      return down(nn.silu(gate_BCF) * up_BCF)

    return close(down, gate_BCF, up_BCF)


class DecoderLayer(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)); also returns the keys and values it attended to."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self, x_BCD: jax.Array, inputs: LayerInputs, memory: Memory | None = None
  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    cfg = self.config
    normed_BCD = norm(cfg, 'attention_norm')(x_BCD)
    attended_BCD, keys_and_values = Attention(cfg, name='attention')(normed_BCD, inputs, memory)
    x_BCD = x_BCD + attended_BCD
    return x_BCD + MLP(cfg, name='mlp')(norm(cfg, 'mlp_norm')(x_BCD)), keys_and_values


def norm(config: ModelConfig, name: str) -> nn.RMSNorm:
  """RMSNorm with statistics in float32 and a learned scale (D,)."""
  return nn.RMSNorm(epsilon=config.norm_epsilon, dtype=jnp.dtype(config.dtype), name=name)
