"""Tokens moved out of their rows and back: selection, gather, scatter.

Every row of a batch is a matter of its own, so all of this happens on the device where the row lies.
"""

import functools

import jax
import jax.numpy as jnp

from mor_jax.model import axes

_ORDERED = {'indices_are_sorted': True, 'unique_indices': True, 'mode': 'promise_in_bounds'}


@axes.rowwise
def take(a_BT: jax.Array, indices_BC: jax.Array) -> jax.Array:
  """Gathers tokens of every row: (B, T, ...) -> (B, C, ...)."""
  indices = indices_BC.reshape(*indices_BC.shape, *(1,) * (a_BT.ndim - 2))
  return jnp.take_along_axis(a_BT, indices, axis=1, mode='promise_in_bounds')


@axes.rowwise
def put(a_BT: jax.Array, indices_BC: jax.Array, values_BC: jax.Array) -> jax.Array:
  """Puts values (B, C, ...) in the places of tokens, which ascend: the way back from `take`."""
  return _at(a_BT, indices_BC).set(values_BC, **_ORDERED)


@axes.rowwise
def add(a_BT: jax.Array, indices_BC: jax.Array, values_BC: jax.Array) -> jax.Array:
  """Adds values (B, C, ...) to tokens, whose places ascend."""
  return _at(a_BT, indices_BC).add(values_BC, **_ORDERED)


def _at(a_BT: jax.Array, indices_BC: jax.Array):
  return a_BT.at[jnp.arange(a_BT.shape[0])[:, None], indices_BC]


def mask(indices_BC: jax.Array, chosen_BC: jax.Array, length: int) -> jax.Array:
  """The chosen ones among the tokens at `indices_BC` as a mask (B, T)."""
  return put(jnp.zeros((indices_BC.shape[0], length), bool), indices_BC, chosen_BC)


def best(scores_BT: jax.Array, count: int) -> jax.Array:
  """Places (B, C), ascending, of the `count` highest scores of every row, of equal ones the first.

  By the fastest of several ways with one result (benchmarks/selection.py).
  """
  way = by_threshold if axes.platform() == 'cpu' else by_top_k
  return axes.rowwise(functools.partial(way, count=count))(jax.lax.stop_gradient(scores_BT))


def by_top_k(scores_BT: jax.Array, count: int) -> jax.Array:
  """`best` by `lax.top_k`, then a sort of the places."""
  return jnp.sort(jax.lax.top_k(scores_BT, count)[1], axis=-1)


def by_threshold(scores_BT: jax.Array, count: int) -> jax.Array:
  """`best` by halving the range of the threshold, then writing every place where the running count says."""
  chosen_BT = highest(scores_BT, count)
  rank_BT = jnp.where(chosen_BT, jnp.cumsum(chosen_BT, axis=-1) - 1, count)
  index_BT = jnp.broadcast_to(jnp.arange(scores_BT.shape[1], dtype=jnp.int32), scores_BT.shape)
  return _at(jnp.zeros((scores_BT.shape[0], count), jnp.int32), rank_BT).set(index_BT, mode='drop')


def highest(scores_BT: jax.Array, count: int) -> jax.Array:
  """Mask of the `count` highest scores of every row, of equal ones the first, without a sort.

  The threshold is found bit by bit, from the highest, among integers in the order of the floats.
  """
  bits_BT = jax.lax.bitcast_convert_type(scores_BT.astype(jnp.float32), jnp.int32)
  ordered_BT = jnp.where(bits_BT < 0, bits_BT ^ jnp.int32(0x7FFFFFFF), bits_BT)
  keys_BT = jax.lax.bitcast_convert_type(ordered_BT, jnp.uint32) ^ jnp.uint32(1 << 31)

  def decide(threshold_B1, bit):
    higher_B1 = threshold_B1 | (jnp.uint32(1) << bit)
    enough_B1 = (keys_BT >= higher_B1).sum(axis=-1, keepdims=True) >= count
    return jnp.where(enough_B1, higher_B1, threshold_B1), None

  start_B1 = jnp.zeros((scores_BT.shape[0], 1), jnp.uint32)
  threshold_B1, _ = jax.lax.scan(decide, start_B1, jnp.arange(31, -1, -1, dtype=jnp.uint32), unroll=4)
  above_BT, equal_BT = keys_BT > threshold_B1, keys_BT == threshold_B1
  left_B1 = count - above_BT.sum(axis=-1, keepdims=True)
  return above_BT | (equal_BT & (jnp.cumsum(equal_BT, axis=-1) <= left_B1))


@axes.rowwise
def rank(scores_BT: jax.Array) -> jax.Array:
  """Place (B, T) of every token among those of its row, from the highest score; ties by position."""
  order_BT = jnp.argsort(-jax.lax.stop_gradient(scores_BT), axis=-1, stable=True)
  return jnp.argsort(order_BT, axis=-1)
