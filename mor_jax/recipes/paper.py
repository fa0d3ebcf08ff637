"""What all training runs of the paper have in common (arXiv 2507.10524); configs/135m.py to 1p7b.py are its sizes.

Published: batch, optimiser, schedule, warm-up and router of the released 360M runs; shapes and depths
(Tables 6 and 9); that documents of a row see one another. Learning rates are published for 360M
alone, so the other sizes state their own. Rows at once and remat are ours: they change no result.
"""

from ml_collections import config_dict

from mor_jax import config as mor_config
from mor_jax.training import budget

VARIANTS = ('mor', 'recursive', 'vanilla')
SMALLEST_BUDGET = 2e18  # of the three that the paper compares models at; it sets the warm-up of all
WARMUP_FRACTION = 0.05


def training_run(size: str, variant: str, num_layers: int, **shape: int) -> config_dict.ConfigDict:
  """Settings of a run of 16.5e18 FLOPs, with three recursions.

  Depths are raised to what the recursions divide (`begin`), as the paper does.

  Args:
    size: name of the config file, without `.py`.
    variant: one of VARIANTS.
    num_layers: depth of the vanilla model.
    **shape: further settings of the model, such as d_model.

  Raises:
    ConfigError: unknown variant.
  """
  config = begin(size, variant, num_layers, num_recursions=3, **shape)
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
  """Defaults for a variant of a vanilla model of `num_layers`, whose recursions may be overridden.

  An override of `model.num_recursions` raises the depth to the next that the recursions divide, unless
  `model.num_layers` is overridden too; it also renames the run.

  Args:
    name: of the config file, without `.py`.
    variant: one of VARIANTS.
    **model: settings of the model.

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
