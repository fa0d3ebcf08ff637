"""Training for a given amount of compute: the steps that `train.flops_budget` pays for."""

from mor_jax.config import Config, ConfigError, with_changes
from mor_jax.data import schedule
from mor_jax.model import flops


def with_budgeted_steps(config: Config) -> Config:
  """The config with `train.steps` as `train.flops_budget` sets them; the same config if there is no budget.

  The budget counts as the paper does when it compares models at equal FLOPs: forward only
  (`flops.paper_flops_per_token`). The steps are the nearest number to what it pays for, at
  least 1, whatever `train.steps` was before.

  Raises:
    ConfigError: the warm-up is longer than that.
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
