"""Detects loss spikes: losses far above those of recent steps."""

import collections

import numpy as np


class SpikeAlarm:
  """Compares each loss with the mean and standard deviation of the losses before it.

  A spike enters the window clipped to the limit, so it does not mask later spikes, yet a loss that
  stays high becomes the new normal.

  Args:
    limit: a loss with a z-score above this is a spike; 0: no alarm.
    window: number of previous losses to compare with.
    quiet: number of losses to collect before the first spike can be reported.
  """

  def __init__(self, limit: float, window: int = 100, quiet: int = 50):
    self._limit, self._quiet = limit, quiet
    self._losses = collections.deque(maxlen=window)

  def z_score(self, loss: float) -> float:
    """Standard deviations of `loss` above the mean of the window; 0 until `quiet` losses are collected."""
    score, remembered = 0.0, loss
    if len(self._losses) >= self._quiet:
      mean = float(np.mean(self._losses))
      deviation = max(float(np.std(self._losses)), 1e-3 * abs(mean), 1e-12)  # of equal losses it would be 0
      score = (loss - mean) / deviation
      if self.is_spike(score):
        remembered = mean + self._limit * deviation
    self._losses.append(remembered)
    return score

  def is_spike(self, score: float) -> bool:
    """Whether a z-score exceeds the limit."""
    return 0 < self._limit < score
