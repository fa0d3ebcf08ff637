"""Flash attention for TPUs whose queries may be any part of a row, in order: a Pallas kernel.

Recursive KV sharing asks for it: a recursion's few queries attend to the keys and values of all tokens,
`position_k <= position_q`, within the segment and the window. Scores exist a block at a time; the backward
pass makes them again from the kept log-sum-exp (Dao et al. 2022). Blocks of which no query sees a key, by the
ranges of their positions and segments, are neither fetched nor computed.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mor_jax.model.context import TokenContext

LOWEST = -1e30  # finite, since the difference of two infinities is no number
SMALLEST_BLOCK = 128  # queries or keys; a TPU's registers have 128 lanes
LARGER = (4, 2)  # blocks of so many times that are preferred

_OWN_DIMENSION = ('parallel', 'parallel', 'parallel', 'arbitrary')


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Sizes: `queries` and `keys` of a block, and the window; `interpret` runs the kernel without a TPU, for tests."""

  queries: int
  keys: int
  interpret: bool = False
  window: int | None = None


def attend(
  q_BTHE: jax.Array,
  k_BSKE: jax.Array,
  v_BSKE: jax.Array,
  queries: TokenContext,
  keys: TokenContext,
  interpret: bool = False,
  smallest_block: int = SMALLEST_BLOCK,
  window: int | None = None,
) -> jax.Array:
  """As `attention.attend`; tokens outside the text (segment 0 and below) get zeros.

  Args:
    interpret: run without a TPU, slowly.
    smallest_block: lengths are filled up to a multiple of it; below 128 with `interpret` only.
  """
  sizes = Blocks(
    block_size(q_BTHE.shape[1], smallest_block),
    block_size(k_BSKE.shape[1], smallest_block),
    interpret,
    window,
  )
  query_ids = _ids(queries, sizes.queries, nobody=-1)
  key_ids = _ids(keys, sizes.keys, nobody=-2)
  return _attention(sizes, q_BTHE * q_BTHE.shape[-1] ** -0.5, k_BSKE, v_BSKE, query_ids, key_ids)


def _ids(context: TokenContext, block: int, nobody: int) -> tuple[jax.Array, jax.Array]:
  """Positions and segments, padded to whole blocks; padding has the segment `nobody`."""
  more = ((0, 0), (0, -context.positions_BC.shape[1] % block))
  position_BC, segment_BC = (
    jnp.pad(a_BC.astype(jnp.int32), more) for a_BC in (context.positions_BC, context.segments_BC)
  )
  return position_BC, jnp.where(segment_BC > 0, segment_BC, nobody)


def _heads_first(a_BTHE: jax.Array, block: int) -> jax.Array:
  """(B, H, T, E), filled up to whole blocks."""
  more = -a_BTHE.shape[1] % block
  return jnp.pad(a_BTHE, ((0, 0), (0, more), (0, 0), (0, 0))).transpose(0, 2, 1, 3)


def _tokens_first(a_BHTE: jax.Array, length: int) -> jax.Array:
  return a_BHTE[:, :, :length].transpose(0, 2, 1, 3)


