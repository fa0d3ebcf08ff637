"""What the device knows of the sequences that are being generated: one pytree of static shape."""

import jax
import jax.numpy as jnp
from flax import struct

from mor_jax.inference import scores
from mor_jax.inference.prefill import Prefix
from mor_jax.inference.sampling import SamplingRules, default_rules
from mor_jax.inference.scores import Scores
from mor_jax.model import cache as cache_lib
from mor_jax.model import lane_routing
from mor_jax.model.cache import Cache
from mor_jax.model.decode import CachedModel
from mor_jax.model.lane_routing import Walk

# What a slot waits for.
IDLE = 0  # nothing: it is empty, or its sequence has ended
ENTRY = 1  # its next token, which is known, to be embedded
BLOCK = 2  # a lane of the shared block
EXIT = 3  # the last layer, and a next token

NO_TOKEN = -1
STOP_TOKENS = 8  # that a request may have


@struct.dataclass
class Rules:
  """What a request asks for, of every slot.

  Attributes:
    sampling: how tokens are chosen.
    stops_NM: token ids that end the sequence, filled up with NO_TOKEN.
    limit_N: longest length, prompt included.
    recursions_N: most recursions of a token.
    shift_N: added to the thresholds of expert-choice.
    drafts_N: most tokens of a draft (`speculation`).
  """

  sampling: SamplingRules
  stops_NM: jax.Array
  limit_N: jax.Array
  recursions_N: jax.Array
  shift_N: jax.Array
  drafts_N: jax.Array


@struct.dataclass
class DecodeState:
  """N slots. A sequence has one token in flight, at `position_N`.

  Attributes:
    cache: keys and values.
    tokens_NT: prompt and what was generated, `known_N` tokens.
    depths_NT: recursions that each token took.
    phase_N: what the slot waits for.
    since_N: tick since which it has waited.
    step_N, place_N: the recursion step that it will take, and its place there.
    counts_NP: places that the sequence has taken of each step.
    x_ND, score_N, choice_N, start_ND: the token's `Walk`.
    rules: what the requests ask for.
    clock_G: ticks so far, of each of the G parts of a mesh (`shards`); a part sees its own.
    logits_NTV: logits after every token, where they are kept; else None.
    scores: what the model said of every token, where it is kept; else None.
  """

  cache: Cache
  tokens_NT: jax.Array
  known_N: jax.Array
  depths_NT: jax.Array
  position_N: jax.Array
  phase_N: jax.Array
  since_N: jax.Array
  step_N: jax.Array
  place_N: jax.Array
  counts_NP: jax.Array
  x_ND: jax.Array
  score_N: jax.Array
  choice_N: jax.Array
  start_ND: jax.Array | None
  rules: Rules
  clock_G: jax.Array
  logits_NTV: jax.Array | None
  scores: Scores | None

  def walk(self, slots_B: jax.Array) -> Walk:
    """The tokens in flight of some slots, one a lane."""

    def take(leaf):
      return None if leaf is None else leaf[slots_B][:, None]

    return Walk(*map(take, (self.x_ND, self.score_N, self.choice_N, self.start_ND)))

  def with_walk(self, slots_B: jax.Array, walk: Walk) -> 'DecodeState':
    """The state with tokens in flight put back; slots beyond the last are dropped."""

    def put(leaf, new):
      return None if leaf is None else leaf.at[slots_B].set(new[:, 0], mode='drop')

    return self.replace(
      x_ND=put(self.x_ND, walk.x_BCD),
      score_N=put(self.score_N, walk.score_BC),
      choice_N=put(self.choice_N, walk.choice_BC),
      start_ND=put(self.start_ND, walk.start_BCD),
    )


