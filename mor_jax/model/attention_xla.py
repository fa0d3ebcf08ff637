"""Attention in plain XLA, written for CPUs: blocks of queries, each against the keys it can see.

A block's scores fit into a core's cache, and keys after its last query are never
multiplied, which saves half the work of a long row.
"""

import jax
import jax.numpy as jnp

from mor_jax.model.context import TokenContext

# Finite, so that a query which sees no key (padding) gives a finite, unused result.
MASKED_SCORE = -1e30

BLOCK = 128  # queries of a block (measured: benchmarks/attention.py) ...
MOST_BLOCKS = 8  # ... unless a row has too many for the size of the program
KEEP_UP_TO = 1024  # queries; of longer rows the backward pass computes the weights again


def visible(queries: TokenContext, keys: TokenContext) -> jax.Array:
  """Mask (B, T, S): same segment, and the key not later than the query."""
  not_later_BTS = keys.positions_BC[:, None, :] <= queries.positions_BC[:, :, None]
  same_segment_BTS = keys.segments_BC[:, None, :] == queries.segments_BC[:, :, None]
  return not_later_BTS & same_segment_BTS


def attend(
  q_BTHE: jax.Array, k_BSKE: jax.Array, v_BSKE: jax.Array, queries: TokenContext, keys: TokenContext
) -> jax.Array:
  """As `attention.attend`."""
  batch, length, heads, width = q_BTHE.shape
  row, kv_heads = k_BSKE.shape[1:3]
  q_BTKGE = (q_BTHE * width**-0.5).reshape(batch, length, kv_heads, heads // kv_heads, width)
  q_BKGTE = q_BTKGE.transpose(0, 2, 3, 1, 4)
  k_BKES, v_BKSE = k_BSKE.transpose(0, 2, 3, 1), v_BSKE.transpose(0, 2, 1, 3)
  attend_block = _attend_block if length <= KEEP_UP_TO else jax.checkpoint(_attend_block)
  size = max(BLOCK, -(-length // MOST_BLOCKS))
  blocks = []
  for begin in range(0, length, size):
    end = min(length, begin + size)
    seen = row - length + end  # as many queries follow, each of which has a later key of its own
    own, before = _cut(queries, begin, end), _cut(keys, 0, seen)
    blocks.append(
      attend_block(
        q_BKGTE[..., begin:end, :], k_BKES[..., :seen], v_BKSE[..., :seen, :], visible(own, before)
      )
    )
  return jnp.concatenate(blocks, axis=3).transpose(0, 3, 1, 2, 4).reshape(q_BTHE.shape)


def _attend_block(q_BKGTE, k_BKES, v_BKSE, visible_BTS):
  """Two batched products per key/value head, the queries of its group flattened into one matrix."""
  batch, kv_heads, groups, length, width = q_BKGTE.shape
  q_BKME = q_BKGTE.reshape(batch, kv_heads, groups * length, width)
  scores_BKMS = jnp.matmul(q_BKME, k_BKES, preferred_element_type=jnp.float32)
  scores_BKGTS = scores_BKMS.reshape(batch, kv_heads, groups, length, -1)
  scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS, MASKED_SCORE)
  largest_BKGT1 = jax.lax.stop_gradient(scores_BKGTS.max(axis=-1, keepdims=True))
  weights_BKGTS = jnp.exp(scores_BKGTS - largest_BKGT1)
  total_BKGT1 = weights_BKGTS.sum(axis=-1, keepdims=True)
  weights_BKMS = weights_BKGTS.reshape(scores_BKMS.shape).astype(v_BKSE.dtype)
  out_BKME = jnp.matmul(weights_BKMS, v_BKSE, preferred_element_type=jnp.float32)
  # Divided after the product: E numbers a query instead of S.
  return (out_BKME.reshape((*total_BKGT1.shape[:-1], width)) / total_BKGT1).astype(q_BKGTE.dtype)


def _cut(context: TokenContext, begin: int, end: int) -> TokenContext:
  return jax.tree.map(lambda leaf_BC: leaf_BC[:, begin:end], context)
