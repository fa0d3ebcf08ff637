import numpy as np
import pytest

from mor_jax.training.watch.alarm import SpikeAlarm


def _losses(steps: int, seed: int = 0) -> np.ndarray:
  """A falling loss with noise of deviation 0.05."""
  return 3 + 5 * np.exp(-np.arange(steps) / 40) + np.random.default_rng(seed).normal(0, 0.05, steps)


def test_a_spike_stands_out():
  losses, alarm = _losses(400), SpikeAlarm(6.0)
  losses[300] += 1.0
  scores = [alarm.z_score(loss) for loss in losses]
  assert [step for step, score in enumerate(scores) if alarm.is_spike(score)] == [300]
  assert scores[300] == pytest.approx(1.0 / 0.05, rel=0.5)


@pytest.mark.parametrize('seed', range(5))
def test_an_ordinary_run_is_quiet(seed):
  alarm = SpikeAlarm(6.0)
  assert not any(alarm.is_spike(alarm.z_score(loss)) for loss in _losses(2000, seed))


def test_a_loss_that_stays_high_becomes_normal():
  losses, alarm = _losses(1200), SpikeAlarm(6.0)
  losses[300:] += 1.0
  spikes = [step for step, loss in enumerate(losses) if alarm.is_spike(alarm.z_score(loss))]
  assert spikes[0] == 300
  assert len(spikes) > 1, 'the first does not hide those behind it'
  assert spikes[-1] < 500


def test_no_limit_no_alarm():
  alarm = SpikeAlarm(0.0)
  assert not any(alarm.is_spike(alarm.z_score(loss)) for loss in [3.0] * 100 + [1e9])
