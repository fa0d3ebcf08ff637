"""Attention among tokens of a row by JAX's splash kernel for TPUs.

Gathered tokens lie in the order of their row, so the causal order among them is that of their places within
each segment: a plain causal mask and segment ids are all that the kernel has to know.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from mor_jax.model.attention_pallas import block_size
from mor_jax.model.context import TokenContext

FILLING = -3  # segment of what fills up the last block


def attend(
  q_BTHE: jax.Array, k_BTKE: jax.Array, v_BTKE: jax.Array, tokens: TokenContext, interpret: bool = False
) -> jax.Array:
  """As `attention.attend`, of tokens to one another.

  Args:
    interpret: run without a TPU, slowly, for tests.
  """
  length, heads = q_BTHE.shape[1:3]
  block = block_size(length)
  more = -length % block

  def heads_first(a_BTHE):
    return jnp.pad(a_BTHE, ((0, 0), (0, more), (0, 0), (0, 0))).transpose(0, 2, 1, 3)

  segments_BT = jnp.pad(tokens.segments_BC, ((0, 0), (0, more)), constant_values=FILLING)
  names = ('block_q', 'block_kv', 'block_q_dkv', 'block_kv_dkv', 'block_q_dq', 'block_kv_dq')
  kernel = splash.make_splash_mha(
    masks.MultiHeadMask([masks.CausalMask((length + more,) * 2)] * heads),
    block_sizes=splash.BlockSizes(**dict.fromkeys(names, block)),
    head_shards=1,
    q_seq_shards=1,
    interpret=interpret,
  )
  q_BHTE = heads_first(q_BTHE * q_BTHE.shape[-1] ** -0.5)
  segment_ids = splash.SegmentIds(segments_BT, segments_BT)
  out_BHTE = jax.vmap(kernel)(q_BHTE, heads_first(k_BTKE), heads_first(v_BTKE), segment_ids)
  return out_BHTE[:, :, :length].transpose(0, 2, 1, 3)
