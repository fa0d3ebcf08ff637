"""What an engine did, summed over its calls."""

import dataclasses

import numpy as np

from mor_jax.inference.ticks import Tally


@dataclasses.dataclass
class Statistics:
  """Totals over the calls of an engine, with derived metrics as properties.

  Attributes:
    slots, lanes: sizes of the engine, summed over all parts of a mesh.
    seconds: time in `Scheduler.step`, including `prefill_seconds`, the time spent on prompts, and `call_seconds`, from the
      start of the engine's calls to their end; the rest is the host's, between the calls.
    ticks, boundaries, block_lanes, boundary_lanes, resident, tokens, passes, sampled, overflow: as in
      `ticks.Tally`; overflow has one entry per recursion step and includes prompts.
    checks: drafts of sequences that were checked (`speculation`).
    judged, accepted, left: as in `ticks.Tally`, by place in the draft.
    first_token_seconds: time from submission to the first token, for each request.
    token_seconds: mean time between tokens, for each finished request with at least two tokens.
  """

  slots: int
  lanes: int
  boundary_lanes_each: int
  seconds: float = 0.0
  prefill_seconds: float = 0.0
  call_seconds: float = 0.0
  ticks: int = 0
  boundaries: int = 0
  block_lanes: int = 0
  boundary_lanes: int = 0
  resident: int = 0
  tokens: int = 0
  passes: int = 0
  sampled: int = 0
  overflow: np.ndarray | int = 0
  checks: int = 0
  judged: np.ndarray | int = 0
  accepted: np.ndarray | int = 0
  left: np.ndarray | int = 0
  first_token_seconds: list[float] = dataclasses.field(default_factory=list)
  token_seconds: list[float] = dataclasses.field(default_factory=list)

  @property
  def tokens_per_second(self) -> float:
    """Sampled tokens per second of total time, prefill included."""
    return self.sampled / max(self.seconds, 1e-9)

  @property
  def host_share(self) -> float:
    """Time of the host between the calls, prompts aside, as a share of the time of the calls."""
    return max(self.seconds - self.prefill_seconds - self.call_seconds, 0.0) / max(self.call_seconds, 1e-9)

  @property
  def slot_occupancy(self) -> float:
    """Mean fraction of the slots in use."""
    return self.resident / max(self.ticks * self.slots, 1)

  @property
  def lane_occupancy(self) -> float:
    """Mean fraction of the block's lanes in use."""
    return self.block_lanes / max(self.ticks * self.lanes, 1)

  @property
  def boundary_occupancy(self) -> float:
    """Mean fraction of the boundary's lanes in use."""
    return self.boundary_lanes / max(self.boundaries * self.boundary_lanes_each, 1)

  @property
  def mean_depth(self) -> float:
    """Passes through the shared block per generated token; prompts do not count."""
    return self.passes / max(self.tokens, 1)

  @property
  def acceptance(self) -> list[float]:
    """Share of the drafted tokens that were right, by place in the draft, of those whose forerunners were."""
    judged = np.atleast_1d(self.judged)
    return (np.atleast_1d(self.accepted)[judged > 0] / judged[judged > 0]).tolist()

  @property
  def tokens_per_check(self) -> float:
    """Tokens that a draft and its check give: those accepted, and one."""
    return 1 + float(np.sum(self.accepted)) / self.checks if self.checks else 0.0

  @property
  def exact_drafts(self) -> float:
    """Share of the judged drafts that followed a token which the draft computed in full."""
    return float(np.sum(self.left)) / max(float(np.sum(self.judged)), 1)

  def count(self, tally: Tally) -> None:
    """Adds what a call did; the tally is on the host."""
    sums = 'boundaries', 'block_lanes', 'boundary_lanes', 'resident', 'tokens', 'passes', 'sampled', 'checks'
    for name in sums:
      setattr(self, name, getattr(self, name) + int(getattr(tally, name).sum()))
    self.ticks += int(tally.ticks.max())  # parts of a mesh that have ended wait for the others
    for name in ('overflow_GP', 'judged_GK', 'accepted_GK', 'left_GK'):
      total = name.split('_')[0]
      setattr(self, total, getattr(self, total) + getattr(tally, name).sum(axis=0))

  def summary(self) -> dict[str, float]:
    """The metrics as plain numbers, for a table or JSON."""
    return {
      'tokens_per_second': self.tokens_per_second,
      'tokens': int(self.sampled),
      'seconds': self.seconds,
      'prefill_seconds': self.prefill_seconds,
      'host_share': self.host_share,
      'slot_occupancy': self.slot_occupancy,
      'lane_occupancy': self.lane_occupancy,
      'boundary_occupancy': self.boundary_occupancy,
      'mean_depth': self.mean_depth,
      'time_to_first_token': float(np.mean(self.first_token_seconds or [0.0])),
      'time_per_token': float(np.mean(self.token_seconds or [0.0])),
      'overflow': int(np.sum(self.overflow)),
      'tokens_per_check': self.tokens_per_check,
    }
