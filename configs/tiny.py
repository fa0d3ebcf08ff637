"""A tiny model for two CPU cores: learns Python's own documentation and sources, byte by byte.

  python -m mor_jax.train --config=configs/tiny.py

Takes three minutes on two cores and reaches a validation loss of 2.0 nats per byte, where bigram
statistics of the same text, fitted to it, reach 2.45 (`mor`: 3.0 M parameters, 461 k bytes of text).
"""

from mor_jax import config as mor_config

VARIANTS = ('mor', 'recursive', 'vanilla')


def get_config(variant: str = 'mor'):
  """`configs/tiny.py`, or its baselines `configs/tiny.py:recursive` and `configs/tiny.py:vanilla`."""
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
  config.model.init = 'plain'  # as the authors; README shows what comes of it

  config.data.tokenizer = 'bytes'
  config.data.seq_len = 256
  config.data.validation_fraction = 0.01

  config.train.steps = 900
  config.train.global_batch = 2
  config.train.learning_rate = 2e-3
  config.train.warmup_steps = 50
  config.train.decay_fraction = 0.4
  config.train.log_every = 30
  config.train.eval_every = 450
  config.train.sample_prompt = 'def '
  config.train.sample_tokens = 160
  config.checkpoint.every_steps = 300
  return config
