"""Rotary scalings in config.json of Hugging Face, in and out.

transformers 4 says them in `rope_scaling`, 5 in `rope_parameters`.
"""

import math
from collections.abc import Mapping
from typing import Any

from mor_jax.config import ModelConfig
from mor_jax.interop.reader import Reader

_LLAMA3 = {'rope_low_frequency_factor': 'low_freq_factor', 'rope_high_frequency_factor': 'high_freq_factor'}
_YARN = {'rope_beta_fast': 'beta_fast', 'rope_beta_slow': 'beta_slow'}
_ORIGINAL = 'original_max_position_embeddings'
KINDS = ('default', 'linear', 'llama3', 'yarn', 'dynamic')


def settings(config: Mapping[str, Any], read: Reader, problems: list[str], theta: float) -> dict[str, Any]:
  """Settings of the rotary embedding.

  Args:
    theta: base where config.json names none.
  """
  rope = {**read.group('rope_scaling'), **read.group('rope_parameters')}
  inner = Reader({'rope_theta': config.get('rope_theta'), **rope}, problems)
  found: dict[str, Any] = {'rope_theta': inner.number('rope_theta', theta)}
  if nested := [name for name, value in rope.items() if isinstance(value, dict)]:
    problems.append(
      f'rope_parameters differ by layer ({", ".join(map(str, nested))}); one rotation serves all here'
    )
    return found
  if rope.get('partial_rotary_factor', config.get('partial_rotary_factor')) not in (None, 1.0):
    problems.append('partial_rotary_factor is not 1 (only whole heads are rotated)')
  kind = rope.get('rope_type') or rope.get('type') or 'default'
  if kind not in KINDS:
    problems.append(f'rope scaling {kind!r} ({", ".join(KINDS)} are supported)')
  elif kind != 'default':
    found |= {'rope_scaling': kind} | _scaling(kind, config, rope, inner, problems)
  return found


def _scaling(
  kind: str, config: Mapping[str, Any], rope: dict[str, Any], inner: Reader, problems: list[str]
) -> dict[str, Any]:
  longest = config.get('max_position_embeddings')
  known = [rope.get(_ORIGINAL), config.get(_ORIGINAL), longest]
  original = longest if kind == 'dynamic' else next((one for one in known if one is not None), None)
  needed = ['factor', *(_LLAMA3.values() if kind == 'llama3' else ())]
  if kind == 'yarn' and rope.get('factor', 0) is None and _is_length(longest) and _is_length(original):
    rope['factor'] = longest / original  # as transformers takes it
    inner = Reader(rope, problems)
  missing = [name for name in needed if name not in rope]
  if kind != 'linear' and original is None:
    missing.append('max_position_embeddings' if kind == 'dynamic' else _ORIGINAL)
  if missing:
    problems.append(f'rope scaling {kind!r} lacks {", ".join(missing)}')
    return {}
  found: dict[str, Any] = {'rope_scaling_factor': inner.number('factor')}
  if kind != 'linear':
    found['rope_original_length'] = Reader({_ORIGINAL: original}, problems).whole(_ORIGINAL)
  if kind == 'llama3':
    found |= {ours: inner.number(theirs) for ours, theirs in _LLAMA3.items()}
  if kind == 'yarn':
    found |= {
      ours: inner.number(theirs) for ours, theirs in _YARN.items() if rope.get(theirs) not in (None, 0)
    }
    found['rope_truncate'] = inner.flag('truncate', True)
    found['rope_attention_factor'] = _scores_factor(rope, inner, found['rope_scaling_factor'])
  return found


def _is_length(value: Any) -> bool:
  return type(value) is int and value > 0


def _scores_factor(rope: Mapping[str, Any], inner: Reader, factor: float) -> float | None:
  """YaRN's factor of cosines and sines where it is not the usual one; DeepSeek's two `mscale` give it as a ratio."""
  if rope.get('attention_factor') is not None:
    return inner.number('attention_factor')
  if not (rope.get('mscale') and rope.get('mscale_all_dim')):
    return None
  scales = [inner.number(name) for name in ('mscale', 'mscale_all_dim')]
  above, below = (0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0 for scale in scales)
  return above / below if below else inner.number('mscale_all_dim')


def described(config: ModelConfig, longest: int) -> dict[str, Any]:
  """What config.json says of rotation, in the form that transformers 4 and 5 both read.

  Args:
    longest: longest text that the model is for.
  """
  kind, original = config.rope_scaling, config.rope_original_length
  about: dict[str, Any] = {'rope_theta': config.rope_theta, 'rope_scaling': None}
  if kind == 'none':
    return about | {'max_position_embeddings': longest}
  scaling = {'rope_type': kind, 'factor': config.rope_scaling_factor}
  if kind in ('llama3', 'yarn'):
    scaling[_ORIGINAL] = original
  for ours, theirs in {'llama3': _LLAMA3, 'yarn': _YARN}.get(kind, {}).items():
    scaling[theirs] = getattr(config, ours)
  if kind == 'yarn':
    scaling['truncate'] = config.rope_truncate
    if config.rope_attention_factor is not None:
      scaling['attention_factor'] = config.rope_attention_factor
  if kind == 'dynamic':
    longest = original  # from here on transformers makes rotations slower, for each text by its length
  elif kind != 'linear':
    longest = max(longest, original)
  return about | {'rope_scaling': scaling, 'max_position_embeddings': longest}
