"""Loads a run: its config, model and latest variables."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh

from mor_jax.config import Config, ConfigError, ModelConfig
from mor_jax.data import schedule
from mor_jax.model import kernels
from mor_jax.model.transformer import Transformer, abstract_variables, parameter_axes
from mor_jax.parallel import mesh as mesh_lib
from mor_jax.parallel import rules
from mor_jax.runs.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
class LoadedRun:
  """A run's folder, config and model, and the variables of its checkpoint at `step`, which has seen `rows_read`."""

  folder: RunFolder
  config: Config
  model: Transformer
  variables: dict[str, Any]
  step: int
  rows_read: int


def load_run(path: str | os.PathLike, step: int | None = None, mesh: Mesh | None = None) -> LoadedRun:
  """Reads the newest checkpoint of the run in a folder, or that of a step, onto a mesh; default: whole on all devices.

  Raises:
    ConfigError: the folder is not a run folder, or the run has no checkpoint yet, or none of that step.
    RunError: the checkpoints, or that of the step, cannot be used.
  """
  folder = RunFolder(Path(path))
  config = folder.read_config()
  mesh, model = mesh or mesh_lib.make_mesh(), Transformer(config.model)
  with folder.read_checkpoints(config) as checkpoints:
    step = checkpoints.newest_good() if step is None else checkpoints.good(step)
    if step is None:
      raise ConfigError(f'the run {path} has no checkpoint yet')
    stored = checkpoints.stored_shapes(step, 'params')
    variables = kernels.joined(checkpoints.restore_parts(step, _abstract(config.model, mesh, stored)))
    rows_read = checkpoints.manifest(step).get('rows_read')
  order = schedule.of(config.train).resumed(step, rows_read)
  return LoadedRun(folder, config, model, variables, step, order.rows_before(step))


def _abstract(config: ModelConfig, mesh: Mesh, stored: dict[str, Any]) -> dict[str, Any]:
  """Shapes, dtypes and shardings of a model's variables; of matrices that are stored quantised, those of their parts."""
  shapes = nn.unbox(abstract_variables(config))
  shapes['params'] = _as_stored(shapes['params'], stored)
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    shapes,
    rules.shardings(mesh, shapes, parameter_axes(config)),
  )


def _as_stored(shapes: Any, stored: Any) -> Any:
  if isinstance(shapes, dict):
    return {name: _as_stored(shapes[name], stored.get(name)) for name in shapes}
  if not isinstance(stored, dict):
    return shapes
  return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in stored.items()}
