"""Rules of attention: heads, rotation, and what tokens see."""

import dataclasses

from mor_jax.config.model import ModelConfig
from mor_jax.config.requirement import require
from mor_jax.errors import ConfigError

_ONLY_WITH = {  # settings of one rotary scaling
  'yarn': ('rope_beta_fast', 'rope_beta_slow', 'rope_truncate', 'rope_attention_factor'),
  'dynamic': ('rope_length',),
}


def validate_attention(model: ModelConfig) -> None:
  """Raises ConfigError for the first setting of attention that cannot work, alone or with others."""
  _validate_heads(model)
  window = model.sliding_window
  require(window is None or window >= 1, 'model.sliding_window', window, 'at least 1, or none')
  _validate_rope(model)
  _validate_rotating_layers(model)


def _validate_heads(model: ModelConfig) -> None:
  if model.head_dim is None and model.d_model % model.num_heads:
    raise ConfigError(
      f'model.d_model={model.d_model} is not a multiple of model.num_heads={model.num_heads}; '
      f'change one of them or set model.head_dim'
    )
  if model.num_heads % model.num_kv_heads:
    divisors = [k for k in range(1, model.num_heads + 1) if model.num_heads % k == 0]
    raise ConfigError(
      f'model.num_kv_heads={model.num_kv_heads} does not divide model.num_heads={model.num_heads}; '
      f'use one of {", ".join(map(str, divisors))}'
    )
  if model.head_width < 2 or model.head_width % 2:
    raise ConfigError(
      f'model.head_dim={model.head_width} is not allowed: rotary embeddings need an even head width >= 2'
    )


def _validate_rope(model: ModelConfig) -> None:
  for name in ('rope_theta', 'rope_scaling_factor', 'rope_original_length', 'rope_beta_slow'):
    require(getattr(model, name) > 0, f'model.{name}', getattr(model, name), '> 0')
  low, high = model.rope_low_frequency_factor, model.rope_high_frequency_factor
  require(
    0 < low < high, 'model.rope_low_frequency_factor', low, f'between 0 and rope_high_frequency_factor={high}'
  )
  slow, fast = model.rope_beta_slow, model.rope_beta_fast
  require(slow < fast, 'model.rope_beta_fast', fast, f'above rope_beta_slow={slow}')
  factor, length, original = (
    model.rope_attention_factor,
    model.rope_length,
    model.rope_original_length,
  )
  require(factor is None or factor > 0, 'model.rope_attention_factor', factor, '> 0, or none')
  require(
    length is None or length >= original,
    'model.rope_length',
    length,
    f'at least rope_original_length={original}, or none',
  )
  fields = {field.name: field for field in dataclasses.fields(model)}
  for scaling, names in _ONLY_WITH.items():
    idle = [
      f'model.{name}={getattr(model, name)}' for name in names if getattr(model, name) != fields[name].default
    ]
    if idle and model.rope_scaling != scaling:
      raise ConfigError(
        f'{", ".join(idle)} has no effect with model.rope_scaling={model.rope_scaling}; set it to {scaling}'
      )
  if model.rope_scaling == 'yarn':
    require(model.rope_theta > 1, 'model.rope_theta', model.rope_theta, '> 1 with rope_scaling=yarn')
  if model.rope_scaling == 'dynamic' and model.head_width == 2:
    raise ConfigError(
      'model.head_dim=2 has a single rotation, which no larger rope_theta slows down; with '
      'model.rope_scaling=dynamic use heads of at least 4'
    )


def _validate_rotating_layers(model: ModelConfig) -> None:
  layers, unique = model.no_rope_layers, model.num_unique_layers
  if not layers:
    return
  if len(set(layers)) < len(layers) or not all(0 <= layer < unique for layer in layers):
    raise ConfigError(
      f'model.no_rope_layers={layers} must be different numbers of unique layers, of which this model has {unique}, '
      f'counted from 0'
    )
  if model.kind != 'vanilla' or model.kv != 'shared':
    return
  ends, passes, depth = model.unique_ends, model.passes, model.shared_depth // model.passes
  for group in range(depth):
    if model.sharing.endswith('cycle'):
      together = [ends + group + turn * depth for turn in range(passes)]
    else:
      together = [ends + group * passes + turn for turn in range(passes)]
    if len({layer in layers for layer in together}) > 1:
      raise ConfigError(
        f'model.no_rope_layers={layers} has some of the layers {", ".join(map(str, together))}, but not all: with '
        f'model.kv=shared they read the same keys, which are rotated or not; name all of them or none'
      )
