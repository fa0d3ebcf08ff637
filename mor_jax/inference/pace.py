"""Whether to draft (`speculation`) or to tick (`ticks`): whichever has been faster of late with as many sequences.

Drafts pay where few sequences are resident and their first recursions are often right; depth-wise batching where many
are. Both give the same text, so what was measured may decide.
"""

import dataclasses

PATIENCE = 16  # calls after which the slower way is tried again; doubled each time that it is still slower
MOST_PATIENCE = 1024
TRIALS = 2  # calls of each way before one is preferred
WEIGHT = 0.3  # of the latest call in the mean


@dataclasses.dataclass
class _Way:
  """One of the two ways.

  Attributes:
    rate: tokens per second, a moving mean.
    calls: how many were measured.
  """

  rate: float = 0.0
  calls: int = 0

  def add(self, rate: float) -> None:
    self.rate = rate if not self.calls else self.rate + WEIGHT * (rate - self.rate)
    self.calls += 1


@dataclasses.dataclass
class _Crowd:
  """What was measured with about so many sequences."""

  ways: dict[bool, _Way] = dataclasses.field(default_factory=lambda: {True: _Way(), False: _Way()})
  patience: int = PATIENCE
  since: int = 0  # calls since the slower way was tried
  preferred: bool | None = None


class Pace:
  """Chooses between drafts and ticks by what they have yielded."""

  def __init__(self) -> None:
    self._crowds: dict[int, _Crowd] = {}
    self._ran: set[bool] = set()

  def drafts(self, resident: int) -> bool:
    """Whether the next call shall draft, with so many sequences resident."""
    crowd = self._crowds.setdefault(resident.bit_length(), _Crowd())
    for way, measured in crowd.ways.items():
      if measured.calls < TRIALS:
        return way
    faster = crowd.ways[True].rate > crowd.ways[False].rate
    return faster != (crowd.since >= crowd.patience)

  def learn(self, resident: int, drafted: bool, tokens: int, seconds: float) -> None:
    """A call gave so many tokens in so many seconds."""
    if drafted not in self._ran:  # it was compiled
      self._ran.add(drafted)
      return
    crowd = self._crowds.setdefault(resident.bit_length(), _Crowd())
    crowd.ways[drafted].add(tokens / max(seconds, 1e-9))
    if min(measured.calls for measured in crowd.ways.values()) < TRIALS:
      return
    faster = crowd.ways[True].rate > crowd.ways[False].rate
    was_trial = crowd.since >= crowd.patience
    if faster != crowd.preferred:
      crowd.preferred, crowd.patience, crowd.since = faster, PATIENCE, 0
    elif was_trial:
      crowd.patience, crowd.since = min(2 * crowd.patience, MOST_PATIENCE), 0
    else:
      crowd.since += 1
