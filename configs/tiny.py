"""A tiny model for a laptop: learns Python's own documentation and sources in a few minutes on 2 cores."""

from mor_jax import config as mor_config

VARIANTS = ('mor', 'recursive', 'vanilla')


def get_config(variant: str = 'mor'):
  """`configs/tiny.py`, or `configs/tiny.py:vanilla`, `configs/tiny.py:recursive`."""
  if variant not in VARIANTS:
    raise mor_config.ConfigError(
      f'configs/tiny.py:{variant} does not exist; use one of {", ".join(VARIANTS)}'
    )
  config = mor_config.default()
  config.name = f'tiny-{variant}'

  config.model.kind = variant
  config.model.num_layers = 8
  config.model.num_recursions = 3
  config.model.d_model = 256
  config.model.num_heads = 4
  config.model.num_kv_heads = 2
  config.model.mlp_dim = 704
  config.model.dtype = 'float32'

  config.data.vocab_size = 1024
  config.data.seq_len = 256

  config.train.steps = 300
  config.train.global_batch = 16
  config.train.learning_rate = 3e-3
  config.train.warmup_steps = 20
  config.train.eval_every = 100
  config.train.log_every = 10
  config.checkpoint.every_steps = 100
  return config
