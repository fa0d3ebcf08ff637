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
    calls: how many were made, of which the first, which may have been compiled, says nothing.
  """

  rate: float = 0.0
  calls: int = 0

  @property
  def is_tried(self) -> bool:
    """Whether its rate is known."""
    return self.calls > TRIALS

  def add(self, rate: float) -> None:
    """Takes the rate of a call into the mean."""
    self.calls += 1
    if self.calls > 1:
      self.rate += (1.0 if self.calls == 2 else WEIGHT) * (rate - self.rate)


@dataclasses.dataclass
class _Crowd:
  """What was measured with about so many sequences.

  Attributes:
    drafts, ticks: the two ways.
    prefers_drafts: which was faster after the latest call.
    patience: calls after which the slower way is tried again.
    since: calls since it was.
  """

  drafts: _Way = dataclasses.field(default_factory=_Way)
  ticks: _Way = dataclasses.field(default_factory=_Way)
  prefers_drafts: bool = False
  patience: int = PATIENCE
  since: int = 0

  def choose(self) -> bool:
    """Whether to draft."""
    if not self.drafts.is_tried or not self.ticks.is_tried:
      return not self.drafts.is_tried
    return self.prefers_drafts != (self.since >= self.patience)

  def learn(self, drafted: bool, rate: float) -> None:
    """A call gave so many tokens a second."""
    (self.drafts if drafted else self.ticks).add(rate)
    if not self.drafts.is_tried or not self.ticks.is_tried:
      return
    before, self.prefers_drafts = self.prefers_drafts, self.drafts.rate > self.ticks.rate
    if self.prefers_drafts != before:
      self.patience, self.since = PATIENCE, 0
    elif drafted != self.prefers_drafts:  # a trial, which changed nothing
      self.patience, self.since = min(2 * self.patience, MOST_PATIENCE), 0
    else:
      self.since += 1


class Pace:
  """Chooses between drafts and ticks by what they have yielded."""

  def __init__(self) -> None:
    self._crowds: dict[int, _Crowd] = {}

  def _crowd(self, resident: int) -> _Crowd:
    return self._crowds.setdefault(resident.bit_length(), _Crowd())

  def drafts(self, resident: int) -> bool:
    """Whether the next call shall draft, with so many sequences resident."""
    return self._crowd(resident).choose()

  def learn(self, resident: int, drafted: bool, tokens: int, seconds: float) -> None:
    """A call gave so many tokens in so many seconds."""
    self._crowd(resident).learn(drafted, tokens / max(seconds, 1e-9))
