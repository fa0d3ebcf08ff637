"""Prompts into caches: chunk by chunk, each recursion step computed on the tokens that take it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from mor_jax.inference import scores, shards
from mor_jax.inference.scores import Scores
from mor_jax.model import cache as cache_lib
from mor_jax.model import decode, lane_routing
from mor_jax.model.cache import Cache
from mor_jax.model.decode import CachedModel, DecodeParams
from mor_jax.model.lane_routing import Offer, Walk


@struct.dataclass
class Prefix:
  """Sequences as far as they are computed, one in each of some lanes.

  Attributes:
    cache: keys and values, a slot for each lane.
    lengths_B: tokens computed.
    counts_BP: places taken of each recursion step.
    depths_BT: recursions that each token took.
    overflow_GP: tokens that found no place at a step, in each of the G parts of a mesh (`shards`).
    scores: what the model said of the tokens that follow those computed, where it is kept; else None.
  """

  cache: Cache
  lengths_B: jax.Array
  counts_BP: jax.Array
  depths_BT: jax.Array
  overflow_GP: jax.Array
  scores: Scores | None


@dataclasses.dataclass
class Filling:
  """Prompts that are being computed, a chunk at a time (`Engine.fill`).

  Attributes:
    prefix: what is computed.
    left, following: by lane, the tokens that are not, and those that follow them.
    budget: most recursions, and shift of the thresholds, of each lane (B,).
    is_scored: whether the prompts are scored.
  """

  prefix: Prefix
  left: list[list[int]]
  following: list[list[int]]
  budget: tuple[Any, Any]
  is_scored: bool


def empty(
  cached: CachedModel, lanes: int, dtype: str, parts: int = 1, top_logprobs: int | None = None
) -> Prefix:
  """A prefix without tokens, in the lanes of all `parts` of a mesh together."""
  layout = cached.layout
  steps = len(layout.places)
  return Prefix(
    cache_lib.init_cache(cached.config, layout, lanes, dtype),
    jnp.zeros((lanes,), jnp.int32),
    jnp.zeros((lanes, steps), jnp.int32),
    jnp.zeros((lanes, layout.max_len), jnp.int8),
    jnp.zeros((parts, steps), jnp.int32),
    None if top_logprobs is None else scores.empty(lanes, layout.max_len, top_logprobs),
  )


@functools.partial(jax.jit, static_argnums=(0, 1, 8), donate_argnums=3)
def extend(
  cached: CachedModel,
  mesh: Mesh | None,
  params: DecodeParams,
  prefix: Prefix,
  tokens_BC: jax.Array,
  lengths_B: jax.Array,
  rules: tuple[jax.Array, jax.Array],
  next_BC: jax.Array | None = None,
  with_logits: bool = False,
) -> tuple[Prefix, jax.Array | None]:
  """The prefix with up to C more tokens in each lane.

  Args:
    mesh: over which lanes are split; None: one device.
    tokens_BC: token ids.
    lengths_B: how many of each lane's are real.
    rules: most recursions, and shift of the thresholds, of each lane (B,).
    next_BC: the token that follows each, which a prefix with scores needs.
    with_logits: also return the logits (B, C, V) after every token.
  """
  local = functools.partial(_extend, cached, with_logits)
  return shards.run(mesh, local, params, prefix, tokens_BC, lengths_B, rules, next_BC)


def _extend(cached, with_logits, params, prefix, tokens_BC, lengths_B, rules, next_BC):
  steps = len(cached.layout.places)
  columns_1C = jnp.arange(tokens_BC.shape[1])[None]
  real_BC = columns_1C < lengths_B[:, None]
  positions_BC = jnp.minimum(prefix.lengths_B[:, None] + columns_1C, cached.layout.max_len - 1)
  slots_B = jnp.arange(tokens_BC.shape[0])
  ends = lane_routing.at_ends(positions_BC, slots_B, real_BC)
  x_BCD = decode.embed(params, tokens_BC)
  x_BCD, first = decode.apply_end(cached, params.first, prefix.cache.first, x_BCD, ends)

  def step(carry, index):
    cache, walk, counts_BP, active_BC = carry
    steps_B = jnp.full(slots_B.shape, index)
    walk, offered = lane_routing.offer(
      cached, params, walk, steps_B, positions_BC, active_BC, counts_BP, *rules
    )
    walk, cache = _selected_only(cached, params, cache, walk, slots_B, steps_B, positions_BC, offered)
    counts_BP = counts_BP.at[:, index].add(offered.selected_BC.sum(axis=1))
    return (cache, walk, counts_BP, offered.selected_BC), (offered.selected_BC, offered.overflow_BC.sum())

  carry = (
    prefix.cache.replace(first=first),
    lane_routing.begin(cached, params, x_BCD, positions_BC),
    prefix.counts_BP,
    real_BC,
  )
  (cache, walk, counts_BP, _), (selected_PBC, overflow_P) = jax.lax.scan(step, carry, jnp.arange(steps))
  x_BCD = lane_routing.finish(cached, walk)
  x_BCD, last = decode.apply_end(cached, params.last, cache.last, x_BCD, ends)
  where_BC = jnp.where(real_BC, positions_BC, cached.layout.max_len)
  depths_BT = prefix.depths_BT.at[slots_B[:, None], where_BC].set(
    selected_PBC.sum(axis=0, dtype=jnp.int8), mode='drop'
  )
  said = prefix.scores
  if said is not None:
    head = functools.partial(decode.logits, cached, params)
    said = scores.put_chunk(said, where_BC + 1, next_BC, x_BCD, head)
  longer = Prefix(
    cache.replace(last=last),
    prefix.lengths_B + lengths_B,
    counts_BP,
    depths_BT,
    prefix.overflow_GP + overflow_P,
    said,
  )
  if not with_logits:
    return longer, None
  logits_BCV = decode.logits(cached, params, x_BCD.reshape(-1, x_BCD.shape[-1]))
  return longer, logits_BCV.reshape(*tokens_BC.shape, -1)


def _selected_only(cached, params, cache, walk, slots_B, steps_B, positions_BC, offered):
  """A step on the tokens that take it, moved to the front of their lanes, a part of the chunk at a time."""
  length = positions_BC.shape[1]
  part = length if cached.config.kind != 'mor' else max(length // 4, min(length, 8))
  while length % part:
    part += 1
  order_BC = jnp.argsort(~offered.selected_BC, axis=1, stable=True)
  rows_B1 = slots_B[:, None]

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
