"""Rules that a `Config` must satisfy before anything is read, written or compiled."""

import dataclasses
import itertools
from typing import Any

from mor_jax.config.model import ModelConfig
from mor_jax.config.run import (
  CheckpointConfig,
  Config,
  DataConfig,
  DistillConfig,
  ParallelConfig,
  TrainConfig,
)
from mor_jax.errors import ConfigError

SPECIAL_AND_BYTE_TOKENS = 257  # every byte, end of text
MOST_LAYERS, LARGEST = 10_000, 2**24  # what lies above was not meant, and would take a machine down
SEEDS = 2**32


def validate(config: Config) -> None:
  """Raises ConfigError for the first flag that cannot work. Names its value and what is allowed."""
  _check_choices(config)
  _validate_model(config.model)
  _validate_data(config.data)
  _validate_train(config.train)
  _validate_ramp(config)
  _validate_distill(config.distill)
  _validate_checkpoint(config.checkpoint)
  _validate_parallel(config.parallel)
  is_name = bool(config.name) and '/' not in config.name and config.name not in ('.', '..')
  _require(is_name, 'name', repr(config.name), 'the name of a folder: a word without "/"')


def _validate_checkpoint(checkpoint: CheckpointConfig) -> None:
  for name in ('every_steps', 'keep', 'keep_every'):
    value = getattr(checkpoint, name)
    _require(value is None or value >= 1, f'checkpoint.{name}', value, '>= 1')
  _require(checkpoint.keep_best >= 0, 'checkpoint.keep_best', checkpoint.keep_best, '>= 0')
  unsaved, every = checkpoint.max_unsaved_steps, checkpoint.every_steps
  allowed = f'at least checkpoint.every_steps={every}, or none'
  _require(unsaved is None or unsaved >= every, 'checkpoint.max_unsaved_steps', unsaved, allowed)
  minutes = checkpoint.every_minutes
  _require(minutes is None or minutes > 0, 'checkpoint.every_minutes', minutes, '> 0')


def _validate_distill(distill: DistillConfig) -> None:
  _require(distill.weight >= 0, 'distill.weight', distill.weight, '>= 0')
  _require(distill.temperature > 0, 'distill.temperature', distill.temperature, '> 0')
  if distill.top_k is not None:
    _require(distill.top_k >= 1, 'distill.top_k', distill.top_k, '>= 1')
  idle = [
    f'distill.{field.name}={getattr(distill, field.name)}'
    for field in dataclasses.fields(distill)
    if getattr(distill, field.name) != field.default
  ]
  if idle and not distill.weight:
    raise ConfigError(f'{", ".join(idle)} has no effect with distill.weight=0; set a weight, such as 1')


def _validate_parallel(parallel: ParallelConfig) -> None:
  sizes = dataclasses.asdict(parallel)
  for name, size in sizes.items():
    _require(size >= 1 or size == -1, f'parallel.{name}', size, '>= 1, or -1 to fill')
  for prefix, names in (('', ('replica', 'fsdp', 'tensor')), ('dcn_', ('dcn_replica', 'dcn_fsdp'))):
    filled = [name for name in names if sizes[name] == -1]
    if len(filled) > 1:
      where = 'over slices' if prefix else 'within a slice'
      raise ConfigError(
        f'parallel.{filled[0]}=-1 and parallel.{filled[1]}=-1 cannot both fill what is left {where}; '
        f'set one of them to a number'
      )


def _require(condition: bool, flag: str, value: Any, allowed: str) -> None:
  if not condition:
    raise ConfigError(f'{flag}={value} is not allowed: must be {allowed}')


def _check_choices(config: Config) -> None:
  for section in dataclasses.fields(config):
    value = getattr(config, section.name)
    if not dataclasses.is_dataclass(value):
      continue
    for field in dataclasses.fields(value):
      choices, chosen = field.metadata['choices'], getattr(value, field.name)
      if choices and chosen not in choices:
        raise ConfigError(f'{section.name}.{field.name}={chosen!r} is not one of {", ".join(choices)}')


