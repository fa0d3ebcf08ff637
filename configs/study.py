"""The small-scale study: models of 1.4 to 2.7 million parameters on English prose, a few minutes a run on two cores.

  python -m benchmarks.study --source='files:CORPUS/**/*.txt'        the whole study, see there
  python -m mor_jax.train --config=configs/study.py:mor --config.data.source='files:CORPUS/**/*.txt'

All kinds are 8 layers deep: 1 + 2 x 3 + 1 with two recursions, 1 + 3 x 2 + 1 with three. A vanilla model has
2.7 M parameters, with two recursions it has 1.8 M, with three 1.4 M.
"""

from mor_jax import config as mor_config
from mor_jax.recipes import paper


def get_config(variant: str = 'mor'):
  """`configs/study.py`, `:recursive` and `:vanilla`."""
  if variant not in paper.VARIANTS:
    raise mor_config.ConfigError(
      f'configs/study.py:{variant} does not exist; use one of {", ".join(paper.VARIANTS)}'
    )
  config = mor_config.default()
  config.name = f'study-{variant}'

  config.model.kind = variant
  config.model.num_layers = 8
  config.model.num_recursions = 2
  config.model.d_model = 160
  config.model.num_heads = 5
  config.model.num_kv_heads = 5
  config.model.mlp_dim = 448
  config.model.dtype = 'float32'
  config.model.init = 'plain'  # as in the study of docs/results.md, which tells what that costs

  config.data.tokenizer = 'bpe'
  config.data.vocab_size = 1024
  config.data.seq_len = 256

  config.train.steps = 1000
  config.train.global_batch = 2
  config.train.learning_rate = 4e-3
  config.train.warmup_steps = 50
  config.train.decay_fraction = 0.4
  config.train.log_every = 10
  config.train.eval_every = 125
  config.train.eval_rows = 128
  config.train.sample_tokens = 0
  config.checkpoint.every_steps = 250
  config.checkpoint.keep = 1
  return config
