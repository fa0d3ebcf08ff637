"""Checkpoints of a run: Orbax, asynchronous, the newest N kept."""

from pathlib import Path

from orbax.checkpoint import v1 as ocp

from mor_jax.training.state import TrainState


class Checkpoints:
  """The checkpoints under one folder, named by step. Use as a context, which waits for pending saves.

  Args:
    folder: made at the first save, or when absent.
    keep: newest checkpoints kept; an older one is removed only after its successor is complete.
  """

  def __init__(self, folder: Path, keep: int):
    self._folder = folder.absolute()
    self._checkpointer = ocp.training.Checkpointer(
      self._folder,
      preservation_policy=ocp.training.preservation_policies.LatestN(keep),
      cleanup_tmp_directories=True,
    )

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *_) -> None:
    self._checkpointer.close()

  @property
  def latest_step(self) -> int | None:
    """Step of the newest checkpoint, whether its save is complete or under way; None without any."""
    latest = self._checkpointer.latest
    return None if latest is None else latest.step

  def save(self, step: int, state: TrainState) -> None:
    """Begins to save; returns once the state is copied, so that it may be donated."""
    self._checkpointer.save_async(step, state, force=True)

  def restore(self, abstract_state: TrainState) -> TrainState:
    """The newest state, laid out as `abstract_state` (shapes, dtypes, shardings) says."""
    return self._checkpointer.load(abstract_state=abstract_state)

  def path(self, step: int) -> Path:
    """Folder of the checkpoint of a step."""
    return self._folder / str(step)

  def wait(self) -> None:
    """Returns when everything saved is complete on disk."""
    self._checkpointer.wait()
