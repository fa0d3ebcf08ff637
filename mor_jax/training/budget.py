"""Training for a given amount of compute: converts `train.flops_budget` into a number of steps."""

from mor_jax.config import Config, ConfigError, with_changes
from mor_jax.data import schedule
from mor_jax.model import flops
from mor_jax.training import growth


def paper_flops_per_token(config: Config) -> float:
  """Forward FLOPs per token of a training as the paper counts them, labels of routers included.

  A mean over the steps where recursions grow.
  """
  model, length = config.model, config.data.seq_len

  def of_step(recursions: int | None) -> float:
    labels = flops.paper_label_flops_per_token(model, length, recursions)
    return flops.paper_flops_per_token(model, length, recursions) + labels

  return growth.mean_over(config, of_step)


def train_flops_per_token(config: Config) -> float:
  """`flops.train_flops_per_token` of a training, a mean over the steps where recursions grow."""
  model, length = config.model, config.data.seq_len
  return growth.mean_over(
    config, lambda recursions: flops.train_flops_per_token(model, length, recursions=recursions)
  )


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
  flops_per_row = config.data.seq_len * paper_flops_per_token(config)
  steps = schedule.of(train).steps_for(train.flops_budget / flops_per_row)
  for name in ('warmup_steps', 'ramp_steps'):
    if getattr(train, name) > steps:
      raise ConfigError(
        f'train.{name}={getattr(train, name)} is more than the {steps} steps that '
        f'train.flops_budget={train.flops_budget:g} pays for; lower it, or raise the budget'
      )
  return with_changes(config, train={'steps': steps})
