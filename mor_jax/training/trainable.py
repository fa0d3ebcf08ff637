"""The parameters that a training changes, and those that stay as they are (`train.trainable`).

The optimiser is handed the first only, and gradients are taken of the loss as a function of them: of frozen
parameters there is no moment, no decay and no gradient, neither in memory nor in a norm.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn
from flax import traverse_util

from mor_jax.config import Config, ConfigError, ModelConfig, TrainConfig
from mor_jax.config.trainable import patterns
from mor_jax.config.trainable import stages as stages_of
from mor_jax.model import flops
from mor_jax.model.transformer import abstract_variables, parameter_axes

_FEW = 40  # paths that an error lists


def is_trained(trainable: str, path: str) -> bool:
  """Whether the parameter of this path, 'block/attention/query/kernel', is among those that are trained."""
  return any(pattern.search(path) for pattern in patterns(trainable).values())


def split(trainable: str, params: Any) -> tuple[Any, Any]:
  """(what is trained, what is frozen) of a tree of parameters, each without the other's leaves."""
  flat = traverse_util.flatten_dict(params, sep='/')
  parts = ({}, {})
  for path, leaf in flat.items():
    parts[not is_trained(trainable, path)][path] = leaf
  trained, frozen = (traverse_util.unflatten_dict(part, sep='/') for part in parts)
  return trained, frozen


def merge(trained: Any, frozen: Any) -> Any:
  """The tree that `split` has split."""
  flat = [traverse_util.flatten_dict(part, sep='/') for part in (trained, frozen)]
  return traverse_util.unflatten_dict(flat[0] | flat[1], sep='/')


def count_parameters(model: ModelConfig, trainable: str) -> int:
  """Numbers that are trained."""
  if trainable == 'all':
    return flops.count_parameters(model).total
  params = nn.unbox(abstract_variables(model)['params'])
  return sum(leaf.size for leaf in jax.tree.leaves(split(trainable, params)[0]))


def past_stages(train: TrainConfig, done: int) -> list[str]:
  """What was trained in each stage that has begun after `done` updates; the last is under way."""
  return [trainable for first, trainable in stages_of(train) if first <= done]


def since(past: Sequence[str], path: str) -> int | None:
  """The stage from which on a parameter has been trained without a break; None if the last does not train it."""
  first = None
  for number in reversed(range(len(past))):
    if not is_trained(past[number], path):
      break
    first = number
  return first


def check(config: Config) -> None:
  """Raises ConfigError if a pattern of `train.trainable` finds no parameter, or a stage is shorter than a step.

  The number of steps must be known. Models of which everything is trained are not looked at.
  """
  train = config.train
  planned = stages_of(train)
  ends = [*(first for first, _ in planned[1:]), train.steps]
  for (first, trainable), end in zip(planned, ends, strict=True):
    if end <= first:
      raise ConfigError(
        f'train.stages={train.stages} gives {trainable} none of the train.steps={train.steps} steps; raise its '
        f'share, or train.steps'
      )
  if all(trainable == 'all' for _, trainable in planned):
    return
  # The names of parameters do not depend on the vocabulary, which may not be known yet.
  paths = sorted(parameter_axes(dataclasses.replace(config.model, vocab_size=config.model.vocab_size or 2)))
  for _, trainable in planned:
    for entry, pattern in patterns(trainable).items():
      if not any(map(pattern.search, paths)):
        more = f' and {len(paths) - _FEW} more' if len(paths) > _FEW else ''
        raise ConfigError(
          f'train.{"trainable" if train.stages is None else "stages"}={train.stages or trainable}: {entry} matches no '
          f'parameter; use all, routers, lora, block, or regular expressions that find something in '
          f'{", ".join(paths[:_FEW])}{more}'
        )
