"""The tiny vanilla model of configs/tiny.py, uptrained to a MoR model of two recursions: the whole way in minutes.

python -m mor_jax.train --config=configs/tiny.py:vanilla
python -m mor_jax.train --config=configs/uptrain_tiny.py --init_from=runs/tiny-vanilla
"""

from mor_jax.recipes import uptraining as uptraining_defaults


def get_config(variant: str = 'mor'):
  """`configs/uptrain_tiny.py`, or its `:recursive` and `:vanilla`."""
  config = uptraining_defaults.uptraining_run(
    'uptrain_tiny',
    variant,
    num_layers=8,
    steps=300,
    d_model=256,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=704,
    dtype='float32',
  )
  config.data.seq_len = 256
  config.data.validation_fraction = 0.01
  config.train.global_batch = 2
  config.train.log_every = 30
  config.train.eval_every = 150
  config.train.sample_prompt = 'def '
  config.train.sample_tokens = 160
  config.checkpoint.every_steps = 150
  return config
