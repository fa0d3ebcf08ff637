"""The recursions for lanes: whether a token takes its next step, and the step itself (threshold routing).

The causal rule of `expert_choice.route_masked` and `token_choice.route`, for C tokens of each lane
and with the tokens of their sequences before them known by their number alone. Lanes may stand
at different steps. Recursive and vanilla models are the case in which everybody goes on.
"""

import jax
import jax.numpy as jnp
from flax import struct

from mor_jax.model import decode, expert_choice, token_choice
from mor_jax.model.cache import Cache
from mor_jax.model.cached_attention import View
from mor_jax.model.decode import CachedModel, DecodeParams, Lanes


@struct.dataclass
class Walk:
  """Tokens on their way through the recursions, C of each lane.

  Attributes:
    x_BCD: residual stream.
    score_BC: expert-choice: logit of the router at the coming step; token-choice: gate of the chosen depth.
    choice_BC: token-choice: chosen depth minus 1.
    start_BCD: token-choice: the stream before the recursions; else None.
  """

  x_BCD: jax.Array
  score_BC: jax.Array
  choice_BC: jax.Array
  start_BCD: jax.Array | None


@struct.dataclass
class Offer:
  """What a step decides: who takes it, in which places of its region, and who found none."""

  selected_BC: jax.Array
  places_BC: jax.Array
  overflow_BC: jax.Array


def has_router(cached: CachedModel, kind: str) -> bool:
  """Whether the model has routers of this kind."""
  return cached.config.kind == 'mor' and cached.config.router == kind


def begin(cached: CachedModel, params: DecodeParams, x_BCD: jax.Array, positions_BC: jax.Array) -> Walk:
  """Tokens that left the first layer."""
  score_BC = jnp.zeros(x_BCD.shape[:2])
  if not has_router(cached, 'token_choice'):
    return Walk(x_BCD, score_BC, jnp.zeros(x_BCD.shape[:2], jnp.int32), None)
  bias_R = params.router.get('bias', 0.0)
  if cached.config.random_router:
    logits_BCR = jnp.moveaxis(params.router['noise'][:, positions_BC], 0, -1)
  else:
    logits_BCR = token_choice.scores(cached.config, params.router['router'], x_BCD)
  _, choice_BC, gate_BC1 = token_choice.choose(cached.config, logits_BCR, bias_R)
  return Walk(x_BCD, gate_BC1[..., 0], choice_BC.astype(jnp.int32), x_BCD)


def offer(
  cached: CachedModel,
  params: DecodeParams,
  walk: Walk,
  steps_B: jax.Array,
  positions_BC: jax.Array,
  active_BC: jax.Array,
  counts_BP: jax.Array,
  limit_B: jax.Array,
  shift_B: jax.Array,
) -> tuple[Walk, Offer]:
  """Offers the tokens their next step.

  Args:
    steps_B: that step; P, where there is none left, takes nobody.
    active_BC: tokens that took the step before.
    counts_BP: places of each step that the lane's sequence has taken.
    limit_B: steps that the sequence may take at most.
    shift_B: added to the thresholds of expert-choice.
  """
  layout = cached.layout
  step_B1 = jnp.minimum(steps_B, len(layout.places) - 1)[:, None]
  always_B1 = jnp.array(layout.always)[step_B1]
  wants_BC = active_BC & (steps_B < jnp.minimum(limit_B, len(layout.places)))[:, None]
  if has_router(cached, 'expert_choice'):
    score_BC, causal_BC = _scores(cached, params, walk.x_BCD, step_B1, positions_BC)
    walk = walk.replace(score_BC=score_BC)
    threshold_B1 = params.router['threshold'][step_B1] if 'threshold' in params.router else 0.0
    wants_BC &= always_B1 | (causal_BC > threshold_B1 + shift_B[:, None])
  elif has_router(cached, 'token_choice'):
    wants_BC &= walk.choice_BC >= step_B1
  taken_B1 = jnp.take_along_axis(counts_BP, step_B1, axis=1)
  places_BC = taken_B1 + jnp.cumsum(wants_BC, axis=1) - 1
  fits_BC = always_B1 | (places_BC < jnp.array(layout.places)[step_B1])
  return walk, Offer(wants_BC & fits_BC, places_BC, wants_BC & ~fits_BC)


