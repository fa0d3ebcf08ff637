"""Flags and settings: each setting of `config.Config` is an absl flag of its own, `--config.SECTION.NAME`.

So every form that absl knows works: `--flag=value`, `--flag value`, `--noflag`. Flags that several commands
have are defined and checked here.
"""

import contextlib
import difflib
import inspect
import os
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import flags, logging
from ml_collections import config_dict

from mor_jax import config as config_lib
from mor_jax.config import Config, ConfigError
from mor_jax.config.typed import unwrap_optional

FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # what is defined here is a flag of the command that calls for it


# ---- settings as flags ----


def _whole(text: str) -> int:
  """An integer, also one that is written as 1e4 or 2.5e3. Raises ValueError."""
  try:
    return flags.IntegerParser().parse(text)
  except ValueError:
    if 'e' not in text.lower() or not float(text).is_integer():
      raise
    return int(float(text))


def _numbers(text: str) -> tuple[int | float, ...]:
  """Numbers separated by commas, in brackets or not; () is none. Raises ValueError."""
  inner = text.strip('()[], ')
  words = inner.split(',') if inner or not text.strip(' ,') else []
  return tuple(int(word) if word.strip().isdecimal() else float(word) for word in words)


_PARSERS = {
  bool: (flags.BooleanParser().parse, 'true or false'),
  int: (_whole, 'an integer'),
  float: (flags.FloatParser().parse, 'a number'),
  str: (str, 'text'),
  tuple: (_numbers, 'numbers separated by commas'),
}


class _SettingParser(flags.ArgumentParser):
  """Text -> value of a setting; 'none' resets an optional one."""

  def __init__(self, hint: Any):
    kind, self._optional = unwrap_optional(hint)
    self._parse, self._allowed = _PARSERS[kind]

  def parse(self, argument: str) -> Any:
    if self._optional and argument.lower() == 'none':
      return None
    try:
      return self._parse(argument)
    except ValueError:
      raise ValueError(f'must be {self._allowed}{" or none" if self._optional else ""}') from None


def parse_setting(name: str, text: str) -> Any:
  """The value of a setting from text, as its flag has it. Raises ConfigError for an unknown name or wrong text."""
  _check_known(name)
  try:
    return _SettingParser(config_lib.settings()[name]).parse(text)
  except ValueError as error:
    raise ConfigError(f'{name}={text} {error}') from None


def _check_known(name: str) -> None:
  if name not in config_lib.settings():
    close = difflib.get_close_matches(name, config_lib.settings(), n=1)
    hint = f'; did you mean {close[0]}?' if close else ''
    raise ConfigError(f'unknown setting {name}{hint} (--help of mor_jax.train lists all settings)')


def define_settings(sections: Sequence[str] | None) -> None:
  """A flag for every setting of some sections; None: of all."""
  for name, hint in config_lib.settings().items():
    if sections is not None and name.partition('.')[0] not in sections:
      continue
    flag = flags.Flag(
      _SettingParser(hint), None, f'config.{name}', None, 'overrides a setting', boolean=hint is bool
    )
    flags.DEFINE_flag(flag)


def parse(argv: list[str]) -> list[str]:
  """Sets FLAGS and returns the words that are not flags; raises ConfigError for anything absl does not accept."""
  try:
    leftover = FLAGS(argv)
  except flags.UnrecognizedFlagError as error:
    raise ConfigError(f'unknown flag {error.flagvalue}{_suggestion(error.flagname)}') from None
  except (flags.Error, ValueError) as error:
    raise ConfigError(str(error)) from None
  if FLAGS['verbosity'].using_default_value:
    FLAGS.verbosity = logging.WARNING  # app.run would raise it to INFO, and libraries chat there
  return leftover[1:]


def _suggestion(unknown: str) -> str:
  """Points to the flag whose last part is, or is most like, that of `unknown`."""
  group = [known for known in FLAGS if known.startswith(f'{unknown}.')]
  if group:
    return f': a group of settings, such as --{group[0]}'
  last = {known: known.rsplit('.', 1)[-1] for known in FLAGS}
  close = difflib.get_close_matches(unknown.rsplit('.', 1)[-1], set(last.values()), n=1)
  candidates = [f'--{known}' for known, name in last.items() if name in close]
  best = difflib.get_close_matches(f'--{unknown}', candidates, n=1, cutoff=0)
  return f'; did you mean {best[0]}?' if best else ' (--help lists all flags)'


# ---- flags that several commands have ----


def define_checkpoint() -> None:
  """--checkpoint, the trained model that a command uses."""
  flags.DEFINE_string('checkpoint', None, 'folder of the run')


def require_checkpoint() -> None:
  """Raises ConfigError without --checkpoint."""
  if not FLAGS.checkpoint:
    raise ConfigError(
      '--checkpoint is missing: name the folder of a run, for example --checkpoint=runs/tiny-mor'
    )


def require(*names: str) -> None:
  """Raises ConfigError unless these flags are given."""
  for name in names:
    if not FLAGS[name].value:
      raise ConfigError(f'--{name} is missing (--help shows an example)')


