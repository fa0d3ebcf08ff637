"""Depth-wise continuous batching: ticks that each apply the shared block once to a full batch of lanes.

More sequences are resident (slots) than the block has lanes. A tick gives the lanes to sequences
that wait for the block, each at the recursion step its token has come to. Tokens that leave wait
at the boundary: last layer, head, sampling, embedding and first layer, which runs for a batch of
its own as soon as one is full, or when the block would lack work. Everything stays on the device
for many ticks.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from mor_jax.inference import scores, shards
from mor_jax.inference.sampling import sample
from mor_jax.inference.state import BLOCK, ENTRY, EXIT, IDLE, DecodeState, Rules
from mor_jax.model import cached_attention, decode, lane_routing
from mor_jax.model.decode import CachedModel, DecodeParams
from mor_jax.model.lane_routing import Offer

MOST_DRAFTS = 16  # tokens of a draft (`speculation`)


@dataclasses.dataclass(frozen=True)
class Batches:
  """Sizes of the two batches: lanes of the block, and sequences that pass the boundary together."""

  block: int
  boundary: int


@struct.dataclass
class Tally:
  """What some ticks did, in numbers that can be added, one for each of the G parts of a mesh (`shards`).

  Attributes:
    ticks: applications of the shared block.
    boundaries: passes of the boundary.
    block_lanes, boundary_lanes: lanes of them that had work.
    resident: sum over ticks of the slots in use.
    tokens: tokens that left the recursions, and passes through the block that they took.
    sampled: tokens that were sampled.
    overflow_GP: tokens that wanted a step and found no place in its region.
    rounds, checks: of `speculation`: drafts with their checks, and how many sequences they had in all.
    judged_GK, accepted_GK: drafted tokens by their place in the draft, of those whose forerunners were right; and those
      of them that were right.
    left_GK: of those judged, the ones that followed a token which the draft computed in full, since it left the
      recursions there.
  """

  ticks: jax.Array
  boundaries: jax.Array
  block_lanes: jax.Array
  boundary_lanes: jax.Array
  resident: jax.Array
  tokens: jax.Array
  passes: jax.Array
  sampled: jax.Array
  overflow_GP: jax.Array
  rounds: jax.Array
  checks: jax.Array
  judged_GK: jax.Array
  accepted_GK: jax.Array
  left_GK: jax.Array

  def add(self, **more: jax.Array) -> 'Tally':
    """The sum with some of the numbers."""
    return self.replace(**{name: getattr(self, name) + value for name, value in more.items()})


Carry = tuple[DecodeState, Tally]


def empty_tally(steps: int) -> Tally:
  """Nothing done, on one part."""

  def zeros(*shape):
    return jnp.zeros((1, *shape), jnp.int32)

  by_place = zeros(MOST_DRAFTS)
  return Tally(*(zeros(),) * 8, zeros(steps), zeros(), zeros(), *(by_place,) * 3)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def run(
  cached: CachedModel,
  batches: Batches,
  mesh: Mesh | None,
  params: DecodeParams,
  state: DecodeState,
  max_ticks: jax.Array,
  max_finished: jax.Array,
) -> tuple[DecodeState, Tally]:
  """Ticks until `max_ticks` are done, `max_finished` sequences have ended, or all have; each part by itself.

  Args:
    batches: of each part.
    mesh: over which slots are split (`shards`); None: one device.
  """
  local = functools.partial(_run, cached, batches)
  return shards.run(mesh, local, (params, max_ticks, max_finished), state)


def _run(cached, batches, whole, state):
  params, max_ticks, max_finished = whole

  def tick(carry):
    carry = jax.lax.while_loop(
      functools.partial(_boundary_is_due, batches),
      functools.partial(pass_boundary, cached, batches, params),
      carry,
    )
    return apply_block(cached, batches, params, carry)

  tally = empty_tally(len(cached.layout.places))
  return repeat(tick, (state, tally), lambda tally: tally.ticks[0] < max_ticks, max_finished)


def repeat(
  body: Callable[[Carry], Carry],
  carry: Carry,
  may: Callable[[Tally], jax.Array],
  max_finished: jax.Array,
) -> Carry:
  """Repeats the body while sequences are left, fewer than `max_finished` have ended, and the tally may grow."""
  active = (carry[0].phase_N != IDLE).sum()

  def goes_on(carry):
    state, tally = carry
    left = (state.phase_N != IDLE).sum()
    return (left > 0) & (active - left < max_finished) & may(tally)

  return jax.lax.while_loop(goes_on, body, carry)


def _waiting(state: DecodeState) -> jax.Array:
  return (state.phase_N == ENTRY) | (state.phase_N == EXIT)


def _boundary_is_due(batches: Batches, carry) -> jax.Array:
  """A batch is full, or lanes of the block would stay empty though somebody could fill them."""
  waiting, ready = _waiting(carry[0]).sum(), (carry[0].phase_N == BLOCK).sum()
  return (waiting >= batches.boundary) | ((waiting > 0) & (ready < batches.block))


def choose(wants_N: jax.Array, since_N: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
  """Slots that get the lanes of a batch, those first that have waited longest; and which lanes have work."""
  if count == wants_N.shape[0]:
    return jnp.arange(count), wants_N
  latest = jnp.iinfo(jnp.int32).max
  slots_B = jax.lax.top_k(-jnp.where(wants_N, since_N, latest), count)[1]
  return slots_B, wants_N[slots_B]


def ordered(
  cached: CachedModel, slots_B: jax.Array, active_B: jax.Array, seen_N: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The lanes that `choose` gives, in the order in which the cache is best read, by the entries that each slot sees."""
  if cached.read != 'groups':
    return slots_B, active_B
  order_B = cached_attention.order(jnp.where(active_B, seen_N[slots_B] + 1, 0))
  return slots_B[order_B], active_B[order_B]


