"""Which checkpoints to keep: the newest, those of every n-th step, and the best by validation loss."""

from collections.abc import Mapping

from mor_jax.config import CheckpointConfig


def to_remove(settings: CheckpointConfig, losses: Mapping[int, float | None]) -> list[int]:
  """Steps of the checkpoints to delete.

  Args:
    losses: validation loss of every finished checkpoint by step; None if it was not validated.
  """
  steps = sorted(losses)
  kept = set(steps[-settings.keep :])
  if settings.keep_every:
    kept |= {step for step in steps if step % settings.keep_every == 0}
  validated = sorted((loss, step) for step, loss in losses.items() if loss is not None)
  kept |= {step for _, step in validated[: settings.keep_best]}
  return [step for step in steps if step not in kept]
