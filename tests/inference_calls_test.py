"""Calls of the engine end soon."""

from mor_jax.inference.calls import CallLength


def test_a_call_has_as_many_ticks_as_take_the_time():
  length = CallLength(8, seconds=0.05)
  assert length.ticks == 8, 'nothing is known yet'
  length.learn(8, 30.0)
  assert length.ticks == 8, 'the first call was compiled'
  length.learn(8, 0.16)
  assert length.ticks == 2
  for _ in range(20):
    length.learn(2, 0.4)
  assert length.ticks == 1, 'a tick that is too long is a call'
  for _ in range(20):
    length.learn(1, 0.001)
  assert length.ticks == 8, 'no more than the most'


def test_calls_of_drafts_and_of_no_ticks_are_passed_over():
  length = CallLength(8, seconds=0.05)
  for _ in range(3):
    length.learn(0, 1.0)
  assert length.ticks == 8
  assert CallLength(8).ticks == 8
