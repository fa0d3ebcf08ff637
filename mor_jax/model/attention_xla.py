"""Attention in plain XLA, written for CPUs: blocks of queries, each against the keys it can see.

A block's scores fit into a core's cache, and keys after its last query are never
multiplied, which saves half the work of a long row. The backward pass computes the weights
again, block by block: writing them to memory and reading them back would take longer.
"""

from functools import partial

import jax
import jax.numpy as jnp

from mor_jax.model.context import TokenContext

# Finite, so that a query which sees no key (padding) gives a finite, unused result.
MASKED_SCORE = -1e30

BLOCK = 128  # queries of a block (measured: benchmarks/attention.py) ...
MOST_BLOCKS = 8  # ... unless a row has too many for the size of the program
AT_ONCE = 1024  # keys; the blocks of longer rows run one after the other, for the sake of memory


def visible(queries: TokenContext, keys: TokenContext, window: int | None = None) -> jax.Array:
  """Mask (B, T, S): same segment, and the key not later than the query, nor `window` positions before it or more."""
  not_later_BTS = keys.positions_BC[:, None, :] <= queries.positions_BC[:, :, None]
  same_segment_BTS = keys.segments_BC[:, None, :] == queries.segments_BC[:, :, None]
  if window is None:
    return not_later_BTS & same_segment_BTS
  near_BTS = queries.positions_BC[:, :, None] - keys.positions_BC[:, None, :] < window
  return not_later_BTS & near_BTS & same_segment_BTS