def _offer(cached, params, state, slots_B, walk, steps_B, positions_B, active_B):
  """Offers the tokens their next step, and writes down where they go from here."""
  walk, offered = lane_routing.offer(
    cached,
    params,
    walk,
    steps_B,
    positions_B[:, None],
    active_B[:, None],
    state.counts_NP[slots_B],
    state.rules.recursions_N[slots_B],
    state.rules.shift_N[slots_B],
  )
  selected_B = offered.selected_BC[:, 0]
  nobody = state.phase_N.shape[0]
  writes_B = jnp.where(active_B, slots_B, nobody)  # idle lanes leave their slots alone

  def put(leaf, value_B):
    return leaf.at[writes_B].set(value_B, mode='drop')

  steps_P = jnp.arange(len(cached.layout.places))
  one_BP = (selected_B[:, None] & (steps_P == steps_B[:, None])).astype(jnp.int32)
  state = state.with_walk(writes_B, walk).replace(
    phase_N=put(state.phase_N, jnp.where(selected_B, BLOCK, EXIT)),
    since_N=put(state.since_N, state.clock_G),
    step_N=put(state.step_N, steps_B),
    place_N=put(state.place_N, offered.places_BC[:, 0]),
    position_N=put(state.position_N, positions_B),
    counts_NP=state.counts_NP.at[writes_B].add(one_BP, mode='drop'),
    depths_NT=state.depths_NT.at[writes_B, positions_B].set(steps_B.astype(jnp.int8), mode='drop'),
  )
  overflow_P = (offered.overflow_BC & (steps_P == steps_B[:, None])).sum(axis=0)
  return state, overflow_P


def apply_block(cached, batches, params, carry):
  """One pass of the shared block."""
  state, tally = carry
  slots_B, active_B = choose(state.phase_N == BLOCK, state.since_N, batches.block)
  seen_N = state.position_N if cached.layout.kv == 'shared' else state.place_N
  slots_B, active_B = ordered(cached, slots_B, active_B, seen_N)
  positions_B, steps_B = state.position_N[slots_B], state.step_N[slots_B]
  admitted = Offer(active_B[:, None], state.place_N[slots_B][:, None], jnp.zeros_like(active_B)[:, None])
  walk, cache = lane_routing.take_step(
    cached, params, state.cache, state.walk(slots_B), slots_B, steps_B, positions_B[:, None], admitted
  )
  tally = tally.add(ticks=1, block_lanes=active_B.sum(), resident=(state.phase_N != IDLE).sum())
  state = state.replace(cache=cache, clock_G=state.clock_G + 1)
  state, overflow_P = _offer(cached, params, state, slots_B, walk, steps_B + 1, positions_B, active_B)
  return state, tally.add(passes=active_B.sum(), overflow_GP=overflow_P)


