"""Functions for sweep files: lists of overrides, and depths that the recursions divide.

Overrides are dicts of settings by dotted name, such as `{'train.seed': 1}`. A sweep is a list of them, and
lists are joined with `+`.
"""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

Overrides = dict[str, Any]


def grid(axes: Mapping[str, Iterable[Any]]) -> list[Overrides]:
  """Every combination of the values of some settings; the last setting varies fastest."""
  return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def product(*sweeps: Iterable[Overrides]) -> list[Overrides]:
  """Every combination of one entry from each sweep. If two set the same setting, the later one wins."""
  return [
    {name: value for part in parts for name, value in part.items()} for parts in itertools.product(*sweeps)
  ]


def depth(num_layers: int, recursions: int, sharing: str) -> int:
  """The smallest depth >= `num_layers` that the recursions of a sharing scheme divide.

  Depths are rounded up, not down, as in the paper's main experiments (Appendix D).
  """
  ends = 2 if sharing.startswith('middle') else 0
  return ends + max(1, -(-(num_layers - ends) // recursions)) * recursions