def _validate_model(model: ModelConfig) -> None:
  for name in ('num_layers', 'd_model', 'num_heads', 'num_kv_heads', 'mlp_dim', 'num_recursions', 'head_dim'):
    most, value = MOST_LAYERS if name in ('num_layers', 'num_recursions') else LARGEST, getattr(model, name)
    _require(value is None or 1 <= value <= most, f'model.{name}', value, f'from 1 to {most:,}')
  if model.vocab_size is not None:
    _require(2 <= model.vocab_size <= LARGEST, 'model.vocab_size', model.vocab_size, f'from 2 to {LARGEST:,}')
  for name in (
    'rope_theta',
    'rope_scaling_factor',
    'rope_original_length',
    'norm_epsilon',
    'router_temperature',
    'gate_scale',
    'threshold_slack',
  ):
    _require(getattr(model, name) > 0, f'model.{name}', getattr(model, name), '> 0')
  for name in (
    'init_std',
    'aux_loss_weight',
    'router_z_loss_weight',
    'balancing_loss_weight',
    'lora_rank',
    'lora_alpha',
    'bias_update_rate',
    'capacity_warmup_steps',
    'balance_warmup_steps',
  ):
    _require(getattr(model, name) >= 0, f'model.{name}', getattr(model, name), '>= 0')
  _require(0 <= model.ema_decay < 1, 'model.ema_decay', model.ema_decay, 'in [0, 1)')
  _validate_heads(model)
  low, high = model.rope_low_frequency_factor, model.rope_high_frequency_factor
  _require(
    0 < low < high, 'model.rope_low_frequency_factor', low, f'between 0 and rope_high_frequency_factor={high}'
  )
  if model.recursion_encoding and model.sharing.endswith('sequence'):
    raise ConfigError(
      f'model.recursion_encoding=True marks the passes over the shared block, which '
      f'model.sharing={model.sharing!r} does not make; use cycle or middle_cycle'
    )
  if model.kind == 'vanilla' and (model.lora_rank or model.recursion_encoding or not model.share_norms):
    raise ConfigError(
      f'model.lora_rank={model.lora_rank}, model.recursion_encoding={model.recursion_encoding} and '
      f'model.share_norms={model.share_norms} relax shared layers, which model.kind=vanilla does not have; '
      f'use 0, False and True'
    )
  if model.random_gate is not None and not (model.kind == 'mor' and model.random_router):
    raise ConfigError(
      f'model.random_gate={model.random_gate} is for model.random_router=True; leave it unset, or set that too'
    )
  if model.kind != 'vanilla' or model.kv == 'shared':
    _validate_sharing(model)
  if model.kind == 'mor':
    _validate_routing(model)
  _validate_kv(model)


def _validate_heads(model: ModelConfig) -> None:
  if model.head_dim is None and model.d_model % model.num_heads:
    raise ConfigError(
      f'model.d_model={model.d_model} is not a multiple of model.num_heads={model.num_heads}; '
      f'change one of them or set model.head_dim'
    )
  if model.num_heads % model.num_kv_heads:
    divisors = [k for k in range(1, model.num_heads + 1) if model.num_heads % k == 0]
    raise ConfigError(
      f'model.num_kv_heads={model.num_kv_heads} does not divide model.num_heads={model.num_heads}; '
      f'use one of {", ".join(map(str, divisors))}'
    )
  if model.head_width < 2 or model.head_width % 2:
    raise ConfigError(
      f'model.head_dim={model.head_width} is not allowed: rotary embeddings need an even head width >= 2'
    )


