"""Samples the next token from logits: greedy or at random, with penalties, biases and cuts, set per lane.

The order is that of Hugging Face: bias and penalties, temperature, top-k, top-p, min-p. The random key depends only on
the request's seed and the token's position, so a request gets the same text whatever else is in the batch.
"""

import jax
import jax.numpy as jnp
from flax import struct

NO_LIMIT = 0
MOST_BIASES = 300  # tokens with a bias that a request may have
NO_BIAS = 2**31 - 1  # beyond every vocabulary


@struct.dataclass
class SamplingRules:
  """Sampling parameters of each lane (or slot).

  Attributes:
    temperature_B: divides the logits; 0 takes the most likely token.
    top_k_B: keeps this many of the most likely tokens; NO_LIMIT: all.
    top_p_B: keeps the smallest set of most likely tokens with at least this total probability.
    penalty_B: for tokens that already occurred, divides positive logits and multiplies negative ones
      (Keskar et al. 2019).
    seed_B: seed of the request.
    min_p_B: drops tokens whose probability is below this share of that of the likeliest; 0: none.
    presence_B: taken from the logit of each token that was generated before.
    frequency_B: taken from the logit of a token as often as it was generated before.
    start_B: place of the first generated token.
    biased_BM, bias_BM: ids of tokens, and what is added to their logits; NO_BIAS: nothing.
  """

  temperature_B: jax.Array
  top_k_B: jax.Array
  top_p_B: jax.Array
  penalty_B: jax.Array
  seed_B: jax.Array
  min_p_B: jax.Array
  presence_B: jax.Array
  frequency_B: jax.Array
  start_B: jax.Array
  biased_BM: jax.Array
  bias_BM: jax.Array


def default_rules(count: int) -> SamplingRules:
  """Greedy sampling for `count` lanes."""
  return SamplingRules(
    temperature_B=jnp.zeros((count,)),
    top_k_B=jnp.zeros((count,), jnp.int32),
    top_p_B=jnp.ones((count,)),
    penalty_B=jnp.ones((count,)),
    seed_B=jnp.zeros((count,), jnp.uint32),
    min_p_B=jnp.zeros((count,)),
    presence_B=jnp.zeros((count,)),
    frequency_B=jnp.zeros((count,)),
    start_B=jnp.zeros((count,), jnp.int32),
    biased_BM=jnp.full((count, MOST_BIASES), NO_BIAS, jnp.int32),
    bias_BM=jnp.zeros((count, MOST_BIASES)),
  )


@jax.named_scope('sampling')
def sample(
  logits_BV: jax.Array,
  rules: SamplingRules,
  positions_B: jax.Array,
  tokens_BT: jax.Array,
  known_B: jax.Array,
) -> jax.Array:
  """Samples the next tokens (B,), int32. Skips every operation that no lane needs.

  Args:
    logits_BV: next-token logits.
    rules: sampling parameters of the lanes.
    positions_B: position of the token to sample.
    tokens_BT: token buffer of each sequence, of which the first `known_B` are valid.
    known_B: number of valid tokens.
  """
  logits_BV = jax.lax.cond(
    (rules.biased_BM != NO_BIAS).any(), lambda z: _bias(z, rules), lambda z: z, logits_BV
  )
  penalized = (rules.penalty_B != 1) | (rules.presence_B != 0) | (rules.frequency_B != 0)
  logits_BV = jax.lax.cond(
    penalized.any(), lambda z: _penalize(z, rules, tokens_BT, known_B), lambda z: z, logits_BV
  )
  random = rules.temperature_B > 0
  return jax.lax.cond(
    random.any(),
    lambda z: jnp.where(random, _draw(z, rules, positions_B), z.argmax(axis=-1)),
    lambda z: z.argmax(axis=-1),
    logits_BV,
  ).astype(jnp.int32)


def _bias(logits_BV, rules):
  rows_B1 = jnp.arange(logits_BV.shape[0])[:, None]
  return logits_BV.at[rows_B1, rules.biased_BM].add(rules.bias_BM.astype(logits_BV.dtype), mode='drop')


def _penalize(logits_BV, rules, tokens_BT, known_B):
  vocabulary = logits_BV.shape[1]
  places_1T = jnp.arange(tokens_BT.shape[1])[None]
  written_BT = jnp.where(places_1T < known_B[:, None], tokens_BT, vocabulary)
  generated_BT = jnp.where(places_1T >= rules.start_B[:, None], written_BT, vocabulary)
  rows_B1 = jnp.arange(logits_BV.shape[0])[:, None]
  occurred_BV = jnp.zeros(logits_BV.shape, bool).at[rows_B1, written_BT].set(True, mode='drop')
  penalty_B1 = rules.penalty_B[:, None]
  punished_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
  logits_BV = jnp.where(occurred_BV, punished_BV, logits_BV)
  times_BV = jnp.zeros(logits_BV.shape, logits_BV.dtype).at[rows_B1, generated_BT].add(1, mode='drop')
  return logits_BV - rules.presence_B[:, None] * (times_BV > 0) - rules.frequency_B[:, None] * times_BV


def _draw(logits_BV, rules, positions_B):
  logits_BV = logits_BV / jnp.where(rules.temperature_B > 0, rules.temperature_B, 1)[:, None]
  truncated = ((rules.top_k_B != NO_LIMIT) | (rules.top_p_B < 1)).any()
  logits_BV = jax.lax.cond(truncated, lambda z: _truncate(z, rules), lambda z: z, logits_BV)
  logits_BV = jax.lax.cond(
    (rules.min_p_B > 0).any(), lambda z: _drop_unlikely(z, rules.min_p_B), lambda z: z, logits_BV
  )
  keys_B = jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.key(seed), position))(
    rules.seed_B, positions_B
  )
  return jax.vmap(jax.random.categorical)(keys_B, logits_BV)


def _truncate(logits_BV, rules):
  """Sets the logits of tokens outside the top k or the top p to minus infinity."""
  vocabulary = logits_BV.shape[1]
  order_BV = jnp.argsort(-logits_BV, axis=-1, stable=True)
  sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=1)
  count_B1 = jnp.where(rules.top_k_B == NO_LIMIT, vocabulary, rules.top_k_B)[:, None]
  sorted_BV = jnp.where(jnp.arange(vocabulary) < count_B1, sorted_BV, -jnp.inf)
  probability_BV = jax.nn.softmax(sorted_BV)
  before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
  # The likeliest token always stays, even where p is 0 or rounding makes the sum reach it.
  kept_BV = (before_BV < rules.top_p_B[:, None]).at[:, 0].set(True)
  kept_BV |= (rules.top_p_B >= 1)[:, None]
  sorted_BV = jnp.where(kept_BV, sorted_BV, -jnp.inf)
  rows_B1 = jnp.arange(logits_BV.shape[0])[:, None]
  return jnp.zeros_like(logits_BV).at[rows_B1, order_BV].set(sorted_BV, unique_indices=True)


def _drop_unlikely(logits_BV, min_p_B):
  """Sets the logits of tokens below a share of the likeliest one's probability to minus infinity."""
  least_B1 = logits_BV.max(axis=-1, keepdims=True) + jnp.log(min_p_B)[:, None]
  return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
