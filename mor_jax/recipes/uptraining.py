"""Settings shared by all uptraining runs (docs/uptraining.md); configs/uptrain_*.py add the pretrained models."""

from ml_collections import config_dict

from mor_jax.recipes import paper

LEARNING_RATE = 5e-4  # a pretrained model at the peak rate of its own training unlearns first
WARMUP_FRACTION = 0.05
ROUTER_STD = 2e-3  # of fresh routers, which see a residual stream of large norm; all else is the original's

SMOLLM2_135M = {
  'num_layers': 30,
  'vocab_size': 49152,
  'd_model': 576,
  'num_heads': 9,
  'num_kv_heads': 3,
  'mlp_dim': 1536,
  'rope_theta': 100000.0,
}
"""Its shape, as `uptraining_run` takes it."""


def uptraining_run(name: str, variant: str, num_layers: int, steps: int, **shape) -> config_dict.ConfigDict:
  """Settings of an uptraining run from a pretrained vanilla model, with two recursions.

  The depth is rounded up until the recursions divide it (`paper.begin`). A MoR model starts close to the
  pretrained one: the gates have the paper's residual form around 1, and the capacities fall from 1 over
  the first third of the training.

  Args:
    name: name of the run and of the config file, without `.py`.
    variant: one of `paper.VARIANTS`.
    num_layers: depth of the pretrained model.
    steps: length of the training.
    **shape: further model settings; they must match the pretrained model.

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
