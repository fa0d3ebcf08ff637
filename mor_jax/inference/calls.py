"""How many ticks a call of the engine makes, so that it ends soon: whoever comes meanwhile waits for its end."""

import dataclasses

from mor_jax.inference.means import MovingMean


@dataclasses.dataclass
class CallLength:
  """Ticks of the next call: as many as take `seconds`, at least one and at most `most`.

  Attributes:
    most: ticks, and the number of them until a call was timed.
    seconds: that a call should take at most; None: a call has `most` ticks.
    tick: seconds of a tick.
  """

  most: int
  seconds: float | None = None
  tick: MovingMean = dataclasses.field(default_factory=MovingMean)

  @property
  def ticks(self) -> int:
    """Of the next call."""
    if self.seconds is None or not self.tick.value:
      return self.most
    return max(min(int(self.seconds / self.tick.value), self.most), 1)

  def learn(self, ticks: int, seconds: float) -> None:
    """A call made so many ticks in so many seconds; none, where it drafted."""
    if ticks:
      self.tick.add(seconds / ticks)
