"""Beginnings that slots hold: what is copied gives the tokens, depths and scores of what is computed."""

import dataclasses

import numpy as np
import pytest

from mor_jax.inference.prefixes import Prefixes, Reused
from mor_jax.inference.requests import Request
from mor_jax.inference.scheduler import Scheduler
from tests import tiny, tiny_engine
from tests.decoding_cases import EXPERT, TOKEN

COMMON = tiny_engine.prompt(30, seed=3)
CASES = {
  'expert': EXPERT,
  'expert hybrid': {**EXPERT, 'kv': 'hybrid'},
  'expert shared': {**EXPERT, 'kv': 'shared'},
  'token': TOKEN,
  'recursive': {'kind': 'recursive'},
}
IN_DEFAULT_SUITE = ('expert', 'expert hybrid')


def requests(**options) -> list[Request]:
  """A prompt, one that shares 30 tokens with it, and the first again."""
  first = Request(COMMON + tiny_engine.prompt(8, seed=4), max_new_tokens=12, temperature=1.0, **options)
  return [
    first,
    dataclasses.replace(first, prompt=COMMON + tiny_engine.prompt(12, seed=5), seed=1),
    dataclasses.replace(first, seed=2),
  ]


def said(result) -> tuple:
  return result.tokens, result.depths


@pytest.mark.parametrize(
  'name', [name if name in IN_DEFAULT_SUITE else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_what_is_copied_is_what_is_computed(name):
  """With regions that are full before the end, one slot after another, and after an answer."""
  made, variables = tiny.model(seed=9, **CASES[name])
  engine = tiny_engine.engine(made, variables, slots=2, slack=0.8, top_logprobs=2)
  for options in ({}, {'prompt_logprobs': True}):
    scheduler = Scheduler(engine, ticks_per_call=7)
    first, second, again = requests(**options)
    found = scheduler.run([first])
    # A chat: the prompt is what was said before, and more.
    turn = dataclasses.replace(first, prompt=(*first.prompt, *found[0].tokens, 5, 6))
    found += [scheduler.run([request])[0] for request in (turn, second, again)]
    tokens, reused = scheduler.prompt_tokens
    assert tokens == sum(len(result.request.prompt) for result in found)
    scored = bool(options)
    assert reused == 38 + 11 + 30 + 37 - 3 * scored
    for result in found:
      (alone,) = Scheduler(engine).run([result.request])
      assert said(result) == said(alone)
      start = 1 if scored else len(result.request.prompt)
      np.testing.assert_allclose(result.logprobs[start:], alone.logprobs[start:], atol=1e-5)


def test_only_what_was_computed_alike_is_found():
  made, variables = tiny.model(seed=9, **EXPERT)
  prefixes = Prefixes(tiny_engine.engine(made, variables))
  first, second, _ = requests()
  assert prefixes.find(second, 0) is None
  prefixes.keep(0, first, np.array(COMMON[:20]))
  prefixes.keep(2, first, np.array(first.prompt))
  prefixes.keep(1, dataclasses.replace(first, max_recursions=2), np.array(second.prompt))
  assert prefixes.find(second, 0) == Reused(2, 30)
  assert prefixes.find(first, 0) == Reused(2, 37), 'the last token is always computed'
  assert prefixes.find(dataclasses.replace(second, max_recursions=2), 0) == Reused(1, 41)
  assert prefixes.find(dataclasses.replace(second, threshold_shift=1.0), 0) is None
  assert prefixes.find(dataclasses.replace(second, prompt_logprobs=True), 0) is None
  assert prefixes.find(dataclasses.replace(second, prompt=(*COMMON[:7], 1, 2, 3)), 0) is None, 'too short'
  assert prefixes.find(second, 1) is None, 'another part of the mesh'
  prefixes.clear()
  assert prefixes.find(second, 0) is None
