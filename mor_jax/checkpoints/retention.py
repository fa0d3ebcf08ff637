"""Which checkpoints are kept: the newest, every so many steps, and the best by validation."""

from collections.abc import Mapping

from mor_jax.config import CheckpointConfig


def to_remove(settings: CheckpointConfig, losses: Mapping[int, float | None]) -> list[int]:
  """Steps of the checkpoints that need not be kept.

  Args:
    losses: validation loss by step of every finished checkpoint; None where it was not validated.
  """
  steps = sorted(losses)
  kept = set(steps[-settings.keep :])
  if settings.keep_every:
    kept |= {step for step in steps if step % settings.keep_every == 0}
  validated = sorted((loss, step) for step, loss in losses.items() if loss is not None)
  kept |= {step for _, step in validated[: settings.keep_best]}
  return [step for step in steps if step not in kept]
