"""Notices losses far above those of the steps before."""

import collections

import numpy as np


class SpikeAlarm:
  """Compares each loss with mean and standard deviation of the losses before it.

  A spike is remembered as a loss just at the limit, so that it does not hide those behind it, while a
  loss that stays high becomes normal.

  Args:
    limit: z-score that is a spike; 0: no alarm.
    window: losses to compare with.
    quiet: losses to see first, before anything is a spike.
  """

  def __init__(self, limit: float, window: int = 100, quiet: int = 50):
    self._limit, self._quiet = limit, quiet
    self._losses = collections.deque(maxlen=window)

  def z_score(self, loss: float) -> float:
    """Standard deviations of `loss` above the mean before it, 0 while there is too little to compare with."""
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
    """Whether a z-score is beyond the limit."""
    return 0 < self._limit < score
