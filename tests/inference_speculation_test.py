"""Drafts of the first recursions: the text, depths and scores of decoding without them, whatever is rolled back.

That every kind of model has the logits of its full forward pass so, is in inference_engine_test.py.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from mor_jax.config import ConfigError
from mor_jax.inference import speculation
from mor_jax.inference.pace import PATIENCE, Pace
from mor_jax.inference.requests import Request, RequestError
from mor_jax.inference.scheduler import Scheduler
from tests import tiny, tiny_engine
from tests.decoding_cases import EXPERT

DRAWS = 20_000


@functools.cache
def engine(speculate: int = 3, **options):
  """One whose regions are full before the end."""
  made, variables = tiny.model(seed=9, **EXPERT)
  return tiny_engine.engine(
    made, variables, slack=0.8, top_logprobs=2, keep_logits=True, speculate=speculate, **options
  )


class Alternating(Scheduler):
  """Drafts and ticks in turns, a few at a time, so that tokens are on their way when drafts begin."""

  def _drafts_for(self) -> int:
    self._turn = not getattr(self, '_turn', False)
    return len(self._resident) if self._turn else 0


def mixed() -> list:
  """Greedy and drawn, penalties, stops, other lengths of drafts and depths, more than there are slots."""
  plain = tiny_engine.requests((1, 9, 20, 33, 5, 2, 12), max_new_tokens=50)
  return [
    plain[0],
    dataclasses.replace(plain[1], temperature=1.0, top_k=20, presence_penalty=0.5),
    dataclasses.replace(plain[2], temperature=0.8, top_p=0.9, repetition_penalty=1.3, speculate=1),
    dataclasses.replace(plain[3], speculate=0, temperature=1.0),
    dataclasses.replace(plain[4], stop_tokens=(3, 7, 11, 19), temperature=1.0, prompt_logprobs=True),
    dataclasses.replace(plain[5], max_new_tokens=1),
    dataclasses.replace(plain[6], max_recursions=2, threshold_shift=0.1, temperature=1.0, min_p=0.05),
  ]


def run(scheduler: Scheduler) -> list:
  found = scheduler.run(mixed())
  return [
    (result.tokens, result.depths, result.finish, result.end_token, result.logprobs) for result in found
  ]


def assert_same(found: list, expected: list) -> None:
  for (*ours, logprobs), (*theirs, others) in zip(found, expected, strict=True):
    assert ours == theirs
    said = [(a, b) for a, b in zip(logprobs, others, strict=True) if b is not None]
    assert said
    np.testing.assert_allclose(*zip(*said, strict=True), atol=1e-4)


@functools.cache
def expected() -> list:
  """What ticks give."""
  return run(Scheduler(engine(), ticks_per_call=20, drafting=False))


@pytest.mark.parametrize('made', [Scheduler, Alternating])
def test_requests_of_every_kind_get_what_ticks_give(made):
  scheduler = made(engine(), ticks_per_call=20, drafting=True)
  assert_same(run(scheduler), expected())
  assert scheduler.statistics.checks > 0
  assert made is Scheduler or scheduler.statistics.ticks > 0


@pytest.mark.parametrize('fault', ['places kept', 'last layer of the draft', 'under way'])
def test_what_is_not_rolled_back_is_noticed(fault, monkeypatch):
  keep, check = speculation._keep, speculation._check

  def keeps_places(drafting, state, lanes, tokens_BT, checked, tally):
    before_BP = state.counts_NP[lanes.slots_B]
    state, tally = keep(drafting, state, lanes, tokens_BT, checked, tally)
    steps_P = np.arange(before_BP.shape[1])
    all_BP = (lanes.real_BC[..., None] & (checked.depth_BC[..., None] > steps_P)).sum(axis=1)
    return state.replace(counts_NP=state.counts_NP.at[lanes.slots_B].set(before_BP + all_BP)), tally

  def keeps_entries(cached, drafting, params, state, lanes, tokens_BT, passed):
    after, checked = check(cached, drafting, params, state, lanes, tokens_BT, passed)
    return after.replace(cache=after.cache.replace(last=state.cache.last)), checked

  name, faulty = {
    'places kept': ('_keep', keeps_places),
    'last layer of the draft': ('_check', keeps_entries),
    'under way': ('_settle', lambda state: state.replace(phase_N=jax.numpy.minimum(state.phase_N, 1))),
  }[fault]
  monkeypatch.setattr(speculation, name, faulty)
  lengths = {'places kept': 2, 'last layer of the draft': 4, 'under way': 5}  # each a program of its own
  made = Alternating if fault == 'under way' else Scheduler
  found = run(made(engine(lengths[fault]), ticks_per_call=20, drafting=True))
  with pytest.raises(AssertionError):
    assert_same(found, expected())


@pytest.mark.slow
def test_draws_have_the_distribution_of_the_whole_model():
  """Chi-square over 20,000 second tokens, which follow drafts that are right or wrong, and their mean and variance."""
  made, variables = tiny.model(seed=9, **EXPERT, vocab_size=16)
  fast = tiny_engine.engine(made, variables, slots=64, slack=1.0, speculate=2)
  full = tiny.apply(made, 'threshold')

  def forward(tokens: tuple[int, ...]):
    return full(variables, np.array([tokens], np.int32), max_len=64, slack=1.0)

  # One whose last token takes every recursion: the draft, which takes one, is often wrong.
  prompts = (tuple(token % 16 for token in tiny_engine.prompt(6, seed)) for seed in range(100))
  prompt = next(prompt for prompt in prompts if forward(prompt).routing.depth_BT[0, -1] == 3)
  template = Request(prompt, temperature=1.0, max_new_tokens=2)
  scheduler = Scheduler(fast, drafting=True)
  results = scheduler.run(dataclasses.replace(template, seed=seed) for seed in range(DRAWS))
  pairs = np.array([result.tokens for result in results])
  assert 0.1 < np.mean(scheduler.statistics.acceptance) < 0.9
  likely = np.bincount(pairs[:, 0], minlength=16).argmax()
  second = pairs[pairs[:, 0] == likely, 1]
  share_V = np.asarray(jax.nn.softmax(forward((*prompt, likely)).logits[0, -1]), np.float64)
  expected_V, found_V = share_V * len(second), np.bincount(second, minlength=16)
  chi_square = ((found_V - expected_V) ** 2 / expected_V).sum()
  assert chi_square < 37.7, 'of 15 degrees of freedom, one in a thousand'
  mean = (share_V * np.arange(16)).sum()
  deviation = np.sqrt((share_V * (np.arange(16) - mean) ** 2).sum())
  assert abs(second.mean() - mean) < 3.3 * deviation / np.sqrt(len(second))
  assert second.std() == pytest.approx(deviation, rel=0.05)


def test_bad_sizes_are_refused():
  made, variables = tiny.model(seed=9, **EXPERT)
  for options, message in (
    ({'speculate': 17}, r'speculate=17 is not allowed: must be from 0 to 16 tokens'),
    ({'speculate': 2, 'draft_recursions': 4}, r'draft_recursions=4 is not allowed: must be from 1 to 3'),
  ):
    with pytest.raises(ConfigError, match=message):
      tiny_engine.engine(made, variables, **options)
  request = dataclasses.replace(mixed()[0], speculate=4)
  with pytest.raises(RequestError, match=r'speculate=4 is not allowed: must be from 0 to 3, for which'):
    Scheduler(engine()).submit(request)


def test_the_faster_way_is_taken_and_the_other_tried_now_and_then():
  pace = Pace()

  def calls(count: int, rates: dict[bool, float], resident: int = 1) -> list[bool]:
    taken = []
    for _ in range(count):
      way = pace.drafts(resident)
      pace.learn(resident, way, 100, 100 / rates[way])
      taken.append(way)
    return taken

  first = calls(200, {True: 150.0, False: 100.0})
  assert set(first[:6]) == {True, False}
  assert all(first[6 : 6 + PATIENCE])
  assert 2 <= first[6:].count(False) <= 4, 'tried again, ever more seldom'
  later = calls(200, {True: 60.0, False: 100.0})
  assert later[100:].count(True) <= 2
  assert all(calls(20, {True: 150.0, False: 100.0}, resident=16)[6:]), 'others are measured for themselves'