def block_size(length: int, smallest: int = SMALLEST_BLOCK) -> int:
  """The largest block that fills up a row by an eighth more than the smallest would, or less."""
  filled = -(-length // smallest) * smallest
  sizes = (smallest * factor for factor in LARGER)
  return next((size for size in sizes if -(-length // size) * size <= filled * 9 / 8), smallest)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(sizes, q_BTHE, k_BSKE, v_BSKE, query_ids, key_ids):
  return _forward(sizes, q_BTHE, k_BSKE, v_BSKE, query_ids, key_ids)[0]


def _forward(sizes, q_BTHE, k_BSKE, v_BSKE, query_ids, key_ids):
  q_BHTE = _heads_first(q_BTHE, sizes.queries)
  k_BKSE, v_BKSE = _heads_first(k_BSKE, sizes.keys), _heads_first(v_BSKE, sizes.keys)
  batch, heads, length, width = q_BHTE.shape
  groups = heads // k_BKSE.shape[1]
  visit_BIJ, fetch_BIJ = visited(sizes, query_ids, key_ids)
  query, key, per_query, column, line = _queries_outside(sizes, visit_BIJ.shape, groups, width)
  out_BHTE, total_BHT1 = pl.pallas_call(
    partial(_forward_kernel, visit_BIJ.shape, sizes.window),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(batch, heads, *visit_BIJ.shape[1:]),
      in_specs=[query, key, key, column, column, line, line],
      out_specs=[query, per_query],
      scratch_shapes=[pltpu.VMEM((sizes.queries, size), jnp.float32) for size in (1, 1, width)],
    ),
    out_shape=[
      jax.ShapeDtypeStruct(q_BHTE.shape, q_BHTE.dtype),
      jax.ShapeDtypeStruct((batch, heads, length, 1), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(dimension_semantics=_OWN_DIMENSION),
    interpret=sizes.interpret,
    name='row_attention_forward',
  )(visit_BIJ.ravel(), fetch_BIJ.ravel(), q_BHTE, k_BKSE, v_BKSE, *_columns(query_ids), *_lines(key_ids))
  out_BTHE = _tokens_first(out_BHTE, q_BTHE.shape[1])
  # Kept are arrays that can fill the memory's tiles, not the kernel's with 64 or 1 of 128 lanes in use.
  return out_BTHE, (q_BTHE, k_BSKE, v_BSKE, query_ids, key_ids, out_BTHE, total_BHT1[..., 0])


def _queries_outside(sizes, grid, groups, width):
  """Blocks of queries, keys, numbers per query and head, ids of queries and ids of keys for a grid (B, H, I, J)."""

  def inner(index):
    return lambda b, h, i, j, _, fetch: index(b, h // groups, fetch[_flat(grid, b, i, j)])

  query = pl.BlockSpec((1, 1, sizes.queries, width), lambda b, h, i, j, *_: (b, h, i, 0))
  key = pl.BlockSpec((1, 1, sizes.keys, width), inner(lambda b, k, j: (b, k, j, 0)))
  per_query = pl.BlockSpec((1, 1, sizes.queries, 1), lambda b, h, i, j, *_: (b, h, i, 0))
  column = pl.BlockSpec((1, sizes.queries, 1), lambda b, h, i, j, *_: (b, i, 0))
  line = pl.BlockSpec((1, 1, sizes.keys), inner(lambda b, k, j: (b, 0, j)))
  return query, key, per_query, column, line


def _backward(sizes, kept, grad_BTHE):
  q_BTHE, k_BSKE, v_BSKE, query_ids, key_ids, out_BTHE, total_BHT = kept
  q_BHTE, out_BHTE, grad_BHTE = (_heads_first(a, sizes.queries) for a in (q_BTHE, out_BTHE, grad_BTHE))
  k_BKSE, v_BKSE = _heads_first(k_BSKE, sizes.keys), _heads_first(v_BSKE, sizes.keys)
  total_BHT1 = total_BHT[..., None]
  batch, heads, length, width = q_BHTE.shape
  kv_heads = k_BKSE.shape[1]
  groups = heads // kv_heads
  product_BHTE = grad_BHTE.astype(jnp.float32) * out_BHTE.astype(jnp.float32)
  inner_BHT1 = product_BHTE.sum(axis=-1, keepdims=True)
  visit_BIJ, fetch_BIJ = visited(sizes, query_ids, key_ids)
  query, key, per_query, column, line = _queries_outside(sizes, visit_BIJ.shape, groups, width)
  grad_q_BHTE = pl.pallas_call(
    partial(_query_kernel, visit_BIJ.shape, sizes.window),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(batch, heads, *visit_BIJ.shape[1:]),
      in_specs=[query, key, key, query, per_query, per_query, column, column, line, line],
      out_specs=query,
      scratch_shapes=[pltpu.VMEM((sizes.queries, width), jnp.float32)],
    ),
    out_shape=jax.ShapeDtypeStruct(q_BHTE.shape, q_BHTE.dtype),
    compiler_params=pltpu.CompilerParams(dimension_semantics=_OWN_DIMENSION),
    interpret=sizes.interpret,
    name='row_attention_query_gradient',
  )(
    *(visit_BIJ.ravel(), fetch_BIJ.ravel(), q_BHTE, k_BKSE, v_BKSE, grad_BHTE, total_BHT1, inner_BHT1),
    *_columns(query_ids),
    *_lines(key_ids),
  )

  # Keys outside, queries of the whole group inside; scores stand transposed, so that what belongs to the
  # inner side, and is fetched again and again, are lines.
  visit_BJI, fetch_BJI = visited(sizes, query_ids, key_ids, keys_outside=True)
  blocks = visit_BJI.shape[2]

  def inner(index):
    def place(b, k, j, t, _, fetch):
      head, block = k * groups + t // blocks, fetch[_flat(visit_BJI.shape, b, j, t % blocks)]
      return index(b, head, block)

    return place

  query = pl.BlockSpec((1, 1, sizes.queries, width), inner(lambda b, h, i: (b, h, i, 0)))
  key = pl.BlockSpec((1, 1, sizes.keys, width), lambda b, k, j, t, *_: (b, k, j, 0))
  per_query = pl.BlockSpec((1, 1, 1, sizes.queries), inner(lambda b, h, i: (b, h, 0, i)))
  line = pl.BlockSpec((1, 1, sizes.queries), inner(lambda b, h, i: (b, 0, i)))
  column = pl.BlockSpec((1, sizes.keys, 1), lambda b, k, j, t, *_: (b, j, 0))
  total_BH1T, inner_BH1T = (a_BHT1.reshape(batch, heads, 1, length) for a_BHT1 in (total_BHT1, inner_BHT1))
  grad_k_BKSE, grad_v_BKSE = pl.pallas_call(
    partial(_key_kernel, visit_BJI.shape, sizes.window),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(batch, kv_heads, visit_BJI.shape[1], groups * blocks),
      in_specs=[query, key, key, query, per_query, per_query, line, line, column, column],
      out_specs=[key, key],
      scratch_shapes=[pltpu.VMEM((sizes.keys, width), jnp.float32)] * 2,
    ),
    out_shape=[jax.ShapeDtypeStruct(k_BKSE.shape, k_BKSE.dtype)] * 2,
    compiler_params=pltpu.CompilerParams(dimension_semantics=_OWN_DIMENSION),
    interpret=sizes.interpret,
    name='row_attention_key_gradient',
  )(
    *(visit_BJI.ravel(), fetch_BJI.ravel(), q_BHTE, k_BKSE, v_BKSE, grad_BHTE, total_BH1T, inner_BH1T),
    *_lines(query_ids),
    *_columns(key_ids),
  )
  grad_q_BTHE = _tokens_first(grad_q_BHTE, q_BTHE.shape[1])
  return grad_q_BTHE, *(_tokens_first(a, k_BSKE.shape[1]) for a in (grad_k_BKSE, grad_v_BKSE)), None, None


_attention.defvjp(_forward, _backward)


def _forward_kernel(
  grid,
  window,
  visit,
  _,
  q,
  k,
  v,
  q_position,
  q_segment,
  k_position,
  k_segment,
  out,
  total,
  largest,
  sums,
  acc,
):
  b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)

  @pl.when(j == 0)
  def _():
    largest[...] = jnp.full_like(largest, LOWEST)
    sums[...] = jnp.zeros_like(sums)
    acc[...] = jnp.zeros_like(acc)

  @pl.when(visit[_flat(grid, b, i, j)] > 0)
  def _():
    scores_TS = _dot(q[0, 0], k[0, 0], 1, 1)
    visible_TS = _visible(window, q_position[0], q_segment[0], k_position[0], k_segment[0])
    old_T1 = largest[...]
    new_T1 = jnp.maximum(old_T1, jnp.where(visible_TS, scores_TS, LOWEST).max(axis=1, keepdims=True))
    weights_TS = jnp.where(visible_TS, jnp.exp(scores_TS - new_T1), 0)
    shrink_T1 = jnp.exp(old_T1 - new_T1)
    largest[...] = new_T1
    sums[...] = sums[...] * shrink_T1 + weights_TS.sum(axis=1, keepdims=True)
    acc[...] = acc[...] * shrink_T1 + _dot(weights_TS.astype(v.dtype), v[0, 0], 1, 0)

  @pl.when(j == pl.num_programs(3) - 1)
  def _():
    seen_T1 = sums[...] > 0
    divisor_T1 = jnp.where(seen_T1, sums[...], 1)
    out[0, 0] = (acc[...] / divisor_T1).astype(out.dtype)
    total[0, 0] = jnp.where(seen_T1, largest[...] + jnp.log(divisor_T1), 0)


def _query_kernel(
  grid, window, visit, _, q, k, v, grad, total, inner, q_position, q_segment, k_position, k_segment, out, acc
):
  b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)

  @pl.when(j == 0)
  def _():
    acc[...] = jnp.zeros_like(acc)

  @pl.when(visit[_flat(grid, b, i, j)] > 0)
  def _():
    visible_TS = _visible(window, q_position[0], q_segment[0], k_position[0], k_segment[0])
    weights_TS = jnp.where(visible_TS, jnp.exp(_dot(q[0, 0], k[0, 0], 1, 1) - total[0, 0]), 0)
    grad_TS = weights_TS * (_dot(grad[0, 0], v[0, 0], 1, 1) - inner[0, 0])
    acc[...] += _dot(grad_TS.astype(k.dtype), k[0, 0], 1, 0)

  @pl.when(j == pl.num_programs(3) - 1)
  def _():
    out[0, 0] = acc[...].astype(out.dtype)


def _key_kernel(
  grid,
  window,
  visit,
  _,
  q,
  k,
  v,
  grad,
  total,
  inner,
  q_position,
  q_segment,
  k_position,
  k_segment,
  *outs_and_accs,
):
  out_k, out_v, acc_k, acc_v = outs_and_accs
  b, j, t = pl.program_id(0), pl.program_id(2), pl.program_id(3)

  @pl.when(t == 0)
  def _():
    acc_k[...] = jnp.zeros_like(acc_k)
    acc_v[...] = jnp.zeros_like(acc_v)

  @pl.when(visit[_flat(grid, b, j, t % grid[2])] > 0)
  def _():
    visible_ST = _visible(window, q_position[0], q_segment[0], k_position[0], k_segment[0])
    weights_ST = jnp.where(visible_ST, jnp.exp(_dot(k[0, 0], q[0, 0], 1, 1) - total[0, 0]), 0)
    acc_v[...] += _dot(weights_ST.astype(grad.dtype), grad[0, 0], 1, 0)
    grad_ST = weights_ST * (_dot(v[0, 0], grad[0, 0], 1, 1) - inner[0, 0])
    acc_k[...] += _dot(grad_ST.astype(q.dtype), q[0, 0], 1, 0)

  @pl.when(t == pl.num_programs(3) - 1)
  def _():
    out_k[0, 0] = acc_k[...].astype(out_k.dtype)
    out_v[0, 0] = acc_v[...].astype(out_v.dtype)


def _visible(window, q_position, q_segment, k_position, k_segment):
  sees = (k_position <= q_position) & (k_segment == q_segment)
  return sees if window is None else sees & (q_position - k_position < window)


def _dot(left, right, left_axis, right_axis):
  dimensions = (((left_axis,), (right_axis,)), ((), ()))
  return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)


def _columns(ids):
  return tuple(a_BC[:, :, None] for a_BC in ids)


def _lines(ids):
  return tuple(a_BC[:, None, :] for a_BC in ids)


def _flat(grid, b, i, j):
  return (b * grid[1] + i) * grid[2] + j


def visited(sizes, query_ids, key_ids, keys_outside=False):
  """Which pairs of blocks to compute, (B, I, J), and for each the inner block to have at hand: the last needed."""
  lowest_q, highest_q = _ranges(query_ids, sizes.queries)
  lowest_k, highest_k = _ranges(key_ids, sizes.keys)

  def pairs(outer_BI, inner_BJ):
    return outer_BI[:, :, None], inner_BJ[:, None, :]

  first_q, first_k = pairs(lowest_q[1], lowest_k[1])
  last_q, last_k = pairs(highest_q[1], highest_k[1])
  latest_q, earliest_k = pairs(highest_q[0], lowest_k[0])
  visit_BIJ = (first_q <= last_k) & (first_k <= last_q) & (earliest_k <= latest_q)
  if sizes.window is not None:
    earliest_q, latest_k = pairs(lowest_q[0], highest_k[0])
    visit_BIJ &= earliest_q < latest_k + sizes.window
  if keys_outside:
    visit_BIJ = visit_BIJ.swapaxes(1, 2)
  index_J = jnp.arange(visit_BIJ.shape[2])
  fetch_BIJ = jax.lax.cummax(jnp.where(visit_BIJ, index_J, 0), axis=2)
  return visit_BIJ.astype(jnp.int32), fetch_BIJ.astype(jnp.int32)


def _ranges(ids, size):
  """Lowest and highest position and segment of the text in each block; nothing lies between those of no text."""
  large = jnp.iinfo(jnp.int32).max
  text_BIC = (ids[1] > 0).reshape(ids[1].shape[0], -1, size)

  def blocks(a_BC):
    return a_BC.reshape(text_BIC.shape)

  lowest = tuple(jnp.where(text_BIC, blocks(a_BC), large).min(axis=2) for a_BC in ids)
  highest = tuple(jnp.where(text_BIC, blocks(a_BC), -1).max(axis=2) for a_BC in ids)
  return lowest, highest
