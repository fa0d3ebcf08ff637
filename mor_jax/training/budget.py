"""Training for a given amount of compute: converts `train.flops_budget` into a number of steps."""

from mor_jax.config import Config, ConfigError, with_changes
from mor_jax.data import schedule
from mor_jax.model import flops


def with_budgeted_steps(config: Config) -> Config:
  """Returns the config with `train.steps` set from `train.flops_budget`, or unchanged if there is no budget.

  FLOPs are counted as in the paper's comparison at equal FLOPs: the forward pass only
  (`flops.paper_flops_per_token`). The number of steps is the budget rounded to the nearest
  step, at least 1; it replaces any `train.steps`.

  Raises:
    ConfigError: the warm-up or the batch ramp is longer than the training.
  """
  train = config.train
  if train.flops_budget is None:
    return config
  flops_per_row = config.data.seq_len * flops.paper_flops_per_token(config.model, config.data.seq_len)
  steps = schedule.of(train).steps_for(train.flops_budget / flops_per_row)
  for name in ('warmup_steps', 'ramp_steps'):
    if getattr(train, name) > steps:
      raise ConfigError(
        f'train.{name}={getattr(train, name)} is more than the {steps} steps that '
        f'train.flops_budget={train.flops_budget:g} pays for; lower it, or raise the budget'
      )
  return with_changes(config, train={'steps': steps})
