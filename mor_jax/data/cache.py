"""Where files lie that can be rebuilt."""

import os
import pathlib

from mor_jax.config import DataConfig


def cache_dir(data: DataConfig) -> pathlib.Path:
  """The folder for files that can be rebuilt: prepared datasets, compiled programs, notes."""
  if data.cache_dir:
    return pathlib.Path(data.cache_dir).expanduser()
  return pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache') / 'mor_jax'
