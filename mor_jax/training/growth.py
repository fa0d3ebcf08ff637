"""Growing recursions: a training that begins with one recursion and adds the others one by one (`train.growth`).

A block that is first trained for few passes costs less until it is grown (arXiv 2609.19107 reports what that is worth).
"""

from mor_jax.config import Config


def stairs(config: Config) -> list[tuple[int, int | None]]:
  """(updates done before, recursions that tokens take at most from then on) of every part of a training.

  None for what `train.recursions` is by default: all.
  """
  steps, growth = config.train.steps, config.train.growth
  if growth is None:
    return [(0, config.train.recursions)]
  return [(0, 1), *((round(share * steps), count) for count, share in enumerate(growth, start=2))]
