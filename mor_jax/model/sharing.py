"""Parameter sharing: which unrolled layer uses which parameters (paper section 2.1; docs/model.md)."""

from typing import NamedTuple

import numpy as np

from mor_jax.config import ModelConfig


class Place(NamedTuple):
  """Where a layer's parameters are: 'first', 'last', or an entry of 'block', whose leaves are stacked."""

  part: str
  index: int | None = None


def layer_slots(config: ModelConfig) -> tuple[int, ...]:
  """Which of the U unique layers, counted from 0, each unrolled layer is, in order.

  `middle_*` keeps number 0 and number U - 1 for the first and the last layer. `cycle` passes
  over the shared layers again and again, `sequence` repeats each before the next.
  """
  ends, depth, steps = config.unique_ends, config.shared_depth, config.recursions
  if config.sharing.endswith('cycle'):
    shared = [slot for _ in range(steps) for slot in range(depth)]
  else:
    shared = [slot for slot in range(depth) for _ in range(steps)]
  first = [0] * ends
  last = [depth + ends] * ends
  return (*first, *(slot + ends for slot in shared), *last)


def place(config: ModelConfig, slot: int) -> Place:
  """Where the unique layer of this number has its parameters."""
  ends, depth = config.unique_ends, config.shared_depth
  if ends <= slot < ends + depth:
    return Place('block', slot - ends)
  return Place('first' if slot < ends else 'last')


def rotating(config: ModelConfig, part: str) -> np.ndarray | None:
  """Whether the layers of a part rotate queries and keys: (N,) of 'block', else a scalar; None: all of the model do."""
  if not config.no_rope_layers:
    return None
  slots = [slot for slot in range(config.num_unique_layers) if place(config, slot).part == part]
  rotates = np.array([slot not in config.no_rope_layers for slot in slots])
  return rotates if part == 'block' else rotates[0]