def _validate_sharing(model: ModelConfig) -> None:
  ends, steps = 2 * model.unique_ends, model.num_recursions
  shared = model.num_layers - ends
  if shared < 1:
    raise ConfigError(
      f'model.num_layers={model.num_layers} is too small for model.sharing={model.sharing!r}: it keeps the '
      f'first and the last layer unique and needs at least 3 layers'
    )
  if shared % steps == 0:
    return
  below, above = ends + shared // steps * steps, ends + (shared // steps + 1) * steps
  depths = f'{below} or {above}' if below > ends else f'{above}'
  divisors = ', '.join(str(r) for r in range(1, shared + 1) if shared % r == 0)
  raise ConfigError(
    f'model.num_recursions={steps} does not divide the {shared} shared layers of '
    f'model.sharing={model.sharing!r} with model.num_layers={model.num_layers}; '
    f'set model.num_layers to {depths}, or model.num_recursions to one of {divisors}'
  )


def _validate_routing(model: ModelConfig) -> None:
  if model.sharing.endswith('sequence'):
    raise ConfigError(
      f'model.sharing={model.sharing!r} cannot be used with model.kind=mor: a recursion must be one pass '
      f'over the whole shared block; use cycle or middle_cycle'
    )
  (_validate_expert_choice if model.router == 'expert_choice' else _validate_token_choice)(model)


def _validate_expert_choice(model: ModelConfig) -> None:
  _refuse_activation(model, ('sigmoid', 'tanh', 'identity'))
  if model.balance_warmup_steps:
    raise ConfigError(
      f'model.balance_warmup_steps={model.balance_warmup_steps} is for model.router=token_choice; '
      f'with expert_choice set model.capacity_warmup_steps'
    )
  if model.token_capacity_factor is not None:
    raise ConfigError(
      f'model.token_capacity_factor={model.token_capacity_factor} is for model.router=token_choice; '
      f'with expert_choice set model.capacities'
    )
  if model.selection == 'ema_threshold' and model.causality == 'aux_router':
    raise ConfigError(
      'model.selection=ema_threshold and model.causality=aux_router both decide which tokens enter when the '
      'future is unknown; use causality=aux_loss or none, or selection=top_k'
    )
  if model.random_router and (model.causality != 'none' or model.selection == 'ema_threshold'):
    raise ConfigError(
      'model.random_router=True chooses by noise, which nothing can learn to predict; set '
      'model.causality=none and model.selection=top_k'
    )
  capacities = model.capacities
  if capacities is None:
    return
  if len(capacities) != model.num_recursions:
    raise ConfigError(
      f'model.capacities={capacities} has {len(capacities)} entries; '
      f'model.num_recursions={model.num_recursions} needs one for each recursion'
    )
  if not all(0 < c <= 1 for c in capacities):
    raise ConfigError(f'model.capacities={capacities} is not allowed: each must be above 0 and at most 1')
  if any(later > earlier for earlier, later in itertools.pairwise(capacities)):
    raise ConfigError(
      f'model.capacities={capacities} rises: a token that left cannot return, so no recursion may '
      f'take more tokens than the one before; sort them downwards'
    )


def _validate_token_choice(model: ModelConfig) -> None:
  _refuse_activation(model, ('softmax', 'sigmoid'))
  if model.capacity_warmup_steps:
    raise ConfigError(
      f'model.capacity_warmup_steps={model.capacity_warmup_steps} is for model.router=expert_choice; '
      f'with token_choice set model.balance_warmup_steps'
    )
  if model.selection != 'top_k':
    raise ConfigError(
      f'model.selection={model.selection} is for model.router=expert_choice; with token_choice leave it at top_k'
    )
  if model.random_router and model.balancing != 'none':
    raise ConfigError(
      f'model.balancing={model.balancing} has nothing to balance with model.random_router=True, which chooses '
      f'all depths equally often; set model.balancing=none'
    )
  if model.capacities is not None:
    raise ConfigError(
      f'model.capacities={model.capacities} cannot be set with model.router=token_choice, where tokens '
      f'choose their depth themselves; to limit a recursion set model.token_capacity_factor'
    )
  if model.token_capacity_factor is not None:
    _require(
      model.token_capacity_factor >= 1,
      'model.token_capacity_factor',
      model.token_capacity_factor,
      '>= 1, the size of a balanced load',
    )
  if model.gating == 'residual':
    raise ConfigError(
      'model.gating=residual is for model.router=expert_choice; with token_choice use weighted or additive'
    )
  if model.gating == 'additive' and model.token_gating == 'every_step':
    raise ConfigError(
      'model.token_gating=every_step has no gate to apply with model.gating=additive; use weighted'
    )


