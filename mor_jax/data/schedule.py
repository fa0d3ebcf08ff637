"""Rows per optimiser step: constant, or doubling from a smaller batch to the full one.

A batch grows by adding micro-batches of fixed size, and each batch size is one compiled program.
Early in training, smaller batches learn more per token.
"""

import bisect
import dataclasses

from mor_jax.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class BatchSchedule:
  """Rows of the global batch of every step.

  Attributes:
    stages: (first step, rows per batch) of each stage, in ascending order; the first step is 0.
    micro_rows: rows of a micro-batch; divides the rows of every stage.
    extra: rows that were read in addition, since earlier batches were larger than the stages say (or smaller).
  """

  stages: tuple[tuple[int, int], ...]
  micro_rows: int
  extra: int = 0

  def rows(self, step: int) -> int:
    """Rows of the batch after `step` updates."""
    return self.stages[self._stage(step)][1]

  def micro_batches(self, step: int) -> int:
    """Micro-batches of that batch."""
    return self.rows(step) // self.micro_rows

  def rows_before(self, step: int) -> int:
    """Total rows of the first `step` batches, i.e. the index of the next batch's first row."""
    ends = [first for first, _ in self.stages[1:]] + [step]
    staged = sum(
      max(0, min(end, step) - first) * rows for (first, rows), end in zip(self.stages, ends, strict=True)
    )
    return staged + self.extra

  def resumed(self, step: int, rows_read: int | None) -> 'BatchSchedule':
    """The schedule of a run that has read so many rows in its first steps; None: as the stages say."""
    if rows_read is None:
      return self
    return dataclasses.replace(self, extra=self.extra + rows_read - self.rows_before(step))

  def steps_for(self, rows: float) -> int:
    """The number of batches, at least 1, whose total rows are closest to `rows`."""
    first, size = next(stage for stage in reversed(self.stages) if self.rows_before(stage[0]) <= rows)
    return max(1, first + round((rows - self.rows_before(first)) / size))

  def _stage(self, step: int) -> int:
    return bisect.bisect_right([first for first, _ in self.stages], step) - 1


def constant(rows: int, micro_batches: int = 1) -> BatchSchedule:
  """The same number of rows at every step."""
  return BatchSchedule(((0, rows),), rows // micro_batches)


def of(train: TrainConfig) -> BatchSchedule:
  """The schedule of a run: `train.global_batch` rows, after equally long stages that start at `train.ramp_batch`."""
  micro_rows = train.global_batch // train.accumulation
  if train.ramp_batch is None:
    return BatchSchedule(((0, train.global_batch),), micro_rows)
  doublings = (train.global_batch // train.ramp_batch).bit_length() - 1
  growing = [(stage * train.ramp_steps // doublings, train.ramp_batch << stage) for stage in range(doublings)]
  return BatchSchedule((*growing, (train.ramp_steps, train.global_batch)), micro_rows)
