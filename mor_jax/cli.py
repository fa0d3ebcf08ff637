"""How every entry point starts: flags -> validated Config -> main -> exit code.

Wraps absl's app.run. A wrong flag or setting ends with one sentence on stderr and exit code 2, where
absl and ml_collections would show a traceback. Each setting of `config.Config` is an absl flag of its
own, `--config.SECTION.NAME`, so every form absl knows works: `--flag=value`, `--flag value`, `--noflag`.

Exit codes: 0 finished, 1 error, 2 bad flags or settings, 130 interrupted; main may return others.
"""

import difflib
import inspect
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_dict

from mor_jax import config as config_lib
from mor_jax.config import Config, ConfigError
from mor_jax.config.typed import unwrap_optional
from mor_jax.errors import RunError
from mor_jax.parallel import host_memory

FLAGS = flags.FLAGS
FAILED = 1
BAD_FLAGS = 2
INTERRUPTED = 130
HELP_FLAGS = ('h', '?', 'help', 'helpshort', 'helpfull')


def run(
  main: Callable[..., int | None],
  doc: str,
  with_config: bool = True,
  needs_config: bool = True,
  with_arguments: bool = False,
  several_processes: bool = False,
  sections: Sequence[str] = (),
) -> NoReturn:
  """Parses the command line, calls main and exits with what it returns (None: 0).

  Args:
    main: `main(config, workdir)`; workdir is the value of --workdir or None. Without config: `main()`.
      May raise ConfigError. Reads flags that the entry point defined itself from `flags.FLAGS`.
    doc: shown by --help; the first words say what the program does, an example says how.
    with_config: define --config, the settings and --workdir.
    needs_config: require --config; without, the settings start from their defaults.
    several_processes: define --coordinator and its kin, and connect the processes before main.
    sections: without config, sections of settings to define nevertheless; `overrides` has what was given.
    with_arguments: main takes the words of the command line that are no flags, a list, as its last argument.
  """
  if with_config:
    flags.DEFINE_string('config', None, 'settings to start from, configs/NAME.py or configs/NAME.py:VARIANT')
    flags.DEFINE_string('workdir', None, 'folder of the run; default: runs/NAME')
  _define_settings(None if with_config else sections)
  if several_processes:
    _define_process_flags()

  def parse(argv: list[str]) -> list[Any]:
    if any(arg.startswith('-') and arg.lstrip('-') in HELP_FLAGS for arg in argv[1:]):
      signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` ends quietly
      print(_help(main, doc, with_config, several_processes, sections))
      sys.exit(0)
    try:
      words = _parse_flags(argv)
      if words and not with_arguments:
        raise ConfigError(
          f'unexpected argument {words[0]!r}: flags are written --NAME=VALUE (--help lists all flags)'
        )
      arguments = [_load_config(needs_config), FLAGS.workdir] if with_config else []
      return [*arguments, words] if with_arguments else arguments
    except ConfigError as error:
      _refuse(error)

  def guarded_main(arguments: list[Any]) -> int | None:
    host_memory.keep_freed()
    try:
      if several_processes and _join_processes():
        return _run_among_others(main, arguments)
      return main(*arguments)
    except ConfigError as error:
      _refuse(error)
    except RunError as error:
      print(f'error: {error}', file=sys.stderr)
      return FAILED
    except KeyboardInterrupt:
      print('interrupted', file=sys.stderr)
      return INTERRUPTED

  app.run(guarded_main, flags_parser=parse)


def _refuse(error: ConfigError) -> NoReturn:
  print(f'error: {error}', file=sys.stderr)
  sys.exit(BAD_FLAGS)


def use_compilation_cache(config: Config) -> None:
  """Compiled programs are kept in the cache folder of the datasets, so that a restart begins at once."""
  import jax  # not needed by those who only read flags

  from mor_jax.data import dataset

  if jax.config.jax_compilation_cache_dir is None:
    jax.config.update('jax_compilation_cache_dir', str(dataset.cache_dir(config.data) / 'xla'))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)  # small programs add up


# ---- several processes ----


def _define_process_flags() -> None:
  flags.DEFINE_string('coordinator', None, 'HOST:PORT of process 0, where several processes meet')
  flags.DEFINE_integer('num_processes', None, 'how many processes take part in the training')
  flags.DEFINE_integer('process_id', None, 'which of them this is, from 0')
  flags.DEFINE_boolean(
    'cluster', None, 'ask SLURM or the TPU pod who takes part; default: if it shows several processes'
  )


def _join_processes() -> bool:
  """Connects this process with the others of its training; False if it is alone."""
  from mor_jax.parallel import runtime  # JAX is not needed before

  given = runtime.Processes(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
  processes = runtime.find(given, FLAGS.cluster)
  runtime.initialize(processes)
  return processes is not None


def _run_among_others(main: Callable[..., int | None], arguments: list[Any]) -> int | None:
  """As `guarded_main`, but a failure ends the process at once: an ordinary exit would wait for the others."""
  from mor_jax.parallel import runtime

  try:
    return main(*arguments)
  except (ConfigError, RunError) as error:
    print(f'error: {error}', file=sys.stderr)
    code = BAD_FLAGS if isinstance(error, ConfigError) else FAILED
    runtime.leave(code)
  except KeyboardInterrupt:
    runtime.leave(INTERRUPTED)
  except Exception:
    traceback.print_exc()
    runtime.leave(FAILED)


# ---- flags ----


_PARSERS = {
  bool: (flags.BooleanParser().parse, 'true or false'),
  int: (flags.IntegerParser().parse, 'an integer'),
  float: (flags.FloatParser().parse, 'a number'),
  str: (str, 'text'),
  tuple: (
    lambda text: tuple(float(item) for item in text.strip('()[], ').split(',')),
    'numbers separated by commas',
  ),
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


def _define_settings(sections: Sequence[str] | None) -> None:
  """A flag for every setting of some sections; None: of all."""
  for name, hint in config_lib.settings().items():
    if sections is not None and name.partition('.')[0] not in sections:
      continue
    flag = flags.Flag(
      _SettingParser(hint), None, f'config.{name}', None, 'overrides a setting', boolean=hint is bool
    )
    flags.DEFINE_flag(flag)


def _parse_flags(argv: list[str]) -> list[str]:
  """Sets FLAGS and returns the words that are no flags; raises ConfigError for anything absl does not accept."""
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


# ---- config ----


def _load_config(needs_config: bool) -> Config:
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
  path, _, variant = spec.partition(':')
  given = [*arguments, variant] if variant else list(arguments)
  if not os.path.isfile(path):
    raise ConfigError(f'--{flag}={spec}: there is no file {path}')
  try:
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


def _check_arguments(called: Callable, arguments: list[Any], has_variant: bool) -> None:
  try:
    inspect.signature(called).bind(*arguments)
  except TypeError:
    raise ConfigError('the file has no variants' if has_variant else 'add a variant, PATH:VARIANT') from None


# ---- help ----


def _help(
  main: Callable, doc: str, with_config: bool, several_processes: bool, sections: Sequence[str]
) -> str:
  own = sys.argv[0] if main.__module__ == '__main__' else main.__module__
  names = [(flag.name, flag) for flag in FLAGS.get_flags_for_module(own)]
  if with_config:
    names += [(name, FLAGS[name]) for name in ('config', 'workdir')]
  if several_processes:
    names += [(name, FLAGS[name]) for name in ('coordinator', 'num_processes', 'process_id', 'cluster')]
  lines = [doc.strip(), '', 'Flags:']
  for name, flag in names:
    default = '' if flag.default is None else f'={flag.default}'
    lines.append(f'  --{name}{default}  ({flag.flag_type()})\n      {flag.help}')
  if with_config:
    lines += ['', 'Settings, each overrides that of the config file:', config_lib.describe()]
  elif sections:
    lines += ['', 'Settings:', config_lib.describe(sections)]
  return '\n'.join(lines)
