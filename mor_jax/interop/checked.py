"""Weights on their way into another folder: what is not finite is told, and the dtype may be another."""

import dataclasses
import sys
from collections.abc import Iterator

import ml_dtypes
import numpy as np

from mor_jax.interop.weights import Weights


def checked(weights: Weights, dtype: str | None) -> Weights:
  """The weights in a dtype, 'float32' or 'bfloat16'; None: in their own."""
  told = _Checked(weights)
  if dtype is None:
    return told
  return _Cast(told, np.dtype(ml_dtypes.bfloat16 if dtype == 'bfloat16' else dtype))


@dataclasses.dataclass(frozen=True)
class _Cast:
  """Weights in another dtype."""

  inner: Weights
  dtype: np.dtype

  @property
  def config(self):
    return self.inner.config

  @property
  def shapes(self):
    return self.inner.shapes

  @property
  def dtypes(self):
    return dict.fromkeys(self.inner.dtypes, self.dtype)

  def leaf(self, path: str) -> np.ndarray:
    return self.inner.leaf(path).astype(self.dtype)

  def leaves(self) -> Iterator[tuple[str, np.ndarray]]:
    for path, leaf in self.inner.leaves():
      yield path, leaf.astype(self.dtype)


@dataclasses.dataclass(frozen=True)
class _Checked:
  """Weights of which the user is told those that are not finite."""

  inner: Weights

  def __getattr__(self, name: str):
    return getattr(self.inner, name)

  def leaf(self, path: str) -> np.ndarray:
    leaf = self.inner.leaf(path)
    self._tell(path, leaf)
    return leaf

  def leaves(self) -> Iterator[tuple[str, np.ndarray]]:
    for path, leaf in self.inner.leaves():
      self._tell(path, leaf)
      yield path, leaf

  def _tell(self, path: str, leaf: np.ndarray) -> None:
    count = leaf.size - int(np.isfinite(leaf).sum())
    if count:
      print(f'WARNING: {path} has {count:,} values that are not finite (NaN or infinite)', file=sys.stderr)
