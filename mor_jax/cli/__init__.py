"""What entry points share: flags and settings (flags.py), and the way from flags to an exit code (entry.py)."""

from mor_jax.cli.entry import FAILED, run, use_compilation_cache
from mor_jax.cli.flags import (
  call_file,
  check_least,
  define_checkpoint,
  load_config,
  numbers,
  overrides,
  parse_setting,
  require,
  require_checkpoint,
)

__all__ = [
  'FAILED',
  'call_file',
  'check_least',
  'define_checkpoint',
  'load_config',
  'numbers',
  'overrides',
  'parse_setting',
  'require',
  'require_checkpoint',
  'run',
  'use_compilation_cache',
]
