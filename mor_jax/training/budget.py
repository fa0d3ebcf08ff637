"""Training for a given amount of compute: the steps that `train.flops_budget` pays for."""

from mor_jax.config import Config, ConfigError
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
  tokens_per_step = train.global_batch * config.data.seq_len
  flops_per_step = tokens_per_step * flops.paper_flops_per_token(config.model, config.data.seq_len)
  steps = max(1, round(train.flops_budget / flops_per_step))
  if train.warmup_steps > steps:
    raise ConfigError(
      f'train.warmup_steps={train.warmup_steps} is more than the {steps} steps that '
      f'train.flops_budget={train.flops_budget:g} pays for; lower it, or raise the budget'
    )
  return config.replace(train={'steps': steps})
