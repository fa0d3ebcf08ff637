"""Opens a run for use: its config, model and newest variables."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from mor_jax.checkpoints.checkpoint import Checkpoints, ever_finished
from mor_jax.config import Config, ConfigError
from mor_jax.model.transformer import Transformer
from mor_jax.parallel import mesh as mesh_lib
from mor_jax.runs.run_folder import RunFolder
from mor_jax.training.optimizer import make_optimizer
from mor_jax.training.state import abstract_state, initializer


@dataclasses.dataclass(frozen=True)
class LoadedRun:
  """A run's folder, config and model, and the variables of a checkpoint, made at `step`."""

  folder: RunFolder
  config: Config
  model: Transformer
  variables: dict[str, Any]
  step: int


def load_run(path: str | os.PathLike, step: int | None = None, mesh: Mesh | None = None) -> LoadedRun:
  """Reads the newest checkpoint of the run in a folder, or that of a step, onto a mesh; default: whole on all devices.

  Raises:
    ConfigError: the folder is no run's, or the run has no checkpoint yet, or none of that step.
    RunError: the checkpoints, or that of the step, cannot be used.
  """
  folder = RunFolder(Path(path))
  config = folder.read_config()
  checkpoint_folder, mirror = folder.checkpoint_folder(config), folder.mirror(config)
  if not ever_finished(checkpoint_folder, mirror):
    raise ConfigError(f'the run {path} has no checkpoint yet')
  mesh, model = mesh or mesh_lib.make_mesh(), Transformer(config.model)
  optimizer = make_optimizer(config.train, config.model.has_aux_router)
  with Checkpoints(checkpoint_folder, config.checkpoint, read_only=True, mirror=mirror) as checkpoints:
    step = checkpoints.newest_good() if step is None else checkpoints.good(step)
    if step is None:
      raise ConfigError(f'the run {path} has no checkpoint yet')
    state = abstract_state(initializer(model, optimizer, mesh, config.data.seq_len))
    variables = checkpoints.restore_variables(step, state)
  return LoadedRun(folder, config, model, variables, step)