def _refuse_activation(model: ModelConfig, allowed: tuple[str, ...]) -> None:
  if model.squash not in allowed:
    raise ConfigError(
      f'model.router_activation={model.router_activation} cannot be used with model.router={model.router}; '
      f'use one of auto, {", ".join(allowed)}'
    )


def _validate_kv(model: ModelConfig) -> None:
  if model.kv == 'recursion_wise':
    return
  if model.kv == 'hybrid' and (model.kind != 'mor' or model.router != 'expert_choice'):
    raise ConfigError(
      'model.kv=hybrid overwrites shared keys and values at the tokens that an expert-choice router '
      'selects; it needs model.kind=mor and model.router=expert_choice'
    )
  if model.step_capacities[0] != 1.0:
    raise ConfigError(
      f'model.kv={model.kv!r} needs keys and values of all tokens from the first recursion, but '
      f'model.capacities={model.capacities} begins below 1; set the first capacity to 1.0'
    )


def _validate_data(data: DataConfig) -> None:
  _require(data.seq_len >= 2, 'data.seq_len', data.seq_len, '>= 2, since a token is predicted from another')
  _require(
    0 < data.validation_fraction < 1, 'data.validation_fraction', data.validation_fraction, 'in (0, 1)'
  )
  _require(0 <= data.seed < SEEDS, 'data.seed', data.seed, 'from 0 to 2**32 - 1')
  _require(data.begin != '', 'data.begin', repr(data.begin), 'a token of the vocabulary, auto or none')
  _require(data.prefetch >= 0, 'data.prefetch', data.prefetch, '>= 0')
  _require(0 <= data.max_bad_fraction <= 1, 'data.max_bad_fraction', data.max_bad_fraction, 'in [0, 1]')
  unknown = data.max_unknown_fraction
  _require(0 <= unknown <= 1, 'data.max_unknown_fraction', unknown, 'in [0, 1]')
  _require(bool(data.text_key), 'data.text_key', repr(data.text_key), 'a non-empty name')
  _require(bool(data.separator), 'data.separator', repr(data.separator), 'a token of the vocabulary')
  _require(bool(data.tokenizer), 'data.tokenizer', repr(data.tokenizer), 'bpe, bytes, a path or a name')
  if data.workers is not None:
    _require(data.workers >= 1, 'data.workers', data.workers, '>= 1')
  if data.tokenizer == 'bpe':
    _require(
      data.vocab_size >= SPECIAL_AND_BYTE_TOKENS,
      'data.vocab_size',
      data.vocab_size,
      f'>= {SPECIAL_AND_BYTE_TOKENS}: 256 bytes and end of text',
    )
  _validate_live(data)
  if data.max_documents is not None:
    _require(data.max_documents >= 2, 'data.max_documents', data.max_documents, '>= 2, to have both splits')


def _validate_live(data: DataConfig) -> None:
  _require(data.live_validation_rows >= 1, 'data.live_validation_rows', data.live_validation_rows, '>= 1')
  if not data.live:
    return
  if data.tokenizer == 'bpe':
    raise ConfigError(
      "data.live=True reads documents while training, so that data.tokenizer='bpe' has nothing to be trained "
      'on; use bytes, the path of a tokenizer.json, or a name on the hub'
    )
  if data.source.startswith('prepared:'):
    raise ConfigError(f'data.live=True with data.source={data.source}: prepared rows need no live path')
  if data.validation_fraction == 0:
    raise ConfigError('data.live=True needs a data.validation_fraction above 0, to have rows for validation')


