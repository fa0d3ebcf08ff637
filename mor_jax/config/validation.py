"""Rules that a `Config` must satisfy before anything is read, written or compiled."""

import dataclasses

from mor_jax.config.model_rules import validate_model
from mor_jax.config.requirement import require
from mor_jax.config.run import (
  CheckpointConfig,
  Config,
  DataConfig,
  DistillConfig,
  ParallelConfig,
  TrainConfig,
)
from mor_jax.config.trainable import validate_trainable
from mor_jax.errors import ConfigError

SPECIAL_AND_BYTE_TOKENS = 257  # every byte, end of text
SEEDS = 2**32


def validate(config: Config) -> None:
  """Raises ConfigError for the first flag that cannot work. Names its value and what is allowed."""
  _check_choices(config)
  validate_model(config.model)
  _validate_data(config.data)
  _validate_train(config.train)
  _validate_ramp(config)
  _validate_recursions(config)
  validate_trainable(config)
  _validate_distill(config.distill)
  _validate_checkpoint(config.checkpoint)
  _validate_parallel(config.parallel)
  is_name = bool(config.name) and '/' not in config.name and config.name not in ('.', '..')
  require(is_name, 'name', repr(config.name), 'the name of a folder: a word without "/"')


def _validate_checkpoint(checkpoint: CheckpointConfig) -> None:
  for name in ('every_steps', 'keep', 'keep_every'):
    value = getattr(checkpoint, name)
    require(value is None or value >= 1, f'checkpoint.{name}', value, '>= 1')
  require(checkpoint.keep_best >= 0, 'checkpoint.keep_best', checkpoint.keep_best, '>= 0')
  unsaved, every = checkpoint.max_unsaved_steps, checkpoint.every_steps
  allowed = f'at least checkpoint.every_steps={every}, or none'
  require(unsaved is None or unsaved >= every, 'checkpoint.max_unsaved_steps', unsaved, allowed)
  minutes = checkpoint.every_minutes
  require(minutes is None or minutes > 0, 'checkpoint.every_minutes', minutes, '> 0')


def _validate_distill(distill: DistillConfig) -> None:
  require(distill.weight >= 0, 'distill.weight', distill.weight, '>= 0')
  require(distill.temperature > 0, 'distill.temperature', distill.temperature, '> 0')
  if distill.top_k is not None:
    require(distill.top_k >= 1, 'distill.top_k', distill.top_k, '>= 1')
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
    require(size >= 1 or size == -1, f'parallel.{name}', size, '>= 1, or -1 to fill')
  for prefix, names in (('', ('replica', 'fsdp', 'tensor')), ('dcn_', ('dcn_replica', 'dcn_fsdp'))):
    filled = [name for name in names if sizes[name] == -1]
    if len(filled) > 1:
      where = 'over slices' if prefix else 'within a slice'
      raise ConfigError(
        f'parallel.{filled[0]}=-1 and parallel.{filled[1]}=-1 cannot both fill what is left {where}; '
        f'set one of them to a number'
      )


def _check_choices(config: Config) -> None:
  for section in dataclasses.fields(config):
    value = getattr(config, section.name)
    if not dataclasses.is_dataclass(value):
      continue
    for field in dataclasses.fields(value):
      choices, chosen = field.metadata['choices'], getattr(value, field.name)
      if choices and chosen not in choices:
        raise ConfigError(f'{section.name}.{field.name}={chosen!r} is not one of {", ".join(choices)}')


def _validate_data(data: DataConfig) -> None:
  require(data.seq_len >= 2, 'data.seq_len', data.seq_len, '>= 2, since a token is predicted from another')
  require(0 < data.validation_fraction < 1, 'data.validation_fraction', data.validation_fraction, 'in (0, 1)')
  require(0 <= data.seed < SEEDS, 'data.seed', data.seed, 'from 0 to 2**32 - 1')
  require(data.begin != '', 'data.begin', repr(data.begin), 'a token of the vocabulary, auto or none')
  require(data.prefetch >= 0, 'data.prefetch', data.prefetch, '>= 0')
  require(0 <= data.max_bad_fraction <= 1, 'data.max_bad_fraction', data.max_bad_fraction, 'in [0, 1]')
  unknown = data.max_unknown_fraction
  require(0 <= unknown <= 1, 'data.max_unknown_fraction', unknown, 'in [0, 1]')
  require(bool(data.text_key), 'data.text_key', repr(data.text_key), 'a non-empty name')
  require(bool(data.separator), 'data.separator', repr(data.separator), 'a token of the vocabulary')
  require(bool(data.tokenizer), 'data.tokenizer', repr(data.tokenizer), 'bpe, bytes, a path or a name')
  if data.workers is not None:
    require(data.workers >= 1, 'data.workers', data.workers, '>= 1')
  if data.tokenizer == 'bpe':
    require(
      data.vocab_size >= SPECIAL_AND_BYTE_TOKENS,
      'data.vocab_size',
      data.vocab_size,
      f'>= {SPECIAL_AND_BYTE_TOKENS}: 256 bytes and end of text',
    )
  _validate_live(data)
  _validate_format(data)
  if data.max_documents is not None:
    require(data.max_documents >= 2, 'data.max_documents', data.max_documents, '>= 2, to have both splits')


