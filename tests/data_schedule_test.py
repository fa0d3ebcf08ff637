"""Batch schedules: sizes, where each batch begins, and the steps that a number of rows pays for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mor_jax.config import Config, ConfigError, with_changes
from mor_jax.data import schedule

RAMP = {
  'steps': 100,
  'warmup_steps': 0,
  'global_batch': 64,
  'accumulation': 16,
  'ramp_batch': 8,
  'ramp_steps': 30,
}


def test_a_batch_doubles_in_equal_stages():
  batches = schedule.of(with_changes(Config(), train=RAMP).train)
  assert batches.stages == ((0, 8), (10, 16), (20, 32), (30, 64))
  assert [batches.micro_batches(step) for step in (0, 9, 10, 29, 30, 1000)] == [2, 2, 4, 8, 16, 16]


def test_without_ramp_every_batch_is_the_same():
  batches = schedule.of(with_changes(Config(), train={'global_batch': 12, 'accumulation': 3}).train)
  assert batches == schedule.constant(12, 3)
  assert {(batches.rows(step), batches.micro_batches(step)) for step in (0, 1, 999)} == {(12, 3)}


@st.composite
def schedules(draw):
  lengths = draw(st.lists(st.integers(1, 9), max_size=4))
  firsts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
  return schedule.BatchSchedule(tuple((first, 2 << i) for i, first in enumerate(firsts)), micro_rows=2)


@given(schedules(), st.integers(0, 60))
def test_a_batch_begins_where_the_one_before_ended(batches, step):
  assert batches.rows_before(0) == 0
  assert batches.rows_before(step + 1) == batches.rows_before(step) + batches.rows(step)


@given(schedules(), st.integers(1, 60))
def test_steps_for_rows_is_the_inverse(batches, steps):
  rows = batches.rows_before(steps)
  assert batches.steps_for(rows) == steps
  assert batches.steps_for(rows + 0.4 * batches.rows(steps)) == steps
  assert batches.steps_for(rows + 0.6 * batches.rows(steps)) == steps + 1


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'ramp_steps': 0}, r'train\.ramp_batch=8 and train\.ramp_steps=0 belong together'),
    ({'ramp_batch': None}, r'train\.ramp_batch=None and train\.ramp_steps=30 belong together'),
    ({'ramp_batch': 12}, r'train\.ramp_batch=12 cannot double .* use one of 4, 8, 16, 32$'),
    ({'ramp_batch': 64}, 'cannot double'),
    ({'ramp_batch': 2}, r'in micro-batches of 4 rows \(train\.accumulation=16\)'),
    ({'accumulation': 1}, r'raise train\.accumulation'),
    ({'ramp_steps': 2}, r'train\.ramp_steps=2 is not allowed: must be >= 3'),
    ({'ramp_steps': 101}, r'train\.ramp_steps=101 is more than train\.steps=100'),
  ],
)
def test_ramps_that_cannot_work_are_refused(change, message):
  with pytest.raises(ConfigError, match=message):
    with_changes(Config(), train={**RAMP, **change})
