"""What changes in the course of a training: lists of (updates done before, what holds from then on), rising."""

from typing import Any

MOST_PROGRAMS = 8  # of a training: each change of a size is compiled


def at(stairs: list[tuple[int, Any]], step: int) -> Any:
  """What holds after so many steps."""
  return next(value for begin, value in reversed(stairs) if begin <= step)
