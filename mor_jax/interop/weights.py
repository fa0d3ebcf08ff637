"""Weights that are read leaf by leaf: from named tensors with a table, or from variables in memory.

Where the layers of a stacked leaf are stored in several dtypes, the leaf has the one that holds all of them exactly.

All problems with names, shapes and dtypes of a file are reported before any tensor is read.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from mor_jax.config import ConfigError, ModelConfig
from mor_jax.interop import names
from mor_jax.interop.names import Table
from mor_jax.interop.tensors import DTYPES, Tensors

_DERIVED = re.compile(r'(^|\.)rotary_emb\.\w+$')  # buffers of some files, which follow from the config
_UNTIED = ('refuse', 'average')


class Weights(Protocol):
  """A model's variables, read leaf by leaf.

  Attributes:
    config: settings of the model.
    shapes: shape of each leaf by path.
    dtypes: stored dtype of each leaf by path.
  """

  config: ModelConfig
  shapes: Mapping[str, tuple[int, ...]]
  dtypes: Mapping[str, np.dtype]

  def leaf(self, path: str) -> np.ndarray:
    """One leaf, on the host, in its dtype."""

  def leaves(self) -> Iterator[tuple[str, np.ndarray]]:
    """(path, leaf) of all, one at a time."""


class HeldWeights:
  """Variables in memory, on any device."""

  def __init__(self, config: ModelConfig, variables: Mapping[str, Any]):
    self.config = config
    self._flat = dict(names.leaves(variables))
    self.shapes = {path: leaf.shape for path, leaf in self._flat.items()}
    self.dtypes = {path: np.dtype(leaf.dtype) for path, leaf in self._flat.items()}

  def leaf(self, path: str) -> np.ndarray:
    return np.asarray(self._flat[path])

  def leaves(self) -> Iterator[tuple[str, np.ndarray]]:
    for path in self._flat:
      yield path, self.leaf(path)


class NamedWeights:
  """Weights in files of another library.

  Args:
    config: settings of the expected model.
    table: expected names.
    tensors: the files.
    untied: what to do if copies of a shared layer differ: refuse or average.
    ignored: names of tensors that need not be in the table.

  Raises:
    ConfigError: tensors are missing, unexpected, of wrong shape, or not floating point. Names all of them.
  """

  def __init__(
    self,
    config: ModelConfig,
    table: Table,
    tensors: Tensors,
    untied: str = 'refuse',
    ignored: Collection[str] = (),
  ):
    if untied not in _UNTIED:
      raise ConfigError(f'untied={untied} is not one of {", ".join(_UNTIED)}')
    self.config = config
    self.shapes = names.shapes(config)
    self._table, self._tensors, self._average = table, tensors, untied == 'average'
    self._copies: dict[tuple[str, int | None], list[str]] = {}
    for name, place in table.items():
      if name in tensors.specs:
        self._copies.setdefault((place.leaf, place.index), []).append(name)
    problems = self._problems(ignored)
    if problems:
      raise ConfigError(f'{tensors.where}: {"; ".join(problems)}')
    self.dtypes = {}
    for (leaf, _), copies in self._copies.items():
      dtype = DTYPES[tensors.specs[copies[0]][1]]
      self.dtypes[leaf] = np.dtype(jnp.promote_types(self.dtypes.get(leaf, dtype), dtype))

  def _problems(self, ignored: Collection[str]) -> list[str]:
    problems, specs = [], self._tensors.specs
    for name, place in self._table.items():
      if (place.leaf, place.index) not in self._copies:
        problems.append(f'tensor {name} is missing')
        self._copies[place.leaf, place.index] = [name]  # its copies need not be named as well
      if name not in specs:
        continue  # a copy that was not saved
      shape, dtype = specs[name]
      wanted = place.shape(self.shapes[place.leaf])
      if shape != wanted and not (place.leaf.startswith('routing/') and np.prod(shape) == np.prod(wanted)):
        problems.append(f'{name} has shape {shape}, the settings ask for {wanted}')
      if dtype not in DTYPES:
        problems.append(f'{name} is stored as {dtype}, not in floating point of at least 16 bits')
    known = {*self._table, *ignored}
    extra = [name for name in specs if name not in known and not _DERIVED.search(name)]
    return problems + [f'{name} has no place in the model' for name in sorted(extra)]

  def leaf(self, path: str) -> np.ndarray:
    """One leaf.

    Raises:
      ConfigError: copies of a shared layer differ and untied is 'refuse'.
    """
    different: list[str] = []
    value = self._read(path, different)
    if different:
      raise self._untied(different)
    return value

  def leaves(self) -> Iterator[tuple[str, np.ndarray]]:
    """(path, leaf) of all, one at a time.

    Raises:
      ConfigError: copies of shared layers differ. Raised at the end, and names all of them.
    """
    different: list[str] = []
    for path in self.shapes:
      value = self._read(path, different)
      if not different:
        yield path, value
    if different:
      raise self._untied(different)

  def _untied(self, different: list[str]) -> ConfigError:
    return ConfigError(
      f"{self._tensors.where}: copies of one shared tensor differ. The authors' public code did not tie the "
      f'attention projections of its recursions for a time, and what it trained then is no model with a shared '
      f'block; the mean of the copies can be read (--untied=average), but is another model. These differ: '
      f'{"; ".join(different)}'
    )

  def _read(self, path: str, different: list[str]) -> np.ndarray:
    """Reads one leaf, and appends copies that differ to `different`."""
    stacked = (path, 0) in self._copies
    value = np.empty(self.shapes[path], self.dtypes[path]) if stacked else None
    for index in range(self.shapes[path][0]) if stacked else [None]:
      part = self._merged(self._copies[path, index], different)
      part = part.T if path.endswith('kernel') else part
      if not stacked:
        return np.ascontiguousarray(part.reshape(self.shapes[path]))
      value[index] = part.reshape(value.shape[1:])
    return value

  def _merged(self, copies: list[str], different: list[str]) -> np.ndarray:
    first = self._tensors.read(copies[0])
    total = first.astype(np.float64) if self._average and len(copies) > 1 else None
    for name in copies[1:]:
      other = self._tensors.read(name)
      if total is not None:
        total += other
      elif other.tobytes() != first.tobytes():
        different.append(f'{copies[0]} and {name}')
    return first if total is None else (total / len(copies)).astype(first.dtype)


def tree(weights: Weights) -> dict[str, Any]:
  """All variables as nested dicts of NumPy arrays."""
  return names.nest(dict(weights.leaves()))