def pass_boundary(cached, batches, params, carry):
  """Last layer, head, sampling; then the next token's embedding, first layer and first decision."""
  state, tally = carry
  slots_B, active_B = choose(_waiting(state), state.since_N, batches.boundary)
  slots_B, active_B = ordered(cached, slots_B, active_B, state.position_N)
  leaving_B = active_B & (state.phase_N[slots_B] == EXIT)
  next_B, known_B = state.position_N[slots_B] + 1, state.known_N[slots_B]
  state, logits_BV = _leave(cached, params, state, slots_B, leaving_B)

  rules = jax.tree.map(lambda leaf: leaf[slots_B], state.rules)
  tokens_BT = state.tokens_NT[slots_B]
  token_B = next_tokens(logits_BV, rules, next_B, tokens_BT, known_B)
  sampled_B = leaving_B & (next_B >= known_B)
  ends_B = sampled_B & (token_B[:, None] == rules.stops_NM).any(axis=1)
  ends_B |= leaving_B & (next_B + 1 >= rules.limit_N)
  going_B = active_B & ~ends_B

  nobody = state.phase_N.shape[0]
  if state.scores is not None:
    rows_B = jnp.where(leaving_B, slots_B, nobody)
    state = state.replace(scores=scores.put(state.scores, rows_B, next_B, logits_BV, token_B))
  state = state.replace(
    tokens_NT=state.tokens_NT.at[jnp.where(sampled_B, slots_B, nobody), next_B].set(token_B, mode='drop'),
    known_N=state.known_N.at[jnp.where(sampled_B, slots_B, nobody)].set(next_B + 1, mode='drop'),
    phase_N=state.phase_N.at[jnp.where(ends_B, slots_B, nobody)].set(IDLE, mode='drop'),
  )
  tally = tally.add(
    boundaries=1, boundary_lanes=active_B.sum(), tokens=leaving_B.sum(), sampled=sampled_B.sum()
  )
  state, overflow_P = _enter(cached, params, state, slots_B, token_B, next_B, going_B)
  return state, tally.add(overflow_GP=overflow_P)


def next_tokens(
  logits_BV: jax.Array, rules: Rules, next_B: jax.Array, tokens_BT: jax.Array, known_B: jax.Array
) -> jax.Array:
  """The tokens (B,) in some places: those that are known, else what is drawn after all before them."""
  column_B1 = jnp.minimum(next_B, tokens_BT.shape[1] - 1)[:, None]
  given_B = jnp.take_along_axis(tokens_BT, column_B1, axis=1)[:, 0]
  drawn_B = sample(logits_BV, rules.sampling, next_B, tokens_BT, next_B)
  return jnp.where(next_B < known_B, given_B, drawn_B)


def _leave(cached, params, state, slots_B, leaving_B):
  """Last layer and head for tokens that have left the recursions: logits (B, V)."""
  x_BCD = lane_routing.finish(cached, state.walk(slots_B))
  positions_B1 = jnp.maximum(state.position_N[slots_B], 0)[:, None]
  lanes = lane_routing.at_ends(positions_B1, slots_B, leaving_B[:, None])
  x_BCD, last = decode.apply_end(cached, params, 'last', state.cache.last, x_BCD, lanes)
  logits_BV = decode.logits(cached, params, x_BCD[:, 0])
  state = state.replace(cache=state.cache.replace(last=last))
  if state.logits_NTV is not None:
    row_B = jnp.where(leaving_B, slots_B, state.phase_N.shape[0])
    kept = state.logits_NTV.at[row_B, positions_B1[:, 0]].set(logits_BV, mode='drop')
    state = state.replace(logits_NTV=kept)
  return state, logits_BV


def _enter(cached, params, state, slots_B, token_B, positions_B, going_B):
  """Embedding, first layer and the decision on the first recursion of new tokens."""
  positions_B = jnp.minimum(positions_B, cached.layout.max_len - 1)
  lanes = lane_routing.at_ends(positions_B[:, None], slots_B, going_B[:, None])
  x_BCD = decode.embed(cached, params, token_B)[:, None]
  x_BCD, first = decode.apply_end(cached, params, 'first', state.cache.first, x_BCD, lanes)
  state = state.replace(cache=state.cache.replace(first=first))
  walk = lane_routing.begin(cached, params, x_BCD, positions_B[:, None])
  return _offer(cached, params, state, slots_B, walk, jnp.zeros_like(slots_B), positions_B, going_B)
