"""The recursions for a chunk of tokens of every lane, each step computed on the tokens that take it."""

import jax
import jax.numpy as jnp
from flax import struct

from mor_jax.model import lane_routing
from mor_jax.model.cache import Cache
from mor_jax.model.decode import CachedModel, DecodeParams
from mor_jax.model.lane_routing import Offer, Walk


@struct.dataclass
class Taken:
  """What came of the S steps that C tokens of each lane were offered.

  Attributes:
    cache: with the keys and values of the steps.
    walk: the tokens behind them.
    counts_BP: places taken of each of all P steps, by these tokens and those before them.
    selected_SBC: which tokens took which step.
    overflow_SBC: which found no place at it.
  """

  cache: Cache
  walk: Walk
  counts_BP: jax.Array
  selected_SBC: jax.Array
  overflow_SBC: jax.Array

  @property
  def depth_BC(self) -> jax.Array:
    """How many of the steps each token took."""
    return self.selected_SBC.sum(axis=0)

  @property
  def overflow_BC(self) -> jax.Array:
    """Which tokens found no place."""
    return self.overflow_SBC.any(axis=0)


def take_steps(
  cached: CachedModel,
  params: DecodeParams,
  cache: Cache,
  walk: Walk,
  slots_B: jax.Array,
  positions_BC: jax.Array,
  counts_BP: jax.Array,
  active_BC: jax.Array,
  rules: tuple[jax.Array, jax.Array],
  first: int = 0,
  stop: int | None = None,
) -> Taken:
  """Offers tokens their steps, one after the other.

  Args:
    counts_BP: places of each step that the tokens before these have taken.
    active_BC: tokens that took step `first` - 1, or are there, if that is 0.
    rules: most recursions, and shift of the thresholds, of each lane (B,).
    first, stop: step to begin with, and the one before which to stop; None: after the last.
  """

  def step(carry, index):
    cache, walk, counts_BP, active_BC = carry
    steps_B = jnp.full(slots_B.shape, index)
    walk, offered = lane_routing.offer(
      cached, params, walk, steps_B, positions_BC, active_BC, counts_BP, *rules
    )
    walk, cache = _selected_only(cached, params, cache, walk, slots_B, steps_B, positions_BC, offered)
    counts_BP = counts_BP.at[:, index].add(offered.selected_BC.sum(axis=1))
    return (cache, walk, counts_BP, offered.selected_BC), (offered.selected_BC, offered.overflow_BC)

  carry = cache, walk, counts_BP, active_BC
  steps_S = jnp.arange(first, len(cached.layout.places) if stop is None else stop)
  (cache, walk, counts_BP, _), (selected_SBC, overflow_SBC) = jax.lax.scan(step, carry, steps_S)
  return Taken(cache, walk, counts_BP, selected_SBC, overflow_SBC)


def _selected_only(cached, params, cache, walk, slots_B, steps_B, positions_BC, offered):
  """A step on the tokens that take it, moved to the front of their lanes, a part of the chunk at a time."""
  length = positions_BC.shape[1]
  part = length if cached.config.kind != 'mor' else max(length // 4, min(length, 8))
  while length % part:
    part += 1
  order_BC = jnp.argsort(~offered.selected_BC, axis=1, stable=True)
  rows_B1 = jnp.arange(slots_B.shape[0])[:, None]

  def run(index, carry):
    cache, x_BCD = carry
    chosen_BC = jax.lax.dynamic_slice_in_dim(order_BC, index * part, part, axis=1)

    def take(leaf):
      return None if leaf is None else leaf[rows_B1, chosen_BC]

    some = Walk(take(x_BCD), *map(take, (walk.score_BC, walk.choice_BC, walk.start_BCD)))
    some, cache = lane_routing.take_step(
      cached, params, cache, some, slots_B, steps_B, take(positions_BC), Offer(*map(take, _fields(offered)))
    )
    return cache, x_BCD.at[rows_B1, chosen_BC].set(some.x_BCD)

  parts = -(-offered.selected_BC.sum(axis=1).max() // part)
  cache, x_BCD = jax.lax.fori_loop(0, parts, run, (cache, walk.x_BCD))
  return walk.replace(x_BCD=x_BCD), cache


def _fields(offered: Offer) -> tuple[jax.Array, ...]:
  return offered.selected_BC, offered.places_BC, offered.overflow_BC
