"""Pretrained models in a training run: the source of its initial weights, and its teacher."""

import dataclasses
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from mor_jax.config import Config, ConfigError, InitConfig, with_changes
from mor_jax.data.conventions import Conventions
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.interop import sources
from mor_jax.interop.continuing import SameModel
from mor_jax.interop.uptraining import SharedWeights
from mor_jax.interop.weights import Weights
from mor_jax.training import distillation
from mor_jax.training.distillation import Teacher


def with_source(config: Config, init_from: str | None) -> Config:
  """Returns the config with --init_from as `init.source`, and with its tokenizer if `data.tokenizer=source`.

  Raises:
    ConfigError: --init_from and init.source differ, or a setting needs a source and neither is set.
  """
  if init_from is not None:
    if config.init.source not in (None, init_from):
      raise ConfigError(
        f'--init_from={init_from} and --config.init.source={config.init.source} differ; give one of them'
      )
    config = with_changes(config, init={'source': init_from})
  if config.init.source is None and config.init.method != InitConfig().method:
    raise ConfigError(f'init.method={config.init.method} has no model to take layers from: give --init_from')
  if config.distill.weight and not (config.distill.teacher or config.init.source):
    raise ConfigError(
      f'distill.weight={config.distill.weight} has no teacher: give --init_from, or set distill.teacher'
    )
  if config.data.tokenizer == 'source':
    if config.init.source is None:
      raise ConfigError('data.tokenizer=source is that of init.source, which is not set: give --init_from')
    path = Path(config.init.source) / 'tokenizer.json'
    if path.parent.is_dir() and not path.exists():
      raise ConfigError(
        f'data.tokenizer=source: there is no {path}; name the tokenizer with --config.data.tokenizer, or convert the '
        f'model with mor_jax.convert, which also reads a tokenizer.model, and begin from that'
      )
    config = with_changes(config, data={'tokenizer': str(path)})
  return config


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """A model on disk, named by a setting, its tokenizer, if it has one, and the conventions of its texts."""

  flag: str
  path: str
  weights: Weights
  tokenizer: Tokenizer | None
  conventions: Conventions

  def check_tokenizer(self, config: Config, tokenizer: Tokenizer) -> None:
    """Raises ConfigError if this model has another tokenizer than the run; of one without, its users know."""
    if self.tokenizer is not None and tokenizer.digest != self.tokenizer.digest:
      raise ConfigError(
        f'data.tokenizer={config.data.tokenizer} is not the tokenizer of {self.flag}={self.path}, so that the same '
        f'ids mean other text; set --config.data.tokenizer={self.path}/tokenizer.json'
      )


def open_source(config: Config) -> Pretrained | None:
  """The model for the initial weights. Raises ConfigError if it is unreadable."""
  return _open('init.source', config.init.source)


def open_teacher(config: Config) -> Pretrained | None:
  """The teacher model. Raises ConfigError if it is unreadable."""
  if not config.distill.weight:
    return None
  flag = 'distill.teacher' if config.distill.teacher else 'init.source'
  return _open(flag, config.distill.teacher or config.init.source)


def _open(flag: str, path: str | None) -> Pretrained | None:
  return None if path is None else Pretrained(flag, path, *sources.open_model(path, flag))


def initial_weights(config: Config, source: Pretrained) -> SharedWeights | SameModel:
  """The initial weights of a run: of a vanilla model's layers, or those of the same model.

  Raises:
    ConfigError: the source is incompatible.
  """
  theirs = source.weights.config
  if _is_taken_whole(source):
    if config.init.method != InitConfig().method:
      raise ConfigError(
        f'init.method={config.init.method} picks layers of a vanilla model, and init.source={source.path} has a model of '
        f'model.kind={theirs.kind}, which is taken as it is; leave it out'
      )
    return SameModel(config.model, source.weights)
  return SharedWeights(config.model, source.weights, config.init.method, config.train.seed)


def describe(config: Config, source: Pretrained) -> str:
  """What becomes of the model, for the user."""
  return 'as it is' if _is_taken_whole(source) else f'its layers {config.init.method}'


def _is_taken_whole(source: Pretrained) -> bool:
  """Whether layers of the model share something, so that none can be picked."""
  return source.weights.config.kind != 'vanilla' or source.weights.config.kv == 'shared'


def make_teacher(config: Config, opened: Pretrained | None) -> Teacher | None:
  """The teacher without its parameters. Raises ConfigError if it is incompatible."""
  if opened is None:
    return None
  return distillation.make_teacher(config.distill, opened.weights.config, config.model)


def load_teacher(teacher: Teacher | None, opened: Pretrained | None, mesh: Mesh) -> tuple[Any, ...]:
  """The teacher's parameters on the devices, the further argument of a step; none without a teacher."""
  if teacher is None:
    return ()
  return (distillation.load_parameters(distillation.abstract_parameters(teacher, mesh), opened.weights),)
