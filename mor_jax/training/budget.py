"""Training for a given amount of compute: converts `train.flops_budget` into a number of steps."""

import dataclasses
from collections.abc import Callable

from mor_jax.config import Config, ConfigError, ModelConfig, with_changes
from mor_jax.data import schedule
from mor_jax.model import flops
from mor_jax.training import capacities, growth, stairs

LOOKS = 20  # at how many steps a budget pays for, where their cost depends on how many there are


def paper_flops_per_token(config: Config) -> float:
  """Forward FLOPs per token of a training as the paper counts them, labels of routers included.

  A mean over the steps where recursions grow or capacities shrink.
  """
  length = config.data.seq_len

  def of_step(model: ModelConfig, recursions: int | None) -> float:
    labels = flops.paper_label_flops_per_token(model, length, recursions)
    return flops.paper_flops_per_token(model, length, recursions) + labels

  return _mean_over_steps(config, of_step)


def train_flops_per_token(config: Config) -> float:
  """`flops.train_flops_per_token` of a training, a mean over the steps where recursions grow or capacities shrink."""
  length = config.data.seq_len
  return _mean_over_steps(
    config, lambda model, recursions: flops.train_flops_per_token(model, length, recursions=recursions)
  )


def _mean_over_steps(config: Config, of_step: Callable[[ModelConfig, int | None], float]) -> float:
  """Mean over a training's steps of what depends on capacities and recursions of a step."""
  warmed, grown, steps = (
    capacities.stairs(config, stairs.MOST_PROGRAMS - 1),
    growth.stairs(config),
    config.train.steps,
  )
  firsts = sorted({first for first, _ in (*warmed, *grown) if first < steps})
  total = 0.0
  for first, end in zip(firsts, [*firsts[1:], steps], strict=True):
    own = stairs.at(warmed, first)
    model = config.model if own is None else dataclasses.replace(config.model, capacities=own)
    total += (end - first) * of_step(model, stairs.at(grown, first))
  return total / steps


def with_budgeted_steps(config: Config) -> Config:
  """Returns the config with `train.steps` set from `train.flops_budget`, or unchanged if there is no budget.

  FLOPs are counted as in the paper's comparison at equal FLOPs: the forward pass only
  (`paper_flops_per_token`). The number of steps is the budget rounded to the nearest
  step, at least 1; it replaces any `train.steps`.

  Raises:
    ConfigError: the warm-up or the batch ramp is longer than the training.
  """
  train = config.train
  if train.flops_budget is None:
    return config
  steps = train.steps
  for _ in range(LOOKS):
    guessed = dataclasses.replace(config, train=dataclasses.replace(train, steps=steps))
    flops_per_row = config.data.seq_len * paper_flops_per_token(guessed)
    before, steps = steps, schedule.of(train).steps_for(train.flops_budget / flops_per_row)
    if steps == before:
      break
  for name in ('warmup_steps', 'ramp_steps'):
    if getattr(train, name) > steps:
      raise ConfigError(
        f'train.{name}={getattr(train, name)} is more than the {steps} steps that '
        f'train.flops_budget={train.flops_budget:g} pays for; lower it, or raise the budget'
      )
  return with_changes(config, train={'steps': steps})
