"""Growing recursions: a training that begins with one recursion and adds the others one by one (`train.growth`).

A block that is first trained for few passes costs less until it is grown (arXiv 2609.19107 reports what that is worth).
"""

from collections.abc import Callable

from mor_jax.config import Config


def stairs(config: Config) -> list[tuple[int, int | None]]:
  """(updates done before, recursions that tokens take at most from then on) of every part of a training.

  None for what `train.recursions` is by default: all.
  """
  steps, growth = config.train.steps, config.train.growth
  if growth is None:
    return [(0, config.train.recursions)]
  return [(0, 1), *((round(share * steps), count) for count, share in enumerate(growth, start=2))]


def mean_over(config: Config, per_recursions: Callable[[int | None], float]) -> float:
  """Mean over a training's steps of what depends on the recursions of a step.

  Args:
    per_recursions: recursions (None: all) -> the number.
  """
  parts = stairs(config)
  ends = [first for first, _ in parts[1:]] + [config.train.steps]
  total = sum((end - first) * per_recursions(count) for (first, count), end in zip(parts, ends, strict=True))
  return total / config.train.steps