def check_least(**least: int) -> None:
  """Raises ConfigError if one of these flags has a value below what it must be at least."""
  for name, minimum in least.items():
    value = FLAGS[name].value
    if value is not None and value < minimum:
      raise ConfigError(f'--{name}={value} is not allowed: must be >= {minimum}')


def numbers(name: str) -> tuple[float, ...]:
  """The numbers of a list flag. Raises ConfigError for other words."""
  words = FLAGS[name].value
  try:
    return tuple(float(word) for word in words)
  except ValueError:
    raise ConfigError(f'--{name}={",".join(words)} must be numbers separated by commas') from None


# ---- config ----


def define_config() -> None:
  """--config and --workdir."""
  flags.DEFINE_string('config', None, 'settings to start from, configs/NAME.py or configs/NAME.py:VARIANT')
  flags.DEFINE_string('workdir', None, 'folder of the run; default: runs/NAME')


def workdir() -> str | None:
  """The value of --workdir, with ~ for the home folder, which shells leave in --workdir=~/runs."""
  return FLAGS.workdir and os.path.expanduser(FLAGS.workdir)


def given_config(needs_config: bool) -> Config:
  """The validated Config of --config and the overrides; raises ConfigError."""
  if not FLAGS.config and needs_config:
    raise ConfigError('--config is missing: name a file of settings, for example --config=configs/tiny.py')
  return load_config(FLAGS.config, overrides())


def overrides() -> dict[str, Any]:
  """Settings given on the command line, by dotted name: `{'train.steps': 10}`."""
  known = [name for name in config_lib.settings() if f'config.{name}' in FLAGS]
  flag_of = {name: FLAGS[f'config.{name}'] for name in known}
  return {name: flag.value for name, flag in flag_of.items() if flag.present}


def load_config(spec: str | None, changes: dict[str, Any]) -> Config:
  """The validated Config of `PATH` or `PATH:VARIANT` (None: the defaults) with changes by dotted name.

  Raises:
    ConfigError: the file, a name or a value cannot work.
  """
  settings = _read_config_file(spec) if spec else config_lib.default()
  for name in changes:
    _check_known(name)
  # A file may build a ConfigDict by hand, with sections left out; resolve() checks names and types.
  with settings.unlocked(), settings.ignore_type():
    for section in {name.partition('.')[0] for name in changes if '.' in name} - set(settings):
      settings[section] = config_dict.ConfigDict()
    settings.update_from_flattened_dict(changes)
  return config_lib.resolve(settings)


def _read_config_file(spec: str) -> config_dict.ConfigDict:
  """What get_config() of `PATH` or get_config(VARIANT) of `PATH:VARIANT` returns."""
  settings = call_file('config', spec, 'get_config')
  if not isinstance(settings, config_dict.ConfigDict):
    raise ConfigError(
      f'--config={spec}: get_config() returned {type(settings).__name__}, it must return a ConfigDict: '
      f'start from mor_jax.config.default()'
    )
  return settings


def call_file(flag: str, spec: str, function: str, *arguments: Any) -> Any:
  """What a function of a Python file returns, which is run as trusted code.

  Args:
    flag: the flag that names the file, for messages.
    spec: `PATH`, or `PATH:VARIANT` for a further argument.

  Raises:
    ConfigError: there is no such file or function, or it raised something.
  """
  path, variant = _path_and_variant(spec)
  given = [*arguments, variant] if variant else list(arguments)
  if not os.path.isfile(path):
    raise ConfigError(f'--{flag}={spec}: there is no file {path}')
  try:
    with _neighbours_importable(path):
      called = runpy.run_path(path).get(function)
      if called is None:
        raise ConfigError(f'the file defines no function {function}')
      _check_arguments(called, given, bool(variant))
      return called(*given)
  except ConfigError as error:
    raise ConfigError(f'--{flag}={spec}: {error}') from None
  except Exception as error:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    where = f', line {lines[-1]}' if lines else ''
    raise ConfigError(f'--{flag}={spec}: {path}{where} raised {type(error).__name__}: {error}') from None


def _path_and_variant(spec: str) -> tuple[str, str]:
  """The parts of `PATH:VARIANT`; a path may have colons of its own."""
  if os.path.isfile(spec):
    return spec, ''
  path, _, variant = spec.rpartition(':')
  if os.path.isfile(path):
    return path, variant
  path, _, variant = spec.partition(':')
  return path, variant


@contextlib.contextmanager
def _neighbours_importable(path: str) -> Iterator[None]:
  """Within, the file may import modules beside it, as a script may; another file gets its own neighbours."""
  folder, before = os.path.dirname(os.path.abspath(path)), set(sys.modules)
  sys.path.insert(0, folder)
  try:
    yield
  finally:
    sys.path.remove(folder)
    for name in set(sys.modules) - before:
      file = getattr(sys.modules[name], '__file__', None)
      if file and os.path.dirname(os.path.abspath(file)) == folder:
        del sys.modules[name]


def _check_arguments(called: Callable, arguments: list[Any], has_variant: bool) -> None:
  try:
    inspect.signature(called).bind(*arguments)
  except TypeError:
    raise ConfigError('the file has no variants' if has_variant else 'add a variant, PATH:VARIANT') from None
