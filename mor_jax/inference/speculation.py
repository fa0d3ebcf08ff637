"""Self-speculation: the first recursions write a few tokens ahead, the others check them all at once.

The draft is no other model: embedding, first layer and first recursions give a drafted token the stream, keys and
values that the whole model gives it, and the last layer reads them early, as if the token had left. A check takes all
tokens of a draft through their further recursions and the last layer together, reading weights once for all of them,
and says what follows each. The draft is right as far as that is what it wrote; the first token that it got wrong is
put right by the check itself. What follows is forgotten: places are counted up to the last right token only, and
entries behind it are written again before they are read, since whoever reads sees just what comes before it.

The text, if drawn too, is that of decoding without drafts. A token is the largest of its logits plus noise that depends
on seed and place alone (the Gumbel trick of `sampling.sample`), and draft and check have the same noise: so a draft is
right where both lead to the same token, which keeps the distribution as rejection sampling does, and the draw of every
seed besides (Daliri et al. 2025, arXiv 2408.07978; of two distributions at distance d it accepts at least
(1 - d) / (1 + d), rejection sampling 1 - d).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from mor_jax.config import ConfigError
from mor_jax.inference import chunks, scores, shards, ticks
from mor_jax.inference.state import BLOCK, ENTRY, EXIT, IDLE, DecodeState, Rules
from mor_jax.inference.ticks import Tally
from mor_jax.model import decode, lane_routing
from mor_jax.model.decode import CachedModel, DecodeParams
from mor_jax.model.lane_routing import Walk


@dataclasses.dataclass(frozen=True)
class Drafting:
  """How tokens are drafted.

  Attributes:
    length: tokens of a draft, K.
    recursions: that write it.
    lanes: sequences that are drafted together, on each part of the mesh.
  """

  length: int
  recursions: int
  lanes: int


def check(length: int, recursions: int, most: int) -> None:
  """Raises ConfigError for drafts of a length, or of recursions of which there are at most so many, that cannot be."""
  if not 0 <= length <= ticks.MOST_DRAFTS:
    raise ConfigError(f'speculate={length} is not allowed: must be from 0 to {ticks.MOST_DRAFTS} tokens')
  if not 1 <= recursions <= most:
    raise ConfigError(f'draft_recursions={recursions} is not allowed: must be from 1 to {most}')


@struct.dataclass
class Sequences:
  """The sequences of a round, C = K + 1 tokens of each: the one in flight, and K that are drafted.

  Attributes:
    slots_B: where they are.
    active_B: lanes that have one.
    positions_BC: places of the tokens.
    real_BC: tokens that are to be computed.
    known_B: how many tokens of the sequence are known.
    rules: what the requests ask for.
  """

  slots_B: jax.Array
  active_B: jax.Array
  positions_BC: jax.Array
  real_BC: jax.Array
  known_B: jax.Array
  rules: Rules

  @property
  def budget(self) -> tuple[jax.Array, jax.Array]:
    """Most recursions, and shift of the thresholds, of each lane."""
    return self.rules.recursions_N, self.rules.shift_N


@struct.dataclass
class Passed:
  """Tokens behind the recursions of the draft, C of each lane.

  Attributes:
    walk: the tokens.
    active_BC: those that took all of these recursions.
    depth_BC: how many each took.
    overflow_BC: those that found no place.
  """

  walk: Walk
  active_BC: jax.Array
  depth_BC: jax.Array
  overflow_BC: jax.Array


@struct.dataclass
class Checked:
  """What the whole model says of the C tokens of each lane.

  Attributes:
    next_BC: the token that follows each: a known one, or the one drawn.
    logits_BCV: after each.
    depth_BC, overflow_BC: recursions that each took, and whether it found no place for another.
  """

  next_BC: jax.Array
  logits_BCV: jax.Array
  depth_BC: jax.Array
  overflow_BC: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def run(
  cached: CachedModel,
  drafting: Drafting,
  mesh: Mesh | None,
  params: DecodeParams,
  state: DecodeState,
  max_rounds: jax.Array,
  max_finished: jax.Array,
) -> tuple[DecodeState, Tally]:
  """Drafts and checks until `max_rounds` are done, `max_finished` sequences have ended, or all have; as `ticks.run`."""
  local = functools.partial(_run, cached, drafting)
  return shards.run(mesh, local, (params, max_rounds, max_finished), state)


def _run(cached, drafting, whole, state):
  params, max_rounds, max_finished = whole
  carry = _settle(state), ticks.empty_tally(len(cached.layout.places))
  body = functools.partial(round_of, cached, drafting, params)
  return ticks.repeat(body, carry, lambda tally: tally.rounds[0] < max_rounds, max_finished)


def _settle(state: DecodeState) -> DecodeState:
  """The state with tokens that are on their way through the recursions at their beginning again."""
  is_under_way_N = (state.phase_N == BLOCK) | (state.phase_N == EXIT)
  places_N = state.step_N + (state.phase_N == BLOCK)  # a token has its place before it takes the step
  is_given_back_NP = is_under_way_N[:, None] & (jnp.arange(state.counts_NP.shape[1]) < places_N[:, None])
  return state.replace(
    phase_N=jnp.where(is_under_way_N, ENTRY, state.phase_N),
    position_N=state.position_N - is_under_way_N,
    counts_NP=state.counts_NP - is_given_back_NP,
  )


def round_of(cached, drafting, params, carry):
  """One draft of some sequences, and its check."""
  state, tally = carry
  slots_B, active_B = ticks.choose(state.phase_N == ENTRY, state.since_N, drafting.lanes)
  slots_B, active_B = ticks.ordered(cached, slots_B, active_B, state.position_N)
  rules = jax.tree.map(lambda leaf: leaf[slots_B], state.rules)
  index_C = jnp.arange(drafting.length + 1)
  positions_BC = state.position_N[slots_B][:, None] + 1 + index_C
  # The last token of a sequence is never computed, and a request may want shorter drafts.
  real_BC = active_B[:, None] & (positions_BC + 1 < rules.limit_N[:, None])
  real_BC &= index_C <= rules.drafts_N[:, None]
  positions_BC = jnp.clip(positions_BC, 0, cached.layout.max_len - 1)
  sequences = Sequences(slots_B, active_B, positions_BC, real_BC, state.known_N[slots_B], rules)
  cache, tokens_BT, passed = _draft(cached, drafting, params, state, sequences)
  state, checked = _check(cached, drafting, params, state.replace(cache=cache), sequences, tokens_BT, passed)
  return _keep(drafting, state, sequences, tokens_BT, checked, tally)


# ---- the draft ----


def _draft(cached, drafting, params, state, sequences):
  """Tokens one after the other, each with the first recursions, the last layer and the head.

  Returns:
    The cache, all tokens (B, T) of the sequences, and the C computed ones as far as they came.
  """
  rows_B = jnp.arange(sequences.slots_B.shape[0])

  def write(carry, index):
    cache, tokens_BT, counts_BP = carry
    position_B, real_B1 = sequences.positions_BC[:, index], sequences.real_BC[:, index, None]
    ends = lane_routing.at_ends(position_B[:, None], sequences.slots_B, real_B1)
    x_BCD = decode.embed(cached, params, tokens_BT[rows_B, position_B])[:, None]
    x_BCD, first = decode.apply_end(cached, params, 'first', cache.first, x_BCD, ends)
    taken = chunks.take_steps(
      cached,
      params,
      cache.replace(first=first),
      lane_routing.begin(cached, params, x_BCD, position_B[:, None]),
      sequences.slots_B,
      position_B[:, None],
      counts_BP,
      real_B1,
      sequences.budget,
      stop=drafting.recursions,
    )
    passed = Passed(taken.walk, taken.selected_SBC[-1], taken.depth_BC, taken.overflow_BC)

    def go_on(cache):
      x_BCD = lane_routing.finish(cached, passed.walk)
      x_BCD, last = decode.apply_end(cached, params, 'last', cache.last, x_BCD, ends)
      logits_BV = decode.logits(cached, params, x_BCD[:, 0])
      next_B = position_B + 1
      token_B = ticks.next_tokens(logits_BV, sequences.rules, next_B, tokens_BT, sequences.known_B)
      return cache.replace(last=last), tokens_BT.at[rows_B, next_B].set(token_B, mode='drop')

    # What follows the last of them is said by the check alone.
    cache, tokens_BT = jax.lax.cond(
      index < drafting.length, go_on, lambda cache: (cache, tokens_BT), taken.cache
    )
    return (cache, tokens_BT, taken.counts_BP), passed

  carry = state.cache, state.tokens_NT[sequences.slots_B], state.counts_NP[sequences.slots_B]
  (cache, tokens_BT, _), passed = jax.lax.scan(write, carry, jnp.arange(drafting.length + 1))
  return cache, tokens_BT, jax.tree.map(lambda leaf: jnp.moveaxis(leaf[:, :, 0], 0, 1), passed)


# ---- the check ----


@jax.named_scope('check')
def _check(cached, drafting, params, state, sequences, tokens_BT, passed):
  """The remaining recursions and the last layer for all C tokens of each lane together: the state, and `Checked`."""
  taken = chunks.take_steps(
    cached,
    params,
    state.cache,
    passed.walk,
    sequences.slots_B,
    sequences.positions_BC,
    state.counts_NP[sequences.slots_B],
    passed.active_BC,
    sequences.budget,
    first=drafting.recursions,
  )
  ends = lane_routing.at_ends(sequences.positions_BC, sequences.slots_B, sequences.real_BC)
  x_BCD = lane_routing.finish(cached, taken.walk)
  x_BCD, last = decode.apply_end(cached, params, 'last', taken.cache.last, x_BCD, ends)
  logits_NV = decode.logits(cached, params, x_BCD.reshape(-1, x_BCD.shape[-1]))
  shape = sequences.positions_BC.shape
  rules, tokens_NT, known_N = jax.tree.map(
    functools.partial(jnp.repeat, repeats=shape[1], axis=0), (sequences.rules, tokens_BT, sequences.known_B)
  )
  next_N = ticks.next_tokens(logits_NV, rules, sequences.positions_BC.ravel() + 1, tokens_NT, known_N)
  checked = Checked(
    next_N.reshape(shape),
    logits_NV.reshape(*shape, -1),
    passed.depth_BC + taken.depth_BC,
    passed.overflow_BC | taken.overflow_BC,
  )
  return state.replace(cache=taken.cache.replace(last=last)), checked


def _keep(drafting, state, sequences, tokens_BT, checked, tally):
  """The state with as much of the draft as is right, and what the check says of the token behind it."""
  slots_B, rules = sequences.slots_B, sequences.rules
  places_BC = sequences.positions_BC + 1
  is_new_BC = places_BC >= sequences.known_B[:, None]
  ends_BC = is_new_BC & (checked.next_BC[..., None] == rules.stops_NM[:, None]).any(axis=-1)
  ends_BC |= places_BC + 1 >= rules.limit_N[:, None]
  written_BK = jnp.take_along_axis(tokens_BT, sequences.positions_BC[:, 1:], axis=1)
  is_right_BK = (checked.next_BC[:, :-1] == written_BK) & ~ends_BC[:, :-1]
  right_BC = jnp.pad(jnp.cumprod(is_right_BK, axis=1), ((0, 0), (1, 0)), constant_values=1)
  kept_BC = sequences.real_BC & (right_BC == 1)
  count_B = kept_BC.sum(axis=1)
  known_B = jnp.maximum(sequences.known_B, sequences.positions_BC[:, 0] + count_B + 1)
  steps_P = jnp.arange(state.counts_NP.shape[1])
  taken_BP = (kept_BC[..., None] & (checked.depth_BC[..., None] > steps_P)).sum(axis=1)

  nobody, beyond = state.phase_N.shape[0], state.tokens_NT.shape[1]
  rows_B = jnp.where(sequences.active_B, slots_B, nobody)
  rows_BC = jnp.broadcast_to(rows_B[:, None], kept_BC.shape)

  def put(leaf, value_B):
    return leaf.at[rows_B].set(value_B, mode='drop')

  def put_each(leaf, at_BC, places_BC, value_BC):
    return leaf.at[rows_BC, jnp.where(at_BC, places_BC, beyond)].set(value_BC.astype(leaf.dtype), mode='drop')

  if state.scores is not None:
    logits_NV = checked.logits_BCV.reshape(-1, checked.logits_BCV.shape[-1])
    where_N = jnp.where(kept_BC, places_BC, beyond).ravel()
    said = scores.put(state.scores, rows_BC.ravel(), where_N, logits_NV, checked.next_BC.ravel())
    state = state.replace(scores=said)
  if state.logits_NTV is not None:
    kept = put_each(state.logits_NTV, kept_BC, sequences.positions_BC, checked.logits_BCV)
    state = state.replace(logits_NTV=kept)
  state = state.replace(
    tokens_NT=put_each(state.tokens_NT, kept_BC & is_new_BC, places_BC, checked.next_BC),
    depths_NT=put_each(state.depths_NT, kept_BC, sequences.positions_BC, checked.depth_BC),
    known_N=put(state.known_N, known_B),
    position_N=put(state.position_N, sequences.positions_BC[:, 0] + count_B - 1),
    phase_N=put(state.phase_N, jnp.where((kept_BC & ends_BC).any(axis=1), IDLE, ENTRY)),
    since_N=put(state.since_N, state.clock_G),
    counts_NP=state.counts_NP.at[rows_B].add(taken_BP, mode='drop'),
    clock_G=state.clock_G + 1,
  )
  # A draft counts if the token before it was right, for else nobody could have known.
  judged_BK = kept_BC[:, :-1] & ~ends_BC[:, :-1] & sequences.real_BC[:, 1:] & is_new_BC[:, :-1]
  left_BK = checked.depth_BC[:, :-1] <= drafting.recursions
  return state, tally.add(
    rounds=1,
    checks=sequences.active_B.sum(),
    tokens=count_B.sum(),
    passes=jnp.where(kept_BC, checked.depth_BC, 0).sum(),
    sampled=(kept_BC & is_new_BC).sum(),
    overflow_GP=((kept_BC & checked.overflow_BC)[..., None] & (checked.depth_BC[..., None] == steps_P)).sum(
      (0, 1)
    ),
    judged_GK=_by_place(judged_BK),
    accepted_GK=_by_place(judged_BK & kept_BC[:, 1:]),
    left_GK=_by_place(judged_BK & left_BK),
  )


def _by_place(of_drafts_BK):
  """Sums over lanes, of all places that a draft may have."""
  return jnp.pad(of_drafts_BK.sum(axis=0), (0, ticks.MOST_DRAFTS - of_drafts_BK.shape[1]))
