"""Rules of sampling against their definitions written out in NumPy, and against Hugging Face's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mor_jax.inference import sampling

VOCABULARY = 12
DRAWS = 4000
sample = jax.jit(sampling.sample)


def rules(count, seed=None, biases=None, **options):
  """Rules of `count` lanes: values of fields of SamplingRules, {token: bias}, seeds 0, 1, ... or the same one."""
  seeds = np.arange(count) if seed is None else np.full((count,), seed)
  given = {'temperature': 1.0, **options}
  made = sampling.default_rules(count).replace(seed_B=jnp.asarray(seeds, jnp.uint32))
  columns = {f'{name}_B': value for name, value in given.items()}
  made = made.replace(
    **{
      name: jnp.broadcast_to(jnp.asarray(v, getattr(made, name).dtype), (count,))
      for name, v in columns.items()
    }
  )
  for place, (token, bias) in enumerate((biases or {}).items()):
    made = made.replace(
      biased_BM=made.biased_BM.at[:, place].set(token), bias_BM=made.bias_BM.at[:, place].set(bias)
    )
  return made


def frequencies(logits_V, tokens=(), **options):
  """How often each token comes out of many draws that differ in their seed alone."""
  logits_BV = jnp.broadcast_to(jnp.asarray(logits_V, jnp.float32), (DRAWS, VOCABULARY))
  tokens_BT = jnp.zeros((DRAWS, 8), jnp.int32).at[:, : len(tokens)].set(jnp.array(tokens, jnp.int32))
  known_B = jnp.full((DRAWS,), len(tokens))
  drawn = sample(logits_BV, rules(DRAWS, **options), jnp.full((DRAWS,), 5), tokens_BT, known_B)
  return np.bincount(drawn, minlength=VOCABULARY) / DRAWS


def softmax(logits_V):
  weights = np.exp(logits_V - np.max(logits_V))
  return weights / weights.sum()


LOGITS = np.random.default_rng(0).normal(size=VOCABULARY) * 1.5


@pytest.mark.parametrize('temperature', [0.5, 1.0, 3.0])
def test_temperature(temperature):
  np.testing.assert_allclose(
    frequencies(LOGITS, temperature=temperature), softmax(LOGITS / temperature), atol=0.03
  )


def test_greedy_takes_the_likeliest_token_beside_lanes_that_draw():
  assert frequencies(LOGITS, temperature=0.0)[LOGITS.argmax()] == 1
  mixed = np.where(np.arange(DRAWS) % 2, 0.0, 1.0)
  drawn = frequencies(LOGITS, temperature=mixed)
  expected = (softmax(LOGITS) + np.eye(VOCABULARY)[LOGITS.argmax()]) / 2
  np.testing.assert_allclose(drawn, expected, atol=0.03)


def test_top_k_and_top_p_are_huggingface_s():
  """The tokens that remain: the k likeliest; of them the fewest that reach probability p."""
  order = np.argsort(-LOGITS)
  for top_k, top_p, temperature in (
    (3, 1.0, 1.0),
    (0, 0.6, 1.0),
    (0, 0.6, 2.0),
    (5, 0.5, 1.0),
    (0, 1e-6, 1.0),
  ):
    kept = order[:top_k] if top_k else order
    probability = softmax(LOGITS[kept] / temperature)
    needed = 1 + np.searchsorted(np.cumsum(probability), top_p) if top_p < 1 else len(kept)
    kept = kept[:needed]
    expected = np.zeros(VOCABULARY)
    expected[kept] = softmax(LOGITS[kept] / temperature)
    drawn = frequencies(LOGITS, top_k=top_k, top_p=top_p, temperature=temperature)
    np.testing.assert_allclose(drawn, expected, atol=0.03)
    assert set(np.flatnonzero(drawn)) <= set(kept.tolist())


def test_repetition_penalty():
  """Positive logits of tokens that occurred are divided, negative ones multiplied; others stay."""
  tokens = (int(LOGITS.argmax()), int(LOGITS.argmin()))
  punished = LOGITS.copy()
  for token in tokens:
    punished[token] = punished[token] / 1.8 if punished[token] > 0 else punished[token] * 1.8
  np.testing.assert_allclose(frequencies(LOGITS, tokens, penalty=1.8), softmax(punished), atol=0.03)


def test_biases_and_penalties_of_what_was_generated():
  """The first two tokens are the prompt's: only repetition counts them."""
  tokens, generated = (0, 1, 2, 2, 2, 3), {2: 3, 3: 1}
  expected = LOGITS.copy()
  for token, times in generated.items():
    expected[token] -= 0.4 + 0.3 * times
  expected[5] += 2.0
  options = {'presence': 0.4, 'frequency': 0.3, 'start': 2, 'biases': {5: 2.0, 7: -100.0}}
  drawn = frequencies(LOGITS, tokens, **options)
  expected[7] = -np.inf
  np.testing.assert_allclose(drawn, softmax(expected), atol=0.03)
  assert drawn[7] == 0
  assert frequencies(LOGITS, biases={7: 100.0}, temperature=0.0)[7] == 1


