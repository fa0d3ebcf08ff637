"""What a training is given: data, and the models that it begins and learns from. Together they decide the vocabulary."""

import dataclasses
from collections.abc import Callable

from mor_jax.config import Config, ConfigError, with_changes
from mor_jax.data import loader
from mor_jax.interop import pretrained
from mor_jax.interop.pretrained import Pretrained
from mor_jax.training.distillation import Teacher


@dataclasses.dataclass(frozen=True)
class Inputs:
  """What a training is given.

  Attributes:
    config: its settings, with `model.vocab_size` filled in.
    dataset: rows and tokenizer.
    source: the model whose layers it begins with; None: random weights, or those of a checkpoint.
    teacher: the model that it learns from, if any, without its parameters.
    teacher_source: where those are.
  """

  config: Config
  dataset: loader.Dataset
  source: Pretrained | None
  teacher: Teacher | None
  teacher_source: Pretrained | None


def open_inputs(config: Config, resumes: bool, report: Callable[[str], None]) -> Inputs:
  """Opens data and models, and checks that they belong together; prepares the data where it is missing.

  Args:
    resumes: the run has a checkpoint, so that it begins with no other model.
    report: shows a line to the user.

  Raises:
    ConfigError: something cannot be read, or does not fit the rest.
  """
  source = None if resumes else pretrained.open_source(config)
  teacher_source = pretrained.open_teacher(config)
  if source is not None:
    vocab_size = config.model.vocab_size or source.weights.config.vocab_size
    config = with_changes(config, model={'vocab_size': vocab_size})
    pretrained.initial_weights(config, source)  # checks shapes
  dataset = loader.open_dataset(config.data, report=report)
  for opened in (source, teacher_source):
    if opened is not None:
      opened.check_tokenizer(config, dataset.tokenizer)
  config = with_changes(config, data={'begin': dataset.tokenizer.begin})
  config = _with_vocabulary(config, dataset.tokenizer.vocab_size)
  return Inputs(config, dataset, source, pretrained.make_teacher(config, teacher_source), teacher_source)


def _with_vocabulary(config: Config, tokenizer_size: int) -> Config:
  """The config with `model.vocab_size` filled in."""
  size = config.model.vocab_size or tokenizer_size
  if size < tokenizer_size:
    raise ConfigError(
      f'model.vocab_size={size} is too small for the tokenizer, whose largest id is {tokenizer_size - 1}; '
      f'leave it unset or set it to at least {tokenizer_size}'
    )
  return with_changes(config, model={'vocab_size': size})
