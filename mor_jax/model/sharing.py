"""Parameter sharing: which unrolled layer uses which slot of the stacked parameters (paper section 2.1; docs/model.md)."""

import jax

from mor_jax.config import ModelConfig


def layer_slots(config: ModelConfig) -> tuple[int, ...]:
  """Parameter slot of every unrolled layer, in order; slots count from 0 to U - 1.

  `middle_*` keeps slot 0 and slot U - 1 for the first and the last layer. `cycle` passes
  over the shared slots again and again, `sequence` repeats each before the next.
  """
  ends, depth, steps = config.unique_ends, config.shared_depth, config.recursions
  if config.sharing.endswith('cycle'):
    shared = [slot for _ in range(steps) for slot in range(depth)]
  else:
    shared = [slot for slot in range(depth) for _ in range(steps)]
  first = [0] * ends
  last = [depth + ends] * ends
  return (*first, *(slot + ends for slot in shared), *last)


def split_stack(config: ModelConfig, layers_U: dict) -> tuple[dict, dict, dict]:
  """The stacked layers as (before, shared block, after) the recursions; ends are empty under `cycle`."""
  ends, depth = config.unique_ends, config.shared_depth

  def part(start: int, count: int) -> dict:
    return jax.tree.map(lambda leaf: leaf[start : start + count], layers_U)

  return part(0, ends), part(ends, depth), part(ends + depth, ends)
