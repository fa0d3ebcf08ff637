"""Families of models whose layers are ours: what their config.json says of attention, in and out (docs/families.md).

All are Llama with something more: biases, norms of queries and keys, a window, layers without rotation.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mor_jax.config import ConfigError, ModelConfig
from mor_jax.interop.reader import Reader

FULL, SLIDING = 'full_attention', 'sliding_attention'
_NO_ROPE_INTERVAL = 4  # of SmolLM3, where config.json does not say


@dataclasses.dataclass(frozen=True)
class Family:
  """What config.json of a family means where it says nothing, and what it can say.

  Attributes:
    architecture: class in transformers.
    kv_heads: key/value heads; None: as many as query heads.
    head_dim: width of a head; None: d_model / num_heads.
    theta: base of the rotation.
    ties: whether embedding and head are one.
    biases: that attention may have, by `attention_bias` in config.json where there are two, else always.
  """

  architecture: str
  kv_heads: int | None = None
  head_dim: int | None = None
  theta: float = 10000.0
  ties: bool = False
  biases: tuple[str, ...] = ('none', 'all')


FAMILIES = {
  'llama': Family('LlamaForCausalLM'),
  'mistral': Family('MistralForCausalLM', kv_heads=8, biases=('none',)),
  'qwen2': Family('Qwen2ForCausalLM', kv_heads=32, biases=('qkv',)),
  'qwen3': Family('Qwen3ForCausalLM', kv_heads=32, head_dim=128),
  'smollm3': Family('SmolLM3ForCausalLM', kv_heads=4, theta=2e6, ties=True),
}


def settings(
  name: str, config: Mapping[str, Any], layers: int, read: Reader, problems: list[str]
) -> dict[str, Any]:
  """Settings of attention in config.json of a family.

  Args:
    layers: of the model.
  """
  family = FAMILIES[name]
  biases, found = family.biases, {'qk_norm': name == 'qwen3'}
  found['attention_bias'] = (
    biases[-1] if len(biases) == 1 or read.flag('attention_bias', False) else biases[0]
  )
  if len(biases) == 1 and config.get('attention_bias') not in (None, biases[0] != 'none'):
    problems.append(f'attention_bias={config["attention_bias"]!r} (a {name} model has biases: {biases[0]})')
  if name == 'smollm3':
    found['no_rope_layers'] = _no_rope_layers(config, layers, read, problems)
  found['sliding_window'] = _window(name, config, layers, found.get('no_rope_layers', ()), read, problems)
  return found


def _no_rope_layers(
  config: Mapping[str, Any], layers: int, read: Reader, problems: list[str]
) -> tuple[int, ...]:
  rotates = config.get('no_rope_layers')
  if rotates is None:
    interval = read.whole('no_rope_layer_interval', _NO_ROPE_INTERVAL)
    return tuple(range(interval - 1, layers, interval))
  if not isinstance(rotates, list) or len(rotates) < layers or any(one not in (0, 1) for one in rotates):
    problems.append(f'no_rope_layers must be a list of 0 or 1 for each of the {layers} layers')
    return ()
  return tuple(layer for layer in range(layers) if not rotates[layer])


def _window(
  name: str,
  config: Mapping[str, Any],
  layers: int,
  no_rope: tuple[int, ...],
  read: Reader,
  problems: list[str],
) -> int | None:
  """The window of all layers. Notes a problem if only some have one."""
  if name == 'llama':
    return None
  has_one = name == 'mistral' or read.flag('use_sliding_window', False)
  if not has_one or ('sliding_window' in config and config['sliding_window'] is None):
    return None
  window = read.whole('sliding_window', 4096)
  kinds = config.get('layer_types')
  if name == 'mistral':
    return window
  if kinds is None:
    slides = no_rope if name == 'smollm3' else range(read.count('max_window_layers', 28), layers)
    kinds = [SLIDING if layer in slides else FULL for layer in range(layers)]
  if (
    not isinstance(kinds, list) or len(kinds) != layers or not all(kind in (FULL, SLIDING) for kind in kinds)
  ):
    problems.append(f'layer_types must be a list of {FULL} or {SLIDING} for each of the {layers} layers')
    return None
  slides = [layer for layer, kind in enumerate(kinds) if kind == SLIDING]
  if slides and len(slides) < layers:
    problems.append(
      f'sliding_window={window} in {len(slides)} of {layers} layers only (layers {_listed(slides)}); a window must '
      f'be that of all layers here'
    )
  return window if slides else None


def _listed(layers: list[int]) -> str:
  return f'{", ".join(map(str, layers[:6]))}{", ..." if len(layers) > 6 else ""}'


def family_of(config: ModelConfig) -> str:
  """The family whose config.json can say what the attention of a model is.

  Raises:
    ConfigError: none can.
  """
  biases = config.attention_bias
  if config.qk_norm:
    name = 'qwen3'
  elif biases == 'qkv':
    name = 'qwen2'
  elif config.no_rope_layers or (biases == 'all' and config.sliding_window is not None):
    name = 'smollm3'
  else:
    name = 'mistral' if config.sliding_window is not None else 'llama'
  if biases in FAMILIES[name].biases and (name == 'smollm3' or not config.no_rope_layers):
    return name
  raise ConfigError(
    f'model.attention_bias={biases} with model.qk_norm={config.qk_norm} and '
    f'model.no_rope_layers={config.no_rope_layers} is in no family that transformers knows '
    f'({", ".join(FAMILIES)}): such a model cannot be written for it'
  )


def described(config: ModelConfig) -> dict[str, Any]:
  """What config.json says of a model's family and attention. Raises ConfigError, see `family_of`."""
  name, window = family_of(config), config.sliding_window
  about: dict[str, Any] = {
    'architectures': [FAMILIES[name].architecture],
    'model_type': name,
    'hidden_act': 'silu',
  }
  if len(FAMILIES[name].biases) > 1:
    about['attention_bias'] = config.attention_bias != 'none'
  if name in ('llama', 'smollm3'):
    about['mlp_bias'] = False
  if name == 'mistral':
    return about | {'sliding_window': window}
  if name == 'llama':
    return about
  layers = config.num_layers
  about |= {
    'use_sliding_window': window is not None,
    'sliding_window': window,
    'layer_types': [FULL if window is None else SLIDING] * layers,
  }
  if name != 'smollm3':
    return about | {'max_window_layers': layers if window is None else 0}
  rotates = [int(layer not in config.no_rope_layers) for layer in range(layers)]
  return about | {
    'no_rope_layers': rotates,
    'pad_token_id': None,
  }  # its default lies beyond small vocabularies
