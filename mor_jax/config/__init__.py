"""All settings of mor_jax: frozen dataclasses, built from an ml_collections ConfigDict.

A config file (`configs/*.py`) starts from `default()`, changes some settings and returns the
ConfigDict. absl flags override single fields (`--config.model.num_recursions=3`). `resolve()`
turns the result into a `Config`, which is immutable, typed and validated. The rest of the
package reads neither flags nor ConfigDicts.

Shape letters, used throughout the package in docstrings and as suffixes of array names:

  B  batch (rows)                 H  query heads          U  unique layers (parameter slots)
  T  tokens in a row              K  key/value heads      R  recursions (`num_recursions`)
  S  keys attended to             E  head width           C  tokens selected at a recursion step
  D  model width                  F  MLP width            V  vocabulary
"""

from mor_jax.config.build import default, describe, resolve, settings, with_changes
from mor_jax.config.model import SHARING_SCHEMES, ModelConfig
from mor_jax.config.run import (
  CheckpointConfig,
  Config,
  DataConfig,
  DistillConfig,
  InitConfig,
  ParallelConfig,
  TrainConfig,
)
from mor_jax.errors import ConfigError

__all__ = [
  'SHARING_SCHEMES',
  'CheckpointConfig',
  'Config',
  'ConfigError',
  'DataConfig',
  'DistillConfig',
  'InitConfig',
  'ModelConfig',
  'ParallelConfig',
  'TrainConfig',
  'default',
  'describe',
  'resolve',
  'settings',
  'with_changes',
]