def attend(
  q_BTHE: jax.Array,
  k_BSKE: jax.Array,
  v_BSKE: jax.Array,
  queries: TokenContext,
  keys: TokenContext,
  window: int | None = None,
) -> jax.Array:
  """As `attention.attend`."""
  batch, length, heads, width = q_BTHE.shape
  kv_heads = k_BSKE.shape[2]
  q_BTKGE = (q_BTHE * width**-0.5).reshape(batch, length, kv_heads, heads // kv_heads, width)
  k_BKSE, v_BKSE = k_BSKE.transpose(0, 2, 1, 3), v_BSKE.transpose(0, 2, 1, 3)
  out_BKGTE = _attend(window, q_BTKGE.transpose(0, 2, 3, 1, 4), k_BKSE, v_BKSE, queries, keys)
  return out_BKGTE.transpose(0, 3, 1, 2, 4).reshape(q_BTHE.shape)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(window, q_BKGTE, k_BKSE, v_BKSE, queries, keys):
  """Attention of scaled queries, with heads before tokens."""
  return _forward(window, q_BKGTE, k_BKSE, v_BKSE, queries, keys)[0]


def _forward(window, q_BKGTE, k_BKSE, v_BKSE, queries, keys):
  outputs, normalizers = [], []
  for begin, end, seen in _blocks(q_BKGTE.shape[3], k_BKSE.shape[2]):
    q_BKME = _after(outputs, _folded(q_BKGTE, begin, end), k_BKSE)
    scores_BKMS = _scores(window, q_BKME, k_BKSE, queries, keys, begin, end, seen)
    largest_BKM1 = scores_BKMS.max(axis=-1, keepdims=True)
    weights_BKMS = jnp.exp(scores_BKMS - largest_BKM1)
    total_BKM1 = weights_BKMS.sum(axis=-1, keepdims=True)
    out_BKME = _product(weights_BKMS.astype(v_BKSE.dtype), v_BKSE[:, :, :seen])
    # Divided after the product: E numbers a query instead of S.
    out_BKME = (out_BKME / total_BKM1).astype(q_BKGTE.dtype)
    outputs.append(_unfolded(out_BKME, q_BKGTE))
    normalizers.append((largest_BKM1, total_BKM1))
  out_BKGTE = jnp.concatenate(outputs, axis=3)
  return out_BKGTE, (q_BKGTE, k_BKSE, v_BKSE, queries, keys, normalizers)


def _backward(window, kept, grad_BKGTE):
  q_BKGTE, k_BKSE, v_BKSE, queries, keys, normalizers = kept
  grads_q, grad_k_BKSE, grad_v_BKSE = [], 0.0, 0.0
  blocks = _blocks(q_BKGTE.shape[3], k_BKSE.shape[2])
  for (begin, end, seen), (largest_BKM1, total_BKM1) in zip(blocks, normalizers, strict=True):
    q_BKME = _after(grads_q, _folded(q_BKGTE, begin, end), k_BKSE)
    scores_BKMS = _scores(window, q_BKME, k_BKSE, queries, keys, begin, end, seen)
    weights_BKMS = jnp.exp(scores_BKMS - largest_BKM1)
    grad_BKME = _after(grads_q, _folded(grad_BKGTE, begin, end), k_BKSE).astype(jnp.float32) / total_BKM1
    grad_BKME = grad_BKME.astype(v_BKSE.dtype)
    grad_weights_BKMS = _product(grad_BKME, v_BKSE[:, :, :seen], transposed=True)
    # The product of output and its gradient would be the same number, but not to the last bit the mean of what it is
    # subtracted from: gradients of queries and keys would have several times the rounding error.
    mean_BKM1 = (weights_BKMS * grad_weights_BKMS).sum(axis=-1, keepdims=True) / total_BKM1
    grad_scores_BKMS = (weights_BKMS * (grad_weights_BKMS - mean_BKM1)).astype(q_BKGTE.dtype)
    grads_q.append(_unfolded(_product(grad_scores_BKMS, k_BKSE[:, :, :seen]), q_BKGTE))
    later = ((0, 0), (0, 0), (0, k_BKSE.shape[2] - seen), (0, 0))
    grad_k_BKSE += jnp.pad(_product(grad_scores_BKMS, q_BKME, flipped=True), later)
    grad_v_BKSE += jnp.pad(_product(weights_BKMS.astype(v_BKSE.dtype), grad_BKME, flipped=True), later)
  grad_q_BKGTE = jnp.concatenate(grads_q, axis=3).astype(q_BKGTE.dtype)
  return grad_q_BKGTE, grad_k_BKSE.astype(k_BKSE.dtype), grad_v_BKSE.astype(v_BKSE.dtype), None, None


_attend.defvjp(_forward, _backward)


def _blocks(length: int, row: int) -> list[tuple[int, int, int]]:
  """(first query, the one after the last, keys that they may see) of every block."""
  size = max(BLOCK, -(-length // MOST_BLOCKS))
  ends = [min(length, begin + size) for begin in range(0, length, size)]
  # As many queries follow a block, each of which has a later key of its own.
  return [(begin, end, row - length + end) for begin, end in zip(range(0, length, size), ends, strict=True)]


def _after(earlier, block_BKME, k_BKSE):
  """The block; of a long row once the last of the earlier results is there.

  Without a need to wait the compiler runs blocks side by side, and the scores of all exist at once.
  """
  if not earlier or k_BKSE.shape[2] <= AT_ONCE:
    return block_BKME
  # jax.lax.optimization_barrier says the same, but the compiler for CPUs drops it before it orders operations.
  return block_BKME + 0 * earlier[-1][:, :1, 0, :1, :1].astype(block_BKME.dtype)


def _scores(window, q_BKME, k_BKSE, queries, keys, begin, end, seen):
  """Masked scores (B, K, M, S) in float32 of a block, the queries of a group flattened into one matrix."""
  scores_BKMS = _product(q_BKME, k_BKSE[:, :, :seen], transposed=True)
  visible_BTS = visible(_cut(queries, begin, end), _cut(keys, 0, seen), window)
  visible_BKMS = jnp.tile(visible_BTS, (1, q_BKME.shape[2] // (end - begin), 1))[:, None]
  return jnp.where(visible_BKMS, scores_BKMS, MASKED_SCORE)


def _product(left_BKMN, right, transposed=False, flipped=False):
  """Batched product in float32; with the right matrices transposed, or the left ones (flipped)."""
  contracted = (2 if flipped else 3, 3 if transposed else 2)
  dimensions = (((contracted[0],), (contracted[1],)), ((0, 1), (0, 1)))
  return jax.lax.dot_general(left_BKMN, right, dimensions, preferred_element_type=jnp.float32)


def _folded(a_BKGTE, begin, end):
  """Queries of a block as one matrix (B, K, M, E) for each key/value head."""
  block = a_BKGTE[..., begin:end, :]
  return block.reshape(*block.shape[:2], -1, block.shape[-1])


def _unfolded(a_BKME, like_BKGTE):
  """The way back from `_folded`."""
  batch, kv_heads, groups, _, width = like_BKGTE.shape
  return a_BKME.reshape(batch, kv_heads, groups, -1, width)


def _cut(context: TokenContext, begin: int, end: int) -> TokenContext:
  return jax.tree.map(lambda leaf_BC: leaf_BC[:, begin:end], context)