@pytest.mark.parametrize('min_p', [0.0, 0.1, 0.5, 1.0])
def test_min_p(min_p):
  kept = softmax(LOGITS) >= min_p * softmax(LOGITS).max()
  expected = softmax(np.where(kept, LOGITS, -np.inf))
  drawn = frequencies(LOGITS, min_p=min_p)
  np.testing.assert_allclose(drawn, expected, atol=0.03)
  assert set(np.flatnonzero(drawn)) <= set(np.flatnonzero(kept))


def test_a_draw_depends_on_seed_and_position_alone():
  logits_BV = jnp.broadcast_to(jnp.asarray(LOGITS, jnp.float32), (64, VOCABULARY))
  nothing = jnp.zeros((64, 4), jnp.int32), jnp.zeros((64,), jnp.int32)
  positions_B = jnp.arange(64)
  first = sample(logits_BV, rules(64, seed=3), positions_B, *nothing)
  other_way_round = sample(logits_BV, rules(64, seed=3), positions_B[::-1], *nothing)
  np.testing.assert_array_equal(first, other_way_round[::-1])
  assert (first != sample(logits_BV, rules(64, seed=4), positions_B, *nothing)).any()
  assert len(set(first.tolist())) > 3


@pytest.mark.torch
def test_the_same_tokens_remain_as_in_transformers():
  import torch
  from transformers.generation import logits_process as theirs

  logits_BV = np.random.default_rng(1).normal(size=(50, VOCABULARY)).astype(np.float32) * 2
  tokens_BT = np.random.default_rng(2).integers(0, VOCABULARY, (50, 4))
  processors = [
    theirs.RepetitionPenaltyLogitsProcessor(1.3),
    theirs.TemperatureLogitsWarper(0.8),
    theirs.TopKLogitsWarper(7),
    theirs.TopPLogitsWarper(0.85),
    theirs.MinPLogitsWarper(0.2),
  ]
  expected = torch.tensor(logits_BV)
  for processor in processors:
    expected = processor(torch.tensor(tokens_BT), expected)
  ours = rules(50, temperature=0.8, top_k=7, top_p=0.85, penalty=1.3, min_p=0.2)
  got = sampling._penalize(jnp.asarray(logits_BV), ours, jnp.asarray(tokens_BT), jnp.full((50,), 4))
  got = sampling._drop_unlikely(sampling._truncate(got / 0.8, ours), ours.min_p_B)
  np.testing.assert_allclose(got, expected.numpy(), atol=1e-5)


def test_neighbouring_seeds_and_positions_draw_independently():
  """Chi-square of the joint draws of seeds s and s + 1, and of places p and p + 1, of 4,000 pairs each."""
  logits_BV = jnp.zeros((DRAWS, 4))
  tokens_BT, known_B = jnp.zeros((DRAWS, 1), jnp.int32), jnp.zeros(DRAWS, jnp.int32)
  places_B = jnp.arange(DRAWS)
  first, second = (
    sample(logits_BV, rules(DRAWS, seed=seed), places_B, tokens_BT, known_B) for seed in (7, 8)
  )
  for one, other in ((first, second), (first[:-1], first[1:])):
    table = np.zeros((4, 4))
    np.add.at(table, (np.asarray(one), np.asarray(other)), 1)
    assert stats.chi2_contingency(table).pvalue > 1e-3
  same = sample(logits_BV, rules(DRAWS, seed=7), places_B, tokens_BT, known_B)
  assert (same == first).all()
