"""Run folders of format 1, which kept all unique layers in one stack: their weights in today's tree.

Format 1 had `layers/...`, every leaf with a leading axis of all unique layers, the first and the last included.
"""

from collections.abc import Iterator

import numpy as np

from mor_jax.config import ModelConfig
from mor_jax.interop.weights import Weights

_OLD = 'params/layers/'


class OldWeights:
  """Weights of a run of format 1, by today's names.

  Args:
    old: the weights by their old names.
  """

  def __init__(self, old: Weights):
    self.config, self._old = old.config, old
    self._places = {
      new: place for path, shape in old.shapes.items() for new, place in _places(old.config, path, shape)
    }
    self.shapes = {new: shape for new, (_, _, shape) in self._places.items()}
    self.dtypes = {new: old.dtypes[path] for new, (path, _, _) in self._places.items()}

  def leaf(self, path: str) -> np.ndarray:
    """One leaf, on the host."""
    old, index, _ = self._places[path]
    leaf = self._old.leaf(old)
    return leaf if index is None else leaf[index]

  def leaves(self) -> Iterator[tuple[str, np.ndarray]]:
    """(path, leaf) of all, one at a time."""
    for path in self.shapes:
      yield path, self.leaf(path)


def _places(config: ModelConfig, path: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple]]:
  """(today's path, (old path, what to cut out of the old leaf, shape)) of what an old leaf has become."""
  if not path.startswith(_OLD):
    yield path, (path, None, shape)
    return
  name, unique, ends = path.removeprefix(_OLD), shape[0], config.unique_ends
  yield f'params/block/{name}', (path, slice(ends, unique - ends), (unique - 2 * ends, *shape[1:]))
  if ends:
    yield f'params/first/{name}', (path, 0, shape[1:])
    yield f'params/last/{name}', (path, -1, shape[1:])
