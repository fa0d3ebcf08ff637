"""The flags of entry points in the process of the tests, one after another: several have the same names."""

import importlib
import sys
from types import ModuleType

from absl import flags
from absl.testing import flagsaver

OURS = ('mor_jax.', 'benchmarks.')


def clear() -> None:
  """Removes the flags of the entry point that was loaded last."""
  for module, defined in flags.FLAGS.flags_by_module_dict().copy().items():
    for flag in defined.copy() if module.startswith(OURS) else ():
      delattr(flags.FLAGS, flag.name)


def load(name: str) -> ModuleType:
  """An entry point with its flags at their defaults, in place of those of the one before."""
  clear()
  if name.startswith('benchmarks.'):  # a script, which defines its flags when it is imported
    sys.modules.pop(name, None)
  loaded = importlib.import_module(name)
  if name.startswith('mor_jax.'):
    loaded.define_flags()
  if not flags.FLAGS.is_parsed():
    flags.FLAGS(['test'])
  return loaded


def run(name: str, **values) -> None:
  """Runs a command with these flags, the others at their defaults; raises as it does."""
  command = load(name)
  with flagsaver.flagsaver():
    flags.FLAGS([name, *(f'--{flag}={value}' for flag, value in values.items())])
    command.main()
