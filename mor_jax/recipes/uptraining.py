"""What trainings that begin from a pretrained model have in common; configs/uptrain_*.py are its models (docs/uptraining.md)."""

from ml_collections import config_dict

from mor_jax.recipes import paper

LEARNING_RATE = 5e-4  # a pretrained model at the peak rate of its own training unlearns first
WARMUP_FRACTION = 0.05
ROUTER_STD = 2e-3  # of fresh routers, which see a residual stream of large norm; all else is the original's


def uptraining_run(name: str, variant: str, num_layers: int, steps: int, **shape) -> config_dict.ConfigDict:
  """Settings of a training of `steps` that begins from a vanilla model of `num_layers`, with two recursions.

  Depths are raised to what the recursions divide (`paper.begin`).
  A MoR model begins near the original: gates are the paper's residual form around 1, and capacities fall
  from 1 within the first third.

  Args:
    name: of the run and the config file, without `.py`.
    variant: one of `paper.VARIANTS`.
    **shape: further settings of the model, which must be the original's.

  Raises:
    ConfigError: unknown variant.
  """
  config = paper.begin(name, variant, num_layers, **shape)
  if variant == 'mor':
    config.model.gating = 'residual'
    config.model.router_alpha = 2.0
    config.model.init_std = ROUTER_STD
    config.model.capacity_warmup_steps = steps // 3
  config.data.tokenizer = 'source'
  config.train.steps = steps
  config.train.learning_rate = LEARNING_RATE
  config.train.warmup_steps = max(1, round(WARMUP_FRACTION * steps))
  return config