def _validate_format(data: DataConfig) -> None:
  chat_only = {
    'chat_template': data.chat_template,
    'too_long': data.too_long if data.too_long != 'cut' else None,
  }
  for name, value in chat_only.items():
    if value is not None and data.format != 'chat':
      raise ConfigError(f'data.{name}={value} is for conversations: set data.format=chat, or leave it out')
  if data.format == 'chat' and data.text_key != DataConfig().text_key:
    raise ConfigError(
      f'data.text_key={data.text_key} is for data.format=text: conversations lie under messages, prompt and '
      f'completion, or conversations; leave it out'
    )
  if data.format == 'chat' and data.source.startswith('synthetic:'):
    raise ConfigError(f'data.source={data.source} makes no conversations: leave data.format=chat out')


def _validate_live(data: DataConfig) -> None:
  require(data.live_validation_rows >= 1, 'data.live_validation_rows', data.live_validation_rows, '>= 1')
  if not data.live:
    return
  if data.tokenizer == 'bpe':
    raise ConfigError(
      "data.live=True reads documents while training, so that data.tokenizer='bpe' has nothing to be trained "
      'on; use bytes, the path of a tokenizer.json, or a name on the hub'
    )
  if data.source.startswith(('prepared:', 'synthetic:')):
    raise ConfigError(f'data.live=True with data.source={data.source}: these rows need no live path')
  if data.validation_fraction == 0:
    raise ConfigError('data.live=True needs a data.validation_fraction above 0, to have rows for validation')


def _validate_train(train: TrainConfig) -> None:
  for name in ('steps', 'global_batch', 'accumulation', 'log_every'):
    require(getattr(train, name) >= 1, f'train.{name}', getattr(train, name), '>= 1')
  require(0 <= train.seed < SEEDS, 'train.seed', train.seed, 'from 0 to 2**32 - 1')
  for name in (
    'warmup_steps',
    'ramp_steps',
    'eval_every',
    'sample_tokens',
    'final_learning_rate',
    'weight_decay',
  ):
    require(getattr(train, name) >= 0, f'train.{name}', getattr(train, name), '>= 0')
  for name in ('spike_zscore', 'hang_seconds'):
    require(getattr(train, name) >= 0, f'train.{name}', getattr(train, name), '>= 0')
  if train.exit_on_hang and not train.hang_seconds:
    raise ConfigError(
      'train.exit_on_hang=True needs a limit: set train.hang_seconds to the longest time that a step may take'
    )
  require(
    train.max_skipped >= 1, 'train.max_skipped', train.max_skipped, '>= 1 (on_nonfinite=halt skips none)'
  )
  require(train.sample_temperature >= 0, 'train.sample_temperature', train.sample_temperature, '>= 0')
  for name in ('learning_rate', 'adam_epsilon', 'clip_norm'):
    require(getattr(train, name) > 0, f'train.{name}', getattr(train, name), '> 0')
  for name in ('beta1', 'beta2'):
    require(0 <= getattr(train, name) < 1, f'train.{name}', getattr(train, name), 'in [0, 1)')
  require(0 <= train.decay_fraction <= 1, 'train.decay_fraction', train.decay_fraction, 'in [0, 1]')
  if train.sample_tokens:
    require(bool(train.sample_prompt), 'train.sample_prompt', repr(train.sample_prompt), 'a non-empty text')
  if train.eval_rows is not None:
    require(train.eval_rows >= 1, 'train.eval_rows', train.eval_rows, '>= 1')
  if train.loss_chunk is not None:
    require(train.loss_chunk >= 0, 'train.loss_chunk', train.loss_chunk, '>= 0')
  if train.global_batch % train.accumulation:
    raise ConfigError(
      f'train.accumulation={train.accumulation} does not divide train.global_batch={train.global_batch}'
    )
  if train.flops_budget is not None:  # it decides on the steps later (training/budget.py)
    require(train.flops_budget > 0, 'train.flops_budget', train.flops_budget, '> 0')
    return
  for name in ('warmup_steps', 'ramp_steps'):
    if getattr(train, name) > train.steps:
      raise ConfigError(
        f'train.{name}={getattr(train, name)} is more than train.steps={train.steps}; lower it'
      )


def _validate_recursions(config: Config) -> None:
  """Training with fewer recursions than the model has."""
  train, model = config.train, config.model
  require(0 <= train.readout_rows <= 1, 'train.readout_rows', train.readout_rows, 'in [0, 1]')
  given = {'recursions': train.recursions, 'growth': train.growth, 'readout_rows': train.readout_rows or None}
  for name, value in given.items():
    if value is not None and not model.can_stop_early:
      raise ConfigError(
        f'train.{name}={value} stops tokens after some recursions, which a model of model.kind={model.kind}, '
        f'model.sharing={model.sharing} cannot; use recursive or mor, and cycle or middle_cycle, or leave it unset'
      )
  if train.recursions is not None:
    most = model.num_recursions
    require(1 <= train.recursions <= most, 'train.recursions', train.recursions, f'from 1 to {most}')
  if train.growth is None:
    return
  if train.recursions is not None:
    raise ConfigError(
      f'train.recursions={train.recursions} and train.growth={train.growth} both say how many recursions there are; '
      f'leave one of them unset'
    )
  shares = train.growth
  if len(shares) != model.num_recursions - 1 or list(shares) != sorted(set(shares)) or not shares[0] > 0:
    raise ConfigError(
      f'train.growth={shares} must be {model.num_recursions - 1} rising shares of the steps, above 0: one for each of '
      f'the model.num_recursions={model.num_recursions} after the first'
    )
  if shares[-1] >= 1:
    raise ConfigError(f'train.growth={shares} adds the last recursion when the training is over; end below 1')


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
  require(train.ramp_steps >= doublings, 'train.ramp_steps', train.ramp_steps, f'>= {doublings}')
