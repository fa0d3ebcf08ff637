"""Typed settings: dataclasses with a help text per field, converted to and from ml_collections ConfigDicts.

The settings themselves are in run.py and model.py.
"""

import dataclasses
import difflib
import math
import types
import typing
from typing import Any

from ml_collections import config_dict

from mor_jax.errors import ConfigError


def setting(default: Any, help_text: str, choices: tuple[str, ...] = ()) -> Any:
  """Returns a dataclass field with its text for `--help` and, optionally, its allowed values."""
  return dataclasses.field(default=default, metadata={'help': help_text, 'choices': choices})


def describe_field(owner: type, field: dataclasses.Field, default_value: Any, prefix: str) -> str:
  """Returns a field's flag, allowed values and meaning, as shown by `--help`."""
  kind, _ = unwrap_optional(typing.get_type_hints(owner)[field.name])
  allowed = '|'.join(field.metadata['choices']) or getattr(kind, '__name__', str(kind))
  shown = 'none' if default_value is None else default_value
  return f'  --{prefix}.{field.name}={shown}  ({allowed})\n      {field.metadata["help"]}'


def unwrap_optional(hint: Any) -> tuple[Any, bool]:
  """Splits a type hint into (type, whether it may be None). Parametrised tuples become `tuple`."""
  optional = isinstance(hint, types.UnionType)
  if optional:
    hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
  return typing.get_origin(hint) or hint, optional


def to_config_dict(value: Any) -> config_dict.ConfigDict:
  """Converts a settings dataclass and its sections to a locked ConfigDict. Flags can set optional settings."""
  result = config_dict.ConfigDict()
  hints = typing.get_type_hints(type(value))
  for field in dataclasses.fields(value):
    item = getattr(value, field.name)
    kind, optional = unwrap_optional(hints[field.name])
    if dataclasses.is_dataclass(item):
      result[field.name] = to_config_dict(item)
    elif optional:
      result[field.name] = config_dict.placeholder(kind)  # so that an override may set it
      result[field.name] = item
    else:
      result[field.name] = item
  return result.lock()


def from_dict(cls: type, raw: dict[str, Any], prefix: str = '') -> Any:
  """Builds the dataclass from a nested dict. Raises ConfigError for an unknown setting or a wrong type."""
  hints = typing.get_type_hints(cls)
  for name in raw:
    if name not in hints:
      close = difflib.get_close_matches(name, hints, n=1)
      hint = f'; did you mean {prefix}{close[0]}?' if close else ''
      raise ConfigError(f'unknown setting {prefix}{name}{hint} (--help lists all settings)')
  return cls(**{name: _convert(hints[name], value, f'{prefix}{name}') for name, value in raw.items()})


def _entry_kind(hint: Any) -> type:
  """Type of the entries of a tuple, `tuple[int, ...]`, or of one that may be None."""
  if isinstance(hint, types.UnionType):
    hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
  return typing.get_args(hint)[0]


def _convert(hint: Any, value: Any, name: str) -> Any:
  kind, optional = unwrap_optional(hint)
  if isinstance(kind, type) and dataclasses.is_dataclass(kind):
    if not isinstance(value, dict):
      raise ConfigError(f'{name}={value!r} must be a group of settings')
    return from_dict(kind, value, f'{name}.')
  if value is None and optional:
    return None
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if kind is tuple and isinstance(value, (list, tuple)):
    return tuple(_convert(_entry_kind(hint), item, name) for item in value)
  if type(value) is not kind:
    raise ConfigError(f'{name}={value!r} must be {"" if kind is not tuple else "a "}{kind.__name__}')
  if kind is float and not math.isfinite(value):
    raise ConfigError(f'{name}={value} must be a finite number')
  return value
