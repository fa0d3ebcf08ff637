"""Builds a validated `Config` from an ml_collections ConfigDict, and lists the settings for `--help`."""

import dataclasses
import os
import typing
from collections.abc import Sequence
from typing import Any

from ml_collections import config_dict

from mor_jax.config.model import AUTO
from mor_jax.config.run import Config
from mor_jax.config.typed import describe_field, from_dict, to_config_dict
from mor_jax.config.validation import validate

PATHS = (
  ('data', 'tokenizer'),
  ('data', 'cache_dir'),
  ('init', 'source'),
  ('distill', 'teacher'),
  ('checkpoint', 'folder'),
)


def default() -> config_dict.ConfigDict:
  """A locked ConfigDict with every setting at its default, for config files to start from."""
  made = to_config_dict(Config())
  made.model.update(dict.fromkeys(AUTO, 'auto'))  # what it stands for depends on what a config file sets
  return made


def resolve(settings: config_dict.ConfigDict | dict[str, Any]) -> Config:
  """Returns the validated `Config` for a ConfigDict, or for the dict of `Config.to_dict`.

  Raises:
    ConfigError: unknown setting, wrong type, or a value that cannot work.
  """
  raw = settings.to_dict() if isinstance(settings, config_dict.ConfigDict) else settings
  config = _at_home(from_dict(Config, raw))
  validate(config)
  return config


def _at_home(config: Config) -> Config:
  """The config with ~ in paths replaced by the home folder, which shells leave in --NAME=~/PATH."""
  for section, name in PATHS:
    values = getattr(config, section)
    path = getattr(values, name)
    if path is not None and path.startswith('~'):
      values = dataclasses.replace(values, **{name: os.path.expanduser(path)})
      config = dataclasses.replace(config, **{section: values})
  return config


def with_changes(config: Config, **sections: dict[str, Any]) -> Config:
  """Returns a validated copy with some settings changed: `with_changes(config, model={'dtype': 'float32'})`.

  Settings of the model that have the value which auto stands for follow those that decide on it.

  Raises:
    ConfigError: a value that cannot work, by itself or in combination with others.
  """
  if 'model' in sections:
    left = {
      name: 'auto' for name, value in config.model.auto().items() if getattr(config.model, name) == value
    }
    sections = {**sections, 'model': {**left, **sections['model']}}
  changed = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
  config = dataclasses.replace(config, **changed)
  validate(config)
  return config


def describe(sections: Sequence[str] | None = None) -> str:
  """Lists the settings of all or some sections, with type, default and meaning: the body of `--help`."""
  lines = []
  for section in dataclasses.fields(Config):
    if sections is not None and section.name not in sections:
      continue
    value = getattr(Config(), section.name)
    if not dataclasses.is_dataclass(value):
      lines.append(describe_field(Config, section, value, 'config'))
      continue
    title = (type(value).__doc__ or '').partition('\n')[0]
    lines.append(f'\n  {title}')
    for field in dataclasses.fields(value):
      text = describe_field(type(value), field, field.default, f'config.{section.name}')
      lines.append(text)
  return '\n'.join(lines)


def settings() -> dict[str, Any]:
  """Maps the dotted name of every setting to its type hint: `{'name': str, 'model.kind': str, ...}`."""
  hints: dict[str, Any] = {}
  for name, hint in typing.get_type_hints(Config).items():
    if dataclasses.is_dataclass(hint):
      hints |= {f'{name}.{field}': kind for field, kind in typing.get_type_hints(hint).items()}
    else:
      hints[name] = hint
  return hints
