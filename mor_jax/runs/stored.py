"""Reads and writes models on disk leaf by leaf: checkpoints of runs, and run folders of converted models.

A converted model is a run folder with config.json, tokenizer.json and one checkpoint with variables only.
It can be evaluated, generate text and initialise training (`--init_from`), but it cannot be resumed.
"""

import dataclasses
import functools
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from mor_jax.checkpoints import integrity
from mor_jax.config import Config, ConfigError, ModelConfig, with_changes
from mor_jax.data.conventions import Conventions
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.files import new_folder
from mor_jax.model import kernels
from mor_jax.runs.run_folder import FORMAT, RunFolder, describe_checkpoints

_PARTS = ('params', 'routing')


@dataclasses.dataclass(frozen=True)
class StoredWeights:
  """Variables of a checkpoint, read leaf by leaf.

  Attributes:
    folder: of the run.
    run_config: settings of the run.
    step: of the checkpoint.
    shapes, dtypes: of all leaves by path, 'params/block/mlp/up/kernel', as stored; a quantised matrix is float32.
  """

  folder: RunFolder
  run_config: Config
  step: int
  shapes: dict[str, tuple[int, ...]]
  dtypes: dict[str, np.dtype]
  _path: epath.Path
  _stored: dict[str, tuple[tuple[int, ...], np.dtype]]

  @functools.cached_property
  def _parts(self) -> dict[str, tuple[str, ...]]:
    """Paths of values and scales by that of their quantised matrix."""
    return {path: _leaves_of(path) for path in self.shapes if path not in self._stored}

  @property
  def config(self) -> ModelConfig:
    """Settings of the model."""
    return self.run_config.model

  def leaf(self, path: str) -> np.ndarray:
    """One leaf, on the host."""
    names = self._parts.get(path, (path,))
    found = {}
    for name in names:
      # The pages of an empty array are never touched.
      abstract = np.empty(*self._stored[name])
      keys = tuple(name.split('/'))
      with _partial_loading():
        loaded = ocp.load(self._path, traverse_util.unflatten_dict({keys: abstract}))
      found[name] = np.asarray(traverse_util.flatten_dict(loaded)[keys])
    if path not in self._parts:
      return found[path]
    return np.asarray(kernels.Quantised(*(jnp.asarray(found[name]) for name in names)).whole())

  def leaves(self) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (path, leaf) for every leaf, one at a time."""
    for path in self.shapes:
      yield path, self.leaf(path)

  def tokenizer(self) -> Tokenizer:
    """The tokenizer of the run."""
    data = self.run_config.data
    return Tokenizer.load(self.folder.tokenizer, data.separator, data.begin)

  def conventions(self) -> Conventions:
    """What is known of its texts."""
    return self.folder.conventions(self.run_config, self.tokenizer())


def open_run(path: str | os.PathLike, of_format: int = FORMAT) -> StoredWeights:
  """The newest good checkpoint of a run, without reading it.

  Args:
    of_format: of the folder; paths of leaves are those of that format.

  Raises:
    ConfigError: the folder is not a run folder, or has another format, or the run has no checkpoint yet.
    RunError: none of its checkpoints is good.
  """
  folder = RunFolder(Path(path))
  config = folder.read_config(of_format)
  with folder.read_checkpoints(config) as checkpoints:
    step = checkpoints.newest_good()
    if step is None:
      raise ConfigError(f'the run {path} has no checkpoint yet')
    where = checkpoints.path(step)
  stored = {name: part for name, part in ocp.metadata(where).metadata.items() if name in _PARTS and part}
  leaves = traverse_util.flatten_dict(stored, sep='/')
  as_stored = {name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in leaves.items()}
  described = dict(as_stored)
  for path in {name.rpartition('/')[0] for name in as_stored}:
    names = _leaves_of(path)
    if as_stored.keys() >= set(names):
      pair = (jax.ShapeDtypeStruct(*described.pop(name)) for name in names)
      described[path] = kernels.Quantised(*pair).shape, np.dtype(np.float32)
  shapes, dtypes = ({name: entry[index] for name, entry in described.items()} for index in range(2))
  return StoredWeights(folder, config, step, shapes, dtypes, where, as_stored)


def _leaves_of(path: str) -> tuple[str, ...]:
  return tuple(f'{path}/{name}' for name in kernels.LEAVES)


def write_model(
  path: str | os.PathLike,
  config: Config,
  weights: Any,
  tokenizer: Tokenizer,
  origin: str,
  conventions: Conventions | None = None,
  step: int = 0,
  extras: Sequence[Path] = (),
) -> None:
  """Makes a run folder of a converted model, which gets its name last; nothing stays of an unfinished one.

  Args:
    config: the run's settings, for config.json; its checkpoint lies in the folder, wherever they lay before.
    weights: `interop.weights.Weights`: its leaves are read and written one at a time, in their dtype.
    origin: what was converted, for the checkpoint's manifest.
    conventions: what is known of the model's texts.
    step: after which the weights were stored.
    extras: more files to copy into the folder; those that do not exist are left out.

  Raises:
    ConfigError: the folder exists, or the weights turn out to be faulty.
  """
  with new_folder(Path(path)) as partial:
    folder = RunFolder(partial)
    config = with_changes(config, checkpoint={'folder': None})
    checkpoint = epath.Path(folder.checkpoint_folder(config)).absolute() / str(step)
    for name, leaf in weights.leaves():
      ocp.partial.save(checkpoint, traverse_util.unflatten_dict({tuple(name.split('/')): leaf}))
    ocp.partial.finalize(checkpoint)
    tokenizer.save(folder.tokenizer)
    tokenizer.save(checkpoint / folder.tokenizer.name)
    integrity.write_share(checkpoint, 0, {'position': None})
    about = describe_checkpoints(config, tokenizer.digest)
    integrity.publish(
      checkpoint, 1, {'step': step, 'validation_loss': None, 'converted_from': origin, **about}
    )
    for extra in extras:
      if extra.exists():
        shutil.copyfile(extra, partial / extra.name)
    if conventions is not None:
      folder.write_conventions(conventions)
    folder.write_config(config)


def _partial_loading() -> ocp.Context:
  context = ocp.Context()
  context.pytree.loading.partial_load = True
  return context
