"""How many ticks a call of the engine makes, so that it ends soon: whoever comes meanwhile waits for its end."""

import dataclasses

WEIGHT = 0.3  # of the latest call in the mean


@dataclasses.dataclass
class CallLength:
  """Ticks of the next call: as many as take `seconds`, at least one and at most `most`.

  Attributes:
    most: ticks, and the number of them until a call was timed.
    seconds: that a call should take at most; None: a call has `most` ticks.
    tick_seconds: a moving mean; 0: unknown. The first call, which may have been compiled, says nothing.
  """

  most: int
  seconds: float | None = None
  tick_seconds: float = 0.0
  _calls: int = 0

  @property
  def ticks(self) -> int:
    """Of the next call."""
    if self.seconds is None or not self.tick_seconds:
      return self.most
    return max(min(int(self.seconds / self.tick_seconds), self.most), 1)

  def learn(self, ticks: int, seconds: float) -> None:
    """A call made so many ticks in so many seconds."""
    if not ticks:
      return
    self._calls += 1
    if self._calls > 1:
      weight = WEIGHT if self.tick_seconds else 1.0
      self.tick_seconds += weight * (seconds / ticks - self.tick_seconds)
