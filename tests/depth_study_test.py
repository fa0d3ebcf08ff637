"""The depth study on a stand-in for the training: what is equal, which rates are taken, what is refused."""

import functools

import entry_points
import pytest
import studies
from absl.testing import flagsaver
from rich.console import Console

from benchmarks.depth_parts import PARTS
from mor_jax.config import ConfigError


@pytest.fixture
def depth():
  return entry_points.load('benchmarks.depth')


@pytest.fixture
def study_of(depth, tmp_path, monkeypatch):
  """Studies whose models learn best at 0.003."""
  studies.stand_in(monkeypatch, 0.003)
  with flagsaver.flagsaver(workdir=str(tmp_path), source='files:*.txt'):
    yield functools.partial(depth.Study, Console(quiet=True))


@pytest.mark.parametrize('name', PARTS)
def test_contenders_can_be_trained_and_are_equal_in_what_they_say(study_of, name):
  study = study_of(name)
  keys = [(one.name, 3e-3, 0) for one in study.part.contenders]
  runs = study._plan(keys).runs
  base = runs[0]
  independent = {one.name for one in study.part.contenders if one.tuned_as is None}
  for one, run in zip(study.part.contenders, runs, strict=True):
    if one.equal == 'flops':
      assert run.work == pytest.approx(base.work, rel=0.01)
      assert run.tokens != base.tokens
    else:
      assert run.tokens == base.tokens
    assert one.tuned_as is None or one.tuned_as in independent
  assert len({run.name for run in runs}) == len(keys)


def test_rates_are_tuned_on_the_first_seed_and_taken_by_ablations(study_of):
  study = study_of('shown')
  study.train([('benefit', rate, 0) for rate in (1.5e-3, 3e-3, 6e-3)] + [('benefit', 1.5e-3, 1)])
  one = {one.name: one for one in study.part.contenders}
  assert study.best_rate(one['benefit']) == study.best_rate(one['benefit_hybrid']) == 3e-3
  tuned = study.tuned()['benefit']
  assert list(tuned) == ['0.0015', '0.003', '0.006']
  assert tuned['0.003'] == min(tuned.values()) == 2.0


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    ({'parts': ['prose']}, '--parts=prose is not one of shown, hidden'),
    ({'parts': ['text']}, '--source is missing, which --parts=text needs'),
    ({'only': ['benefits']}, '--only=benefits must be of benefit, gate'),
  ],
)
def test_flags_that_cannot_work_are_refused(depth, given, message):
  with flagsaver.flagsaver(**given), pytest.raises(ConfigError, match=message):
    depth.main()
