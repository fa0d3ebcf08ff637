"""Rotary position embedding (Su et al. 2021), with the scalings that longer contexts use."""

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
  half = config.head_width // 2
  frequencies_E = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  if config.rope_scaling == 'linear':
    frequencies_E /= config.rope_scaling_factor
  elif config.rope_scaling == 'llama3':
    turns_E = config.rope_original_length * frequencies_E / (2 * jnp.pi)
    low, high = config.rope_low_frequency_factor, config.rope_high_frequency_factor
    kept_E = jnp.clip((turns_E - low) / (high - low), 0, 1)
    frequencies_E *= kept_E + (1 - kept_E) / config.rope_scaling_factor
  angles_BC1E = positions_BC[:, :, None, None].astype(jnp.float32) * frequencies_E
  return Rotation(jnp.cos(angles_BC1E), jnp.sin(angles_BC1E))


def rotate(x_BCHE: jax.Array, rotation: Rotation) -> jax.Array:
  """Rotates element i together with element i + E/2, as Llama does."""
  left, right = jnp.split(x_BCHE.astype(jnp.float32), 2, axis=-1)
  cos_BC1E, sin_BC1E = rotation.cos_BC1E, rotation.sin_BC1E
  rotated = left * cos_BC1E - right * sin_BC1E, right * cos_BC1E + left * sin_BC1E
  return jnp.concatenate(rotated, axis=-1).astype(x_BCHE.dtype)
