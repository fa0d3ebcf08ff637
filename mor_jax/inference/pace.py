"""Whether to draft (`speculation`) or to tick (`ticks`): whichever has been faster of late with as many sequences.

Drafts pay where few sequences are resident and their first recursions are often right; depth-wise batching where many
are. Both give the same text, so what was measured may decide.
"""

import dataclasses

from mor_jax.inference.means import MovingMean

PATIENCE = 16  # calls after which the slower way is tried again; doubled each time that it is still slower
MOST_PATIENCE = 1024
TRIALS = 2  # calls of each way before one is preferred


@dataclasses.dataclass
class _Crowd:
  """What was measured with about so many sequences.

  Attributes:
    drafts, ticks: tokens per second of the two ways.
    prefers_drafts: which was faster after the latest call.
    patience: calls after which the slower way is tried again.
    since: calls since it was.
  """

  drafts: MovingMean = dataclasses.field(default_factory=MovingMean)
  ticks: MovingMean = dataclasses.field(default_factory=MovingMean)
  prefers_drafts: bool = False
  patience: int = PATIENCE
  since: int = 0

  @property
  def _is_known(self) -> bool:
    return min(self.drafts.calls, self.ticks.calls) > TRIALS

  def choose(self) -> bool:
    """Whether to draft."""
    if not self._is_known:
      return self.drafts.calls <= TRIALS
    return self.prefers_drafts != (self.since >= self.patience)

  def learn(self, drafted: bool, rate: float) -> None:
    """A call gave so many tokens a second."""
    (self.drafts if drafted else self.ticks).add(rate)
    if not self._is_known:
      return
    before, self.prefers_drafts = self.prefers_drafts, self.drafts.value > self.ticks.value
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
