"""A warm-up of the capacities: all tokens take every recursion at first, then ever fewer (`model.capacity_warmup_steps`)."""

import math

from mor_jax.config import Config


def stairs(config: Config, most: int) -> list[tuple[int, tuple[float, ...] | None]]:
  """(updates completed at its start, capacities) of at most `most` stairs, then None: the config's capacities.

  The capacities of a stair are c + (1 - c) * (1 + cos(pi * t / T)) / 2 with t at the middle of the stair and
  T = `model.capacity_warmup_steps` (the authors' formula; their t counts micro-batches).
  """
  warmup = config.model.capacity_warmup_steps if config.model.kind == 'mor' else 0
  count = min(most, warmup)
  found = []
  for stair in range(count):
    share = (1 + math.cos(math.pi * (stair + 0.5) / count)) / 2
    of_stair = tuple(c + (1 - c) * share for c in config.model.step_capacities)
    found.append((stair * warmup // count, of_stair))
  return [*found, (warmup, None)]
