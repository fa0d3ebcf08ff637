"""Tokens moved out of their rows and back: selection, gather, scatter.

Every row of a batch is a matter of its own, so all of this happens on the device where the row lies.
"""

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
  """Places (B, C), ascending, of the `count` highest scores of every row."""

  @axes.rowwise
  def choose(scores_BT):
    return jnp.sort(jax.lax.top_k(scores_BT, count)[1], axis=-1)

  return choose(jax.lax.stop_gradient(scores_BT))


@axes.rowwise
def rank(scores_BT: jax.Array) -> jax.Array:
  """Place (B, T) of every token among those of its row, from the highest score; ties by position."""
  order_BT = jnp.argsort(-jax.lax.stop_gradient(scores_BT), axis=-1, stable=True)
  return jnp.argsort(order_BT, axis=-1)
