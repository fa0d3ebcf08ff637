"""Settings shared by all training runs of the paper (arXiv 2507.10524); configs/135m.py to 1p7b.py add the sizes.

Published: batch, optimiser, schedule, warm-up and router of the released 360M runs; shapes and depths
(Tables 6 and 9); attention across the documents of a row. The learning rate is published for 360M only,
so the other sizes set their own. Micro-batch size and remat are our choice; they do not change results.
"""

from ml_collections import config_dict

from mor_jax import config as mor_config
from mor_jax.training import budget

VARIANTS = ('mor', 'recursive', 'vanilla')
SMALLEST_BUDGET = 2e18  # of the three that the paper compares models at; it sets the warm-up of all
WARMUP_FRACTION = 0.05


def training_run(size: str, variant: str, num_layers: int, **shape: int) -> config_dict.ConfigDict:
  """Settings of a run with a budget of 16.5e18 FLOPs and three recursions.

  As in the paper, the depth is rounded up until the recursions divide it (`begin`).

  Args:
    size: name of the config file, without `.py`.
    variant: one of VARIANTS.
    num_layers: depth of the vanilla model.
    **shape: further model settings, such as d_model.

  Raises:
    ConfigError: unknown variant.
  """
  config = begin(size, variant, num_layers, num_recursions=3, **shape)
  config.model.init = 'plain'  # the default starts better, but is not theirs
  config.model.vocab_size = 49152
  config.model.remat = 'full'

  config.data.vocab_size = 49152
  config.data.seq_len = 2048
  config.data.segment_mask = False

  config.train.flops_budget = 16.5e18
  config.train.global_batch = 1024
  config.train.accumulation = 16  # 64 rows at once: 16 on each of 4 GPUs, as in the released runs
  config.train.schedule = 'wsd'
  config.train.decay_fraction = 0.2
  config.train.warmup_steps = _warmup_steps(config)
  config.train.beta1, config.train.beta2 = 0.9, 0.95
  config.train.weight_decay = 0.1
  config.train.clip_norm = 1.0
  config.train.eval_rows = 500
  return config


def begin(name: str, variant: str, num_layers: int, **model) -> config_dict.ConfigDict:
  """Default settings for a variant of a vanilla model with `num_layers` layers.

  The depth is rounded up so that the recursions divide the shared layers. Depth and run name follow an
  override of `model.num_recursions`, unless `model.num_layers` or the name is overridden as well.

  Args:
    name: name of the config file, without `.py`.
    variant: one of VARIANTS.
    num_layers: depth of the vanilla model.
    **model: model settings.

  Raises:
    ConfigError: unknown variant.
  """
  if variant not in VARIANTS:
    raise mor_config.ConfigError(
      f'configs/{name}.py:{variant} does not exist; use one of {", ".join(VARIANTS)}'
    )
  config = mor_config.default()
  config.name = f'{name}-{variant}'
  config.model.update(model)
  config.model.kind = variant
  config.model.num_layers = num_layers
  if variant != 'vanilla':
    recursions = config.model.get_ref('num_recursions')
    config.model.num_layers = 2 + (num_layers - 2 + recursions - 1) // recursions * recursions
    config.name = f'{name}-{variant}-r' + recursions.to_str()
  return config


def _warmup_steps(config: config_dict.ConfigDict) -> int:
  smallest = mor_config.with_changes(
    mor_config.resolve(config), train={'flops_budget': SMALLEST_BUDGET, 'warmup_steps': 0}
  )
  return round(WARMUP_FRACTION * budget.with_budgeted_steps(smallest).train.steps)
