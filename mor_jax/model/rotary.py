"""Rotary position embedding (Su et al. 2021), with the scalings that longer contexts use."""

import math

import jax
import jax.numpy as jnp
from flax import struct

from mor_jax.config import ModelConfig


@struct.dataclass
class Rotation:
  """Cosines and sines (B, C, 1, E/2) of the angles by which the tokens' queries and keys turn."""

  cos_BC1E: jax.Array
  sin_BC1E: jax.Array


def rotation(config: ModelConfig, positions_BC: jax.Array) -> Rotation:
  """The rotation of tokens at these positions of their documents."""
  angles_BC1E = positions_BC[:, :, None, None].astype(jnp.float32) * frequencies(config)
  cos_BC1E, sin_BC1E = jnp.cos(angles_BC1E), jnp.sin(angles_BC1E)
  if config.rope_scores_factor != 1.0:
    cos_BC1E, sin_BC1E = cos_BC1E * config.rope_scores_factor, sin_BC1E * config.rope_scores_factor
  return Rotation(cos_BC1E, sin_BC1E)


def frequencies(config: ModelConfig) -> jax.Array:
  """Angles (E/2,) by which neighbours differ, scaled: llama3 as Llama 3.1, yarn as Peng et al. 2023."""
  half, theta = config.head_width // 2, config.rope_theta
  if config.rope_scaling == 'dynamic':
    longer = (config.rope_length or config.rope_original_length) / config.rope_original_length
    stretch = config.rope_scaling_factor * longer - (config.rope_scaling_factor - 1)
    theta *= stretch ** (half / (half - 1))
  frequencies_E = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  if config.rope_scaling == 'linear':
    return frequencies_E / config.rope_scaling_factor
  if config.rope_scaling == 'llama3':
    turns_E = config.rope_original_length * frequencies_E / (2 * jnp.pi)
    low, high = config.rope_low_frequency_factor, config.rope_high_frequency_factor
    kept_E = jnp.clip((turns_E - low) / (high - low), 0, 1)
  elif config.rope_scaling == 'yarn':
    kept_E = 1 - _between(half, *_yarn_borders(config))
  else:
    return frequencies_E
  return frequencies_E * (kept_E + (1 - kept_E) / config.rope_scaling_factor)


def _yarn_borders(config: ModelConfig) -> tuple[float, float]:
  """Numbers of the last rotation that is left alone, and of the first that is slowed down in full."""

  def number_of(turns: float) -> float:
    """Of the rotation that turns so often in the original length."""
    half = config.head_width / 2
    return half * math.log(config.rope_original_length / (turns * 2 * math.pi)) / math.log(config.rope_theta)

  low, high = number_of(config.rope_beta_fast), number_of(config.rope_beta_slow)
  if config.rope_truncate:
    low, high = math.floor(low), math.ceil(high)
  return max(low, 0), min(high, config.head_width - 1)


def _between(size: int, low: float, high: float) -> jax.Array:
  """For each of so many numbers how far it lies on the way from `low` (0) to `high` (1)."""
  width = high - low or 0.001  # no border in between, as in transformers
  return jnp.clip((jnp.arange(size, dtype=jnp.float32) - low) / width, 0, 1)


def only_where(rotates: jax.Array | None, rotation: Rotation) -> Rotation:
  """The rotation for a layer: none where it does not rotate; None: it does."""
  if rotates is None:
    return rotation
  return Rotation(jnp.where(rotates, rotation.cos_BC1E, 1), jnp.where(rotates, rotation.sin_BC1E, 0))


def rotate(x_BCHE: jax.Array, rotation: Rotation) -> jax.Array:
  """Rotates element i together with element i + E/2, as Llama does."""
  left, right = jnp.split(x_BCHE.astype(jnp.float32), 2, axis=-1)
  cos_BC1E, sin_BC1E = rotation.cos_BC1E, rotation.sin_BC1E
  rotated = left * cos_BC1E - right * sin_BC1E, right * cos_BC1E + left * sin_BC1E
  return jnp.concatenate(rotated, axis=-1).astype(x_BCHE.dtype)
