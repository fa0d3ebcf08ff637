"""Log-likelihoods against the full forward pass, whatever they are computed together with."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy.special import log_softmax

from mor_jax.config import ConfigError
from mor_jax.evaluation.scoring import Scorer, row_length

MAX_LEN = 64
KINDS = {
  'mor': {'kind': 'mor', 'num_recursions': 2, 'threshold_slack': 0.5},  # places do run out
  'token_choice': {'kind': 'mor', 'num_recursions': 2, 'router': 'token_choice'},
  'vanilla': {'kind': 'vanilla'},
}


@functools.cache
def scorer(kind: str, routing: str = 'threshold', batch_size: int = 4) -> Scorer:
  made, variables = tiny.model(**KINDS[kind])
  return Scorer(made, variables, MAX_LEN, batch_size, routing)


@functools.cache
def pairs() -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
  """Contexts and continuations of many lengths; some share their context, some their whole text."""
  rng = np.random.default_rng(3)
  texts = [
    tuple(rng.integers(0, tiny.SHAPE['vocab_size'], length).tolist()) for length in (3, 9, 17, 30, 41, 63)
  ]
  cut = [(text[:-cut], text[-cut:]) for text in texts for cut in (1, 2)]
  return [*cut, (texts[2][:-1], (7,)), (texts[0][:1], texts[0][1:])]


def by_hand(kind: str, routing: str, context, continuation) -> tuple[float, bool]:
  """The sum over the continuation of log-softmax of the logits of the text alone."""
  made, variables = tiny.model(**KINDS[kind])
  tokens = (*context, *continuation)[:-1]
  later = (0,) * (MAX_LEN - len(tokens) if routing == 'threshold' else 0)  # one shape for all: it is causal
  output = tiny.apply(made, routing)(variables, jnp.array([tokens + later]), max_len=MAX_LEN)
  logits_NV = np.asarray(output.logits[0, len(context) - 1 : len(tokens)], np.float64)
  scores_N = log_softmax(logits_NV, axis=-1)[np.arange(len(continuation)), continuation]
  return scores_N.sum(), bool((logits_NV.argmax(-1) == continuation).all())


@pytest.mark.parametrize('kind', KINDS)
def test_scores_are_those_of_the_text_alone(kind):
  found = scorer(kind).score(pairs())
  for (context, continuation), (score, greedy) in zip(pairs()[::3], found[::3], strict=True):
    expected, likeliest = by_hand(kind, 'threshold', context, continuation)
    assert score == pytest.approx(expected, abs=1e-4)
    assert greedy == likeliest


def test_top_k_scores_are_those_of_the_text_alone():
  """Padding would change how many tokens top-k chooses."""
  chosen = [pairs()[0], pairs()[8], pairs()[9]]
  for pair, (score, greedy) in zip(chosen, scorer('mor', 'topk').score(chosen), strict=True):
    expected, likeliest = by_hand('mor', 'topk', *pair)
    assert score == pytest.approx(expected, abs=1e-4)
    assert greedy == likeliest


@pytest.mark.parametrize('kind', ['mor', 'token_choice'])
def test_company_changes_nothing(kind):
  together = scorer(kind).score(pairs())
  order = np.random.default_rng(0).permutation(len(pairs()))
  shuffled = scorer(kind, batch_size=2).score([pairs()[index] for index in order])
  for index, (score, greedy) in zip(order, shuffled, strict=True):
    assert score == pytest.approx(together[index][0], abs=1e-4)
    assert greedy == together[index][1]


def chain_difference(routing: str) -> float:
  """Largest difference between a text's score and the sum of those of its parts, each after what is before it."""
  differences = []
  for seed in range(4):
    text = tuple(np.random.default_rng(seed).integers(0, tiny.SHAPE['vocab_size'], 31).tolist())
    parts = [(text[:10], text[10:]), (text[:10], text[10:20]), (text[:20], text[20:])]
    whole, first, second = scorer('mor', routing).score(parts)
    differences.append(abs(whole[0] - first[0] - second[0]))
  return max(differences)


def test_scores_obey_the_chain_rule_under_threshold_routing_only():
  """What comes later cannot change the score of what came before; top-k, which looks ahead, fails this."""
  assert chain_difference('threshold') < 1e-4
  assert chain_difference('topk') > 1e-2


def test_the_likeliest_continuation_is_recognised():
  made, variables = tiny.model(**KINDS['mor'])
  text = list(pairs()[4][0])
  start = len(text)
  for _ in range(3):
    output = tiny.apply(made, 'threshold')(variables, jnp.array([text]), max_len=MAX_LEN)
    text.append(int(output.logits[0, -1].argmax()))
  best = tuple(text[start:])
  other = (*best[:-1], (best[-1] + 1) % tiny.SHAPE['vocab_size'])
  (score, greedy), (worse, not_greedy) = scorer('mor').score([(text[:start], best), (text[:start], other)])
  assert greedy
  assert not not_greedy
  assert score > worse


def test_long_texts_lose_their_beginning():
  rng = np.random.default_rng(1)
  text = tuple(rng.integers(0, tiny.SHAPE['vocab_size'], MAX_LEN + 20).tolist())
  found, expected = scorer('vanilla').score([(text[:-3], text[-3:]), (text[19:-3], text[-3:])])
  assert found == expected


def test_every_pair_is_counted_once():
  counted = []
  scores = scorer('mor').score([*pairs(), ((1,), ())], counted.append)
  assert sum(counted) == len(pairs()) + 1
  assert scores[-1] == (0.0, True), 'nothing is certain to follow'
  assert scorer('mor').score([]) == []


def test_what_cannot_be_scored_is_refused():
  with pytest.raises(ConfigError, match='raise it'):
    scorer('mor').score([((1,), (1,) * (MAX_LEN + 1))])
  with pytest.raises(ConfigError, match='give a context'):
    scorer('mor').score([((), (1,))])


def test_rows_are_little_longer_than_texts_and_have_few_lengths():
  lengths = range(1, 4096)
  assert all(length <= row_length(length) <= max(length + 15, 1.13 * length) for length in lengths)
  assert len({row_length(length) for length in lengths}) < 70
