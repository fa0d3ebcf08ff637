"""Tokens moved out of their rows and back: selection, gather, scatter.

Rows of a batch are independent, so all of this happens on the device that holds the row.

A gather's gradient is a scatter, and what goes back to its place is scattered in the first place. A processor
that is slow at that can gather instead: each token of the row fetches the value that is meant for it, if there
is one. Both ways give the same values and gradients to the bit (benchmarks/selection.py has their times).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mor_jax.model import axes

_ORDERED = {'indices_are_sorted': True, 'unique_indices': True, 'mode': 'promise_in_bounds'}


def take(a_BT: jax.Array, indices_BC: jax.Array) -> jax.Array:
  """Gathers tokens of every row, whose places ascend: (B, T, ...) -> (B, C, ...)."""
  return axes.rowwise(_way(a_BT).take)(a_BT, indices_BC)


def put(a_BT: jax.Array, indices_BC: jax.Array, values_BC: jax.Array) -> jax.Array:
  """Puts values (B, C, ...) in the places of tokens, which ascend: the way back from `take`."""
  return axes.rowwise(_way(a_BT).put)(a_BT, indices_BC, values_BC.astype(a_BT.dtype))


def add(a_BT: jax.Array, indices_BC: jax.Array, values_BC: jax.Array) -> jax.Array:
  """Adds values (B, C, ...) to tokens, whose places ascend."""
  return axes.rowwise(_way(a_BT).add)(a_BT, indices_BC, values_BC.astype(a_BT.dtype))


class Movement(NamedTuple):
  """A way to do all three, for rows that lie on one device."""

  take: Callable[..., jax.Array]
  put: Callable[..., jax.Array]
  add: Callable[..., jax.Array]


def _way(a_BT: jax.Array) -> Movement:
  """The faster way. Single numbers, and what has no gradient, are scattered everywhere."""
  is_wide = a_BT.ndim > 2 and jnp.issubdtype(a_BT.dtype, jnp.floating)
  return GATHERING if is_wide and axes.platform() == 'cpu' else SCATTERING


def _at(a_BT: jax.Array, indices_BC: jax.Array):
  return a_BT.at[jnp.arange(a_BT.shape[0])[:, None], indices_BC]


def _gather(a_BT: jax.Array, indices_BC: jax.Array) -> jax.Array:
  indices = indices_BC.reshape(*indices_BC.shape, *(1,) * (a_BT.ndim - 2))
  return jnp.take_along_axis(a_BT, indices, axis=1, mode='promise_in_bounds')


SCATTERING = Movement(
  take=_gather,
  put=lambda a_BT, indices_BC, values_BC: _at(a_BT, indices_BC).set(values_BC, **_ORDERED),
  add=lambda a_BT, indices_BC, values_BC: _at(a_BT, indices_BC).add(values_BC, **_ORDERED),
)


# ---- the way that gathers ----


def _whose(indices_BC: jax.Array, length: int) -> jax.Array:
  """Which of the C values is for each token (B, T); C: none. The compiler merges the calls of one step."""
  count = indices_BC.shape[1]
  nobody_BT = jnp.full((indices_BC.shape[0], length), count, jnp.int32)
  return _at(nobody_BT, indices_BC).set(jnp.arange(count, dtype=jnp.int32), **_ORDERED)


def _fetch(values_BC: jax.Array, whose_BT: jax.Array, others_BT: jax.Array | int, base=None) -> jax.Array:
  """For each token that has a value this, on top of `base` if there is one, `others_BT` for those without."""
  count = values_BC.shape[1]
  has_one_BT = (whose_BT < count).reshape(*whose_BT.shape, *(1,) * (values_BC.ndim - 2))
  own_BT = _gather(values_BC, jnp.minimum(whose_BT, count - 1))
  return jnp.where(has_one_BT, own_BT if base is None else base + own_BT, others_BT)


@jax.custom_vjp
def _take(a_BT, indices_BC):
  return _gather(a_BT, indices_BC)


@jax.custom_vjp
def _put(a_BT, indices_BC, values_BC):
  return _fetch(values_BC, _whose(indices_BC, a_BT.shape[1]), a_BT)


@jax.custom_vjp
def _add(a_BT, indices_BC, values_BC):
  return _fetch(values_BC, _whose(indices_BC, a_BT.shape[1]), a_BT, base=a_BT)


_take.defvjp(
  lambda a_BT, indices_BC: (_take(a_BT, indices_BC), _whose(indices_BC, a_BT.shape[1])),
  lambda whose_BT, grad_BC: (_fetch(grad_BC, whose_BT, 0), None),
)
_put.defvjp(
  lambda a_BT, indices_BC, values_BC: (_put(a_BT, indices_BC, values_BC), indices_BC),
  lambda indices_BC, grad_BT: _put_backward(grad_BT, indices_BC),
)
_add.defvjp(
  lambda a_BT, indices_BC, values_BC: (_add(a_BT, indices_BC, values_BC), indices_BC),
  lambda indices_BC, grad_BT: (grad_BT, None, _gather(grad_BT, indices_BC)),
)


def _put_backward(grad_BT, indices_BC):
  grad_BC = _gather(grad_BT, indices_BC)
  return _put(grad_BT, indices_BC, jnp.zeros_like(grad_BC)), None, grad_BC


GATHERING = Movement(_take, _put, _add)

# ---- which tokens ----


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
