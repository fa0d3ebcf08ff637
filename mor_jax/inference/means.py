"""A mean of what calls of the engine gave, in which the latest count most."""

import dataclasses

WEIGHT = 0.3  # of the latest call


@dataclasses.dataclass
class MovingMean:
  """The mean of the values so far.

  Attributes:
    value: 0 while nothing is known.
    calls: how many were made, of which the first, which may have been compiled, says nothing.
  """

  value: float = 0.0
  calls: int = 0

  def add(self, value: float) -> None:
    """Takes what a call gave into the mean."""
    self.calls += 1
    if self.calls > 1:
      self.value += (1.0 if self.calls == 2 else WEIGHT) * (value - self.value)
