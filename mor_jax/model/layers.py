"""The decoder layer of Llama and SmolLM: RMSNorm, rotary attention, SwiGLU, pre-norm residuals."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from mor_jax.config import ModelConfig
from mor_jax.model import attention

NO_SEGMENT = -1  # tokens that take no part in a step; unlike padding (0) they are real tokens


@struct.dataclass
class TokenContext:
  """Where the C tokens that a layer works on come from.

  Attributes:
    positions_BC: position of each token in its segment, which sets its rotation and causal order.
    segments_BC: segment id; only tokens of one segment see each other. 0 is padding.
  """

  positions_BC: jax.Array
  segments_BC: jax.Array

  def take(self, indices_BC: jax.Array, chosen_BC: jax.Array) -> 'TokenContext':
    """The context of gathered tokens; those not truly chosen are cut off from the others."""
    positions_BC = jnp.take_along_axis(self.positions_BC, indices_BC, axis=1)
    segments_BC = jnp.take_along_axis(self.segments_BC, indices_BC, axis=1)
    return TokenContext(positions_BC, jnp.where(chosen_BC, segments_BC, NO_SEGMENT))

  def only(self, chosen_BC: jax.Array) -> 'TokenContext':
    """The same tokens, those not chosen cut off from the others."""
    return self.replace(segments_BC=jnp.where(chosen_BC, self.segments_BC, NO_SEGMENT))


class Linear(nn.Module):
  """Matrix product without bias; leading axes are flattened, since XLA is fastest on plain matrices."""

  features: int
  config: ModelConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    init = nn.initializers.normal(self.config.init_std)
    kernel_IO = self.param('kernel', init, (x.shape[-1], self.features), jnp.float32)
    dtype = jnp.dtype(self.config.dtype)
    y = x.reshape(-1, x.shape[-1]).astype(dtype) @ kernel_IO.astype(dtype)
    return y.reshape(*x.shape[:-1], self.features)


def rotate(x_BCHE: jax.Array, positions_BC: jax.Array, theta: float) -> jax.Array:
  """Rotary position embedding, pairing element i with i + E/2 (Su et al. 2021, as in Llama)."""
  half = x_BCHE.shape[-1] // 2
  frequencies_E = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angles_BC1E = positions_BC[:, :, None, None].astype(jnp.float32) * frequencies_E
  cos, sin = jnp.cos(angles_BC1E), jnp.sin(angles_BC1E)
  left, right = x_BCHE[..., :half].astype(jnp.float32), x_BCHE[..., half:].astype(jnp.float32)
  return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x_BCHE.dtype)


class Attention(nn.Module):
  """Grouped-query self-attention among the given tokens."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BCD: jax.Array, context: TokenContext) -> jax.Array:
    cfg = self.config
    batch, length, _ = x_BCD.shape

    def heads(name, count):
      return Linear(count * cfg.head_width, cfg, name=name)(x_BCD).reshape(batch, length, count, -1)

    positions_BC, segments_BC = context.positions_BC, context.segments_BC
    q_BCHE = rotate(heads('query', cfg.num_heads), positions_BC, cfg.rope_theta)
    k_BCKE = rotate(heads('key', cfg.num_kv_heads), positions_BC, cfg.rope_theta)
    v_BCKE = heads('value', cfg.num_kv_heads)
    visible_BCC = attention.visible(positions_BC, positions_BC, segments_BC, segments_BC)
    out_BCHE = attention.attend(q_BCHE, k_BCKE, v_BCKE, visible_BCC, cfg.attention)
    return Linear(cfg.d_model, cfg, name='output')(out_BCHE.reshape(batch, length, -1))


class MLP(nn.Module):
  """SwiGLU: down(silu(gate(x)) * up(x))."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BCD: jax.Array) -> jax.Array:
    cfg = self.config
    gate_BCF = Linear(cfg.mlp_dim, cfg, name='gate')(x_BCD)
    up_BCF = Linear(cfg.mlp_dim, cfg, name='up')(x_BCD)
    return Linear(cfg.d_model, cfg, name='down')(nn.silu(gate_BCF) * up_BCF)


class DecoderLayer(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x))."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BCD: jax.Array, context: TokenContext) -> jax.Array:
    cfg = self.config
    x_BCD = x_BCD + Attention(cfg, name='attention')(norm(cfg, 'attention_norm')(x_BCD), context)
    return x_BCD + MLP(cfg, name='mlp')(norm(cfg, 'mlp_norm')(x_BCD))


def norm(config: ModelConfig, name: str) -> nn.RMSNorm:
  """RMSNorm with statistics in float32 and a learned scale (D,)."""
  return nn.RMSNorm(epsilon=config.norm_epsilon, dtype=jnp.dtype(config.dtype), name=name)


def init_stack(config: ModelConfig, key: jax.Array) -> dict:
  """Parameters of all U unique layers: the tree of one DecoderLayer, every leaf with a leading U axis."""
  x_BCD = jnp.zeros((1, 1, config.d_model), jnp.dtype(config.dtype))
  context = TokenContext(*(jnp.zeros((1, 1), jnp.int32),) * 2)
  layer = DecoderLayer(config, parent=None)
  keys_U = jax.random.split(key, config.num_unique_layers)
  return jax.vmap(lambda layer_key: layer.init(layer_key, x_BCD, context)['params'])(keys_U)


def apply_stack(
  config: ModelConfig, layers_N: dict, x_BCD: jax.Array, context: TokenContext, repeats: int = 1
) -> jax.Array:
  """Applies N stacked layers in order, each `repeats` times, as one scan; N may be 0.

  Activations are kept for the backward pass as `config.remat` says.
  """
  if jax.tree.leaves(layers_N)[0].shape[0] == 0:
    return x_BCD
  layer = DecoderLayer(config, parent=None)

  def body(x_BCD, params):
    def once(x_BCD, _):
      return layer.apply({'params': params}, x_BCD, context), None

    if repeats == 1:
      return once(x_BCD, None)
    return jax.lax.scan(once, x_BCD, length=repeats, unroll=config.unroll_layers)

  if config.remat in ('full', 'block'):
    body = jax.checkpoint(body, prevent_cse=False)
  elif config.remat == 'dots':
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    body = jax.checkpoint(body, prevent_cse=False, policy=policy)
  return jax.lax.scan(body, x_BCD, layers_N, unroll=config.unroll_layers)[0]