def _scores(cached, params, x_BCD, step_B1, positions_BC):
  """Logits (B, C) of each lane's step that weigh tokens, and those that decide."""
  config = cached.config
  if config.random_router:
    noise_BC = params.router['noise'][step_B1, positions_BC]
    return noise_BC, noise_BC
  routers_R = {name: params.router[name] for name in ('router', 'aux_router') if name in params.router}
  of_all_steps = jax.vmap(lambda router: expert_choice.scores(config, router, x_BCD))(routers_R)
  lanes_B1 = jnp.arange(x_BCD.shape[0])[:, None]
  columns_1C = jnp.arange(x_BCD.shape[1])[None]
  return tuple(logits_RBC[step_B1, lanes_B1, columns_1C] for logits_RBC in of_all_steps)


def take_step(
  cached: CachedModel,
  params: DecodeParams,
  cache: Cache,
  walk: Walk,
  slots_B: jax.Array,
  steps_B: jax.Array,
  positions_BC: jax.Array,
  offered: Offer,
) -> tuple[Walk, Cache]:
  """The shared block for the tokens that take their step; the others keep their state."""
  lanes, cache = _place(cached, cache, slots_B, steps_B, positions_BC, offered)
  y_BCD, block = decode.apply_block(cached, params, cache.block, walk.x_BCD, lanes)
  if has_router(cached, 'expert_choice'):
    y_BCD = walk.x_BCD + expert_choice.change(cached.config, walk.x_BCD, y_BCD, walk.score_BC)
  elif has_router(cached, 'token_choice'):
    y_BCD = token_choice.gated(cached.config, y_BCD, walk.score_BC[..., None])
  x_BCD = jnp.where(offered.selected_BC[..., None], y_BCD, walk.x_BCD)
  return walk.replace(x_BCD=x_BCD), cache.replace(block=block)


def finish(cached: CachedModel, walk: Walk) -> jax.Array:
  """The residual stream (B, C, D) after the recursions."""
  if walk.start_BCD is None:
    return walk.x_BCD
  return token_choice.finish(cached.config, walk.start_BCD, walk.x_BCD, walk.score_BC[..., None])


def at_ends(positions_BC: jax.Array, slots_B: jax.Array, real_BC: jax.Array) -> Lanes:
  """Lanes for the layers before and after the recursions, which every real token takes."""
  base_B = jnp.zeros_like(slots_B)
  view = View(slots_B, base_B, jnp.where(real_BC, positions_BC + 1, 0))
  nowhere = jnp.iinfo(jnp.int32).max
  return Lanes(view, positions_BC, jnp.where(real_BC, positions_BC, nowhere), base_B)


def _place(cached, cache, slots_B, steps_B, positions_BC, offered) -> tuple[Lanes, Cache]:
  """Where the tokens of a step write and what they read, by `config.kv`."""
  layout = cached.layout
  base_B = jnp.array(layout.offsets)[steps_B]
  entries_BC = base_B[:, None] + offered.places_BC
  writes_BC = offered.selected_BC
  seen_BC = offered.places_BC + 1
  if layout.kv == 'shared':
    entries_BC, seen_BC = positions_BC, positions_BC + 1
    writes_BC &= (steps_B == 0)[:, None]
  entries_BC = jnp.where(writes_BC, entries_BC, layout.entries)
  view = View(slots_B, base_B, jnp.where(offered.selected_BC, seen_BC, 0))
  if cached.config.sliding_window is not None:
    cache, first_BC = _first_seen(cached, cache, view, entries_BC, positions_BC)
    view = view.replace(first_BC=first_BC)
  if layout.kv == 'hybrid':
    steps_P = jnp.arange(len(layout.places))
    written_BCP = writes_BC[..., None] & (steps_P >= steps_B[:, None, None])
    where_BCP = jnp.where(written_BCP, positions_BC[..., None], layout.max_len)
    places = cache.versions.at[slots_B[:, None, None], steps_P, where_BCP]
    versions = places.set(entries_BC[..., None], mode='drop')
    cache = cache.replace(versions=versions)
    view = view.replace(limit_BC=positions_BC + 1, entries_BS=versions[slots_B, steps_B])
  return Lanes(view, positions_BC, entries_BC, steps_B), cache


def _first_seen(cached, cache, view, entries_BC, positions_BC) -> tuple[Cache, jax.Array]:
  """The cache with the positions of new entries, and the first entry of the region in the window of each token."""
  first_BC = decode.first_in_window(cached.config, positions_BC)
  if cache.positions is None:  # entries stand where their tokens do
    return cache, first_BC
  positions = cache.positions.at[view.slots_B[:, None], entries_BC].set(positions_BC, mode='drop')
  index_B1S = jnp.arange(positions.shape[1]) - view.base_B[:, None, None]
  passed_BCS = positions[view.slots_B][:, None] < first_BC[..., None]
  passed_BCS &= (index_B1S >= 0) & (index_B1S < view.limit_BC[..., None])
  return cache.replace(positions=positions), passed_BCS.sum(axis=-1)
