"""How every entry point starts: flags -> validated Config -> main -> exit code.

Wraps absl's app.run. A wrong flag or setting ends with one sentence on stderr and exit code 2, where
absl and ml_collections would show a traceback.

Exit codes: 0 finished, 1 error, 2 bad flags or settings, 130 interrupted; main may return others.
"""

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags

from mor_jax import config as config_lib
from mor_jax.cli import flags as flags_lib
from mor_jax.config import Config, ConfigError
from mor_jax.errors import RunError
from mor_jax.parallel import host_memory

FLAGS = flags.FLAGS
FAILED = 1
BAD_FLAGS = 2
INTERRUPTED = 130
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
NO_BACKEND = 'Unable to initialize backend'
HELP_FLAGS = ('h', '?', 'help', 'helpshort', 'helpfull')
CONFIG_FLAGS = ('config', 'workdir')
PROCESS_FLAGS = ('coordinator', 'num_processes', 'process_id', 'cluster')


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
      May raise ConfigError. Reads flags that the entry point defined itself, before, from `flags.FLAGS`.
    doc: shown by --help; the first words say what the program does, an example says how.
    with_config: define --config, the settings and --workdir.
    needs_config: require --config; without, the settings start from their defaults.
    several_processes: define --coordinator, --num_processes, --process_id and --cluster, and connect the processes before main.
    sections: without config, sections of settings to define nevertheless; `overrides` has what was given.
    with_arguments: main takes the list of command-line words that are not flags as its last argument.
  """
  own = FLAGS.get_flags_for_module(sys.argv[0] if main.__module__ == '__main__' else main.__module__)
  if with_config:
    flags_lib.define_config()
  flags_lib.define_settings(None if with_config else sections)
  if several_processes:
    _define_process_flags()

  def parse(argv: list[str]) -> list[Any]:
    if any(arg.startswith('-') and arg.lstrip('-') in HELP_FLAGS for arg in argv[1:]):
      signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` ends quietly
      shared = (CONFIG_FLAGS if with_config else ()) + (PROCESS_FLAGS if several_processes else ())
      print(_help(doc, [*own, *(FLAGS[name] for name in shared)], None if with_config else sections))
      sys.exit(0)
    try:
      words = flags_lib.parse(argv)
      if words and not with_arguments:
        raise ConfigError(
          f'unexpected argument {words[0]!r}: flags are written --NAME=VALUE (--help lists all flags)'
        )
      arguments = [flags_lib.given_config(needs_config), flags_lib.workdir()] if with_config else []
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
    except OSError as error:
      if error.errno not in NO_ROOM:
        raise
      print(
        f'error: {error.filename or "a file"} cannot be written ({error.strerror}); make room',
        file=sys.stderr,
      )
      return FAILED
    except RuntimeError as error:
      if NO_BACKEND not in str(error):
        raise
      _refuse(_without_backend(error))
    except KeyboardInterrupt:
      print('interrupted', file=sys.stderr)
      return INTERRUPTED

  app.run(guarded_main, flags_parser=parse)


def _without_backend(error: RuntimeError) -> ConfigError:
  """What to say where JAX_PLATFORMS asks for what this machine does not have."""
  wanted = os.environ.get('JAX_PLATFORMS', '')
  return ConfigError(
    f'JAX_PLATFORMS={wanted} names a platform that this machine or this JAX does not have ({str(error).splitlines()[0]}); '
    f'leave it unset, or set JAX_PLATFORMS=cpu'
  )


def _refuse(error: ConfigError) -> NoReturn:
  print(f'error: {error}', file=sys.stderr)
  sys.exit(BAD_FLAGS)


def _help(doc: str, own: Sequence[flags.Flag], sections: Sequence[str] | None) -> str:
  """The text of --help. `sections` of settings; None: all."""
  lines = [doc.strip(), '', 'Flags:']
  for flag in own:
    default = '' if flag.default is None else f'={flag.default}'
    lines.append(f'  --{flag.name}{default}  ({flag.flag_type()})\n      {flag.help}')
  if sections is None:
    lines += ['', 'Settings, each overrides that of the config file:', config_lib.describe()]
  elif sections:
    lines += ['', 'Settings:', config_lib.describe(sections)]
  return '\n'.join(lines)


def use_compilation_cache(config: Config) -> None:
  """Compiled programs are kept in the cache folder of the datasets, so that a restart begins at once."""
  import jax  # not needed by those who only read flags

  from mor_jax.data import cache

  if jax.config.jax_compilation_cache_dir is None:
    jax.config.update('jax_compilation_cache_dir', str(cache.cache_dir(config.data) / 'xla'))
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