def init_state(
  cached: CachedModel,
  slots: int,
  dtype: str,
  keep_logits: bool = False,
  parts: int = 1,
  top_logprobs: int | None = None,
) -> DecodeState:
  """All slots idle, of all `parts` of a mesh together."""
  config, layout = cached.config, cached.layout
  activations = jnp.dtype(config.dtype)

  def integers(*shape):
    return jnp.zeros((slots, *shape), jnp.int32)

  start_ND = None
  if lane_routing.has_router(cached, 'token_choice'):
    start_ND = jnp.zeros((slots, config.d_model), activations)
  rules = Rules(
    default_rules(slots),
    jnp.full((slots, STOP_TOKENS), NO_TOKEN, jnp.int32),
    integers(),
    integers(),
    jnp.zeros((slots,)),
    integers(),
  )
  return DecodeState(
    cache=cache_lib.init_cache(config, layout, slots, dtype),
    tokens_NT=integers(layout.max_len),
    known_N=integers(),
    depths_NT=jnp.zeros((slots, layout.max_len), jnp.int8),
    position_N=integers(),
    phase_N=integers(),
    since_N=integers(),
    step_N=integers(),
    place_N=integers(),
    counts_NP=integers(len(layout.places)),
    x_ND=jnp.zeros((slots, config.d_model), activations),
    score_N=jnp.zeros((slots,)),
    choice_N=integers(),
    start_ND=start_ND,
    rules=rules,
    clock_G=jnp.zeros((parts,), jnp.int32),
    logits_NTV=jnp.zeros((slots, layout.max_len, config.vocab_size)) if keep_logits else None,
    scores=None if top_logprobs is None else scores.empty(slots, layout.max_len, top_logprobs),
  )


def insert(
  state: DecodeState,
  prefix: Prefix | None,
  lanes_B: jax.Array,
  slots_B: jax.Array,
  tokens_BT: jax.Array,
  known_B: jax.Array,
  rules_B: Rules,
) -> DecodeState:
  """The state with sequences in slots, their first tokens computed already; slots beyond the last are dropped.

  Args:
    prefix: what is computed, of the sequences in `lanes_B`; None: nothing. At least one token must be left.
    tokens_BT: the known tokens, filled up to max_len.
    known_B: how many they are.
    rules_B: what the requests ask for.
  """

  def put(leaf, value):
    return leaf.at[slots_B].set(value, mode='drop')

  computed_B = 0 if prefix is None else prefix.lengths_B[lanes_B]
  if prefix is not None and prefix.scores is not None:
    state = state.replace(
      scores=jax.tree.map(lambda mine, theirs: put(mine, theirs[lanes_B]), state.scores, prefix.scores)
    )
  if prefix is not None:
    state = state.replace(
      cache=cache_lib.copy_slots(state.cache, slots_B, prefix.cache, lanes_B),
      counts_NP=put(state.counts_NP, prefix.counts_BP[lanes_B]),
      depths_NT=put(state.depths_NT, prefix.depths_BT[lanes_B]),
    )
  else:
    state = state.replace(counts_NP=put(state.counts_NP, 0), depths_NT=put(state.depths_NT, 0))
  return state.replace(
    tokens_NT=put(state.tokens_NT, tokens_BT),
    known_N=put(state.known_N, known_B),
    position_N=put(state.position_N, computed_B - 1),
    phase_N=put(state.phase_N, ENTRY),
    since_N=put(state.since_N, state.clock_G[0]),
    rules=jax.tree.map(put, state.rules, rules_B),
  )


def reuse(state: DecodeState, prefix: Prefix, slots_B: jax.Array, lengths_B: jax.Array) -> Prefix:
  """The empty prefix with the first `lengths_B` tokens of slots in its lanes; 0: the lane stays empty."""
  lanes_B = jnp.where(lengths_B > 0, jnp.arange(lengths_B.shape[0]), lengths_B.shape[0])
  depths_BT = state.depths_NT[slots_B]
  is_copied_BT = jnp.arange(depths_BT.shape[1]) < lengths_B[:, None]
  depths_BT = jnp.where(is_copied_BT, depths_BT, 0)
  steps_P1 = jnp.arange(prefix.counts_BP.shape[1])[:, None]
  said = prefix.scores
  if said is not None:
    said = jax.tree.map(
      lambda mine, theirs: mine.at[lanes_B].set(theirs[slots_B], mode='drop'), said, state.scores
    )
  return prefix.replace(
    cache=cache_lib.copy_slots(prefix.cache, lanes_B, state.cache, slots_B),
    lengths_B=lengths_B,
    counts_BP=(depths_BT[:, None] > steps_P1).sum(axis=-1),  # a token has a place of each step that it took
    depths_BT=depths_BT,
    scores=said,
  )


def release(state: DecodeState, slots_B: jax.Array) -> DecodeState:
  """The state with slots idle, whatever they did; those beyond the last are dropped."""
  return state.replace(phase_N=state.phase_N.at[slots_B].set(IDLE, mode='drop'))
