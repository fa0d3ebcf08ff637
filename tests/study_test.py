"""The logic of the small-scale study, on a stand-in for the training whose best learning rate is known."""

import entry_points
import pytest
import studies
from absl.testing import flagsaver
from rich.console import Console

from mor_jax.config import ConfigError, with_changes
from mor_jax.model import flops


@pytest.fixture
def study():
  return entry_points.load('benchmarks.study')


@pytest.fixture
def made(study, tmp_path, monkeypatch):
  """A study whose models learn best at 0.016, beyond the range that it begins with."""
  studies.stand_in(monkeypatch, 0.016)
  with flagsaver.flagsaver(workdir=str(tmp_path / 'study'), parallel=2):
    yield study.Study(Console(quiet=True), {'data.source': 'files:*.txt'})


def test_range_of_learning_rates_grows_until_the_best_lies_inside(made, study):
  models = study.MODELS[:1] + study.MODELS[3:4]
  made.train([(model, rate, 0) for model in models for rate in (1e-3, 2e-3, 4e-3, 8e-3)])
  assert [made.missing_rates(model) for model in models] == [[0.016], [0.016]]
  made.train([(model, 0.016, 0) for model in models])
  assert [made.missing_rates(model) for model in models] == [[0.032], [0.032]]
  made.train([(model, 0.032, 0) for model in models])
  for model in models:
    assert made.missing_rates(model) == []
    assert made.best_rate(model) == 0.016


def test_models_are_equal_in_what_they_say(made, study):
  made.train([(model, 4e-3, 0) for model in study.MODELS])
  runs = {model: run for (model, _, _), run in made.runs.items()}
  vanilla = runs[study.MODELS[0]]
  for model, run in runs.items():
    if model.equal == 'flops':
      assert run.work == pytest.approx(vanilla.work, rel=0.01)
      assert run.tokens > 1.2 * vanilla.tokens
    else:
      assert run.tokens == vanilla.tokens
    size = flops.count_parameters(with_changes(run.config, model={'vocab_size': 1024}).model).total
    assert 1e6 < size < 5e6
    assert run.config.model.causality == ('aux_loss' if model in study.TUNED else 'none')
  assert len({run.name for run in runs.values()}) == len(study.MODELS) == 9
  assert len(study.TUNED) == 7
  assert all(model.tuned_as in study.TUNED for model in study.MODELS)


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    ({'source': None}, '--source is missing'),
    ({'source': 'x', 'rates': ['1e-3', '2e-3', '4e-3']}, 'must be at least four'),
    ({'source': 'x', 'rates': ['1e-3', '2e-3', '4e-3', '3e-3']}, 'must be at least four, rising'),
    ({'source': 'x', 'seeds': 0}, '--seeds=0 is not allowed'),
  ],
)
def test_flags_that_cannot_work_are_refused(study, given, message):
  with flagsaver.flagsaver(**given), pytest.raises(ConfigError, match=message):
    study.main()
