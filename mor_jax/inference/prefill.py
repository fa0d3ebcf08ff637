"""Prompts into caches, chunk by chunk."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from mor_jax.inference import chunks, scores, shards
from mor_jax.inference.scores import Scores
from mor_jax.model import cache as cache_lib
from mor_jax.model import decode, lane_routing
from mor_jax.model.cache import Cache
from mor_jax.model.decode import CachedModel, DecodeParams


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
  columns_1C = jnp.arange(tokens_BC.shape[1])[None]
  real_BC = columns_1C < lengths_B[:, None]
  positions_BC = jnp.minimum(prefix.lengths_B[:, None] + columns_1C, cached.layout.max_len - 1)
  slots_B = jnp.arange(tokens_BC.shape[0])
  ends = lane_routing.at_ends(positions_BC, slots_B, real_BC)
  x_BCD = decode.embed(cached, params, tokens_BC)
  x_BCD, first = decode.apply_end(cached, params, 'first', prefix.cache.first, x_BCD, ends)
  walk = lane_routing.begin(cached, params, x_BCD, positions_BC)
  cache = prefix.cache.replace(first=first)
  taken = chunks.take_steps(
    cached, params, cache, walk, slots_B, positions_BC, prefix.counts_BP, real_BC, rules
  )
  x_BCD = lane_routing.finish(cached, taken.walk)
  x_BCD, last = decode.apply_end(cached, params, 'last', taken.cache.last, x_BCD, ends)
  where_BC = jnp.where(real_BC, positions_BC, cached.layout.max_len)
  depths_BT = prefix.depths_BT.at[slots_B[:, None], where_BC].set(
    taken.depth_BC.astype(jnp.int8), mode='drop'
  )
  said = prefix.scores
  if said is not None:
    head = functools.partial(decode.logits, cached, params)
    said = scores.put_chunk(said, where_BC + 1, next_BC, x_BCD, head)
  longer = Prefix(
    taken.cache.replace(last=last),
    prefix.lengths_B + lengths_B,
    taken.counts_BP,
    depths_BT,
    prefix.overflow_GP + taken.overflow_SBC.sum(axis=(1, 2)),
    said,
  )
  if not with_logits:
    return longer, None
  logits_BCV = decode.logits(cached, params, x_BCD.reshape(-1, x_BCD.shape[-1]))
  return longer, logits_BCV.reshape(*tokens_BC.shape, -1)