def _validate_train(train: TrainConfig) -> None:
  for name in ('steps', 'global_batch', 'accumulation', 'log_every'):
    _require(getattr(train, name) >= 1, f'train.{name}', getattr(train, name), '>= 1')
  _require(0 <= train.seed < SEEDS, 'train.seed', train.seed, 'from 0 to 2**32 - 1')
  for name in (
    'warmup_steps',
    'ramp_steps',
    'eval_every',
    'sample_tokens',
    'final_learning_rate',
    'weight_decay',
  ):
    _require(getattr(train, name) >= 0, f'train.{name}', getattr(train, name), '>= 0')
  for name in ('spike_zscore', 'hang_seconds'):
    _require(getattr(train, name) >= 0, f'train.{name}', getattr(train, name), '>= 0')
  if train.exit_on_hang and not train.hang_seconds:
    raise ConfigError(
      'train.exit_on_hang=True needs a limit: set train.hang_seconds to the longest time that a step may take'
    )
  _require(
    train.max_skipped >= 1, 'train.max_skipped', train.max_skipped, '>= 1 (on_nonfinite=halt skips none)'
  )
  _require(train.sample_temperature >= 0, 'train.sample_temperature', train.sample_temperature, '>= 0')
  for name in ('learning_rate', 'adam_epsilon', 'clip_norm'):
    _require(getattr(train, name) > 0, f'train.{name}', getattr(train, name), '> 0')
  for name in ('beta1', 'beta2'):
    _require(0 <= getattr(train, name) < 1, f'train.{name}', getattr(train, name), 'in [0, 1)')
  _require(0 <= train.decay_fraction <= 1, 'train.decay_fraction', train.decay_fraction, 'in [0, 1]')
  if train.sample_tokens:
    _require(bool(train.sample_prompt), 'train.sample_prompt', repr(train.sample_prompt), 'a non-empty text')
  if train.eval_rows is not None:
    _require(train.eval_rows >= 1, 'train.eval_rows', train.eval_rows, '>= 1')
  if train.loss_chunk is not None:
    _require(train.loss_chunk >= 0, 'train.loss_chunk', train.loss_chunk, '>= 0')
  if train.global_batch % train.accumulation:
    raise ConfigError(
      f'train.accumulation={train.accumulation} does not divide train.global_batch={train.global_batch}'
    )
  if train.flops_budget is not None:  # it decides on the steps later (training/budget.py)
    _require(train.flops_budget > 0, 'train.flops_budget', train.flops_budget, '> 0')
    return
  for name in ('warmup_steps', 'ramp_steps'):
    if getattr(train, name) > train.steps:
      raise ConfigError(
        f'train.{name}={getattr(train, name)} is more than train.steps={train.steps}; lower it'
      )


def _validate_ramp(config: Config) -> None:
  train = config.train
  if (train.ramp_batch is None) != (train.ramp_steps == 0):
    raise ConfigError(
      f'train.ramp_batch={train.ramp_batch} and train.ramp_steps={train.ramp_steps} belong together: '
      f'set both, or neither (none and 0)'
    )
  if train.ramp_batch is None:
    return
  micro_rows = train.global_batch // train.accumulation
  sizes = [train.global_batch]
  while sizes[0] % 2 == 0 and sizes[0] // 2 % micro_rows == 0:
    sizes.insert(0, sizes[0] // 2)
  # The programs of ramp and warm-up together are few enough to compile (training/phases.py).
  sizes = sizes[:-1][-4:] if config.model.capacity_warmup_steps else sizes[:-1][-7:]
  if train.ramp_batch not in sizes:
    allowed = f'use one of {", ".join(map(str, sizes))}' if sizes else 'raise train.accumulation'
    raise ConfigError(
      f'train.ramp_batch={train.ramp_batch} cannot double to train.global_batch={train.global_batch} in '
      f'micro-batches of {micro_rows} rows (train.accumulation={train.accumulation}); {allowed}'
    )
  doublings = (train.global_batch // train.ramp_batch).bit_length() - 1
  _require(train.ramp_steps >= doublings, 'train.ramp_steps', train.ramp_steps, f'>= {doublings}')
