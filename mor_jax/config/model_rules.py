"""Rules that the settings of a model must satisfy, alone and together."""

import dataclasses
import itertools

from mor_jax.config.attention_rules import validate_attention
from mor_jax.config.model import ModelConfig
from mor_jax.config.requirement import require
from mor_jax.errors import ConfigError

_ONLY_BENEFIT = ('benefit_margin', 'benefit_rows', 'depth_prior_weight')
MOST_LAYERS, LARGEST = 10_000, 2**24  # what lies above was not meant, and would take a machine down


def validate_model(model: ModelConfig) -> None:
  """Raises ConfigError for the first setting of the model that cannot work, alone or with others."""
  for name in ('num_layers', 'd_model', 'num_heads', 'num_kv_heads', 'mlp_dim', 'num_recursions', 'head_dim'):
    most, value = MOST_LAYERS if name in ('num_layers', 'num_recursions') else LARGEST, getattr(model, name)
    require(value is None or 1 <= value <= most, f'model.{name}', value, f'from 1 to {most:,}')
  if model.vocab_size is not None:
    require(2 <= model.vocab_size <= LARGEST, 'model.vocab_size', model.vocab_size, f'from 2 to {LARGEST:,}')
  for name in (
    'norm_epsilon',
    'router_temperature',
    'gate_scale',
    'threshold_slack',
  ):
    require(getattr(model, name) > 0, f'model.{name}', getattr(model, name), '> 0')
  for name in (
    'aux_loss_weight',
    'router_z_loss_weight',
    'balancing_loss_weight',
    'lora_rank',
    'lora_alpha',
    'bias_update_rate',
    'capacity_warmup_steps',
    'balance_warmup_steps',
    'benefit_margin',
    'depth_prior_weight',
  ):
    require(getattr(model, name) >= 0, f'model.{name}', getattr(model, name), '>= 0')
  factor = model.embed_factor
  require(factor is None or 1 < factor < LARGEST, 'model.embed_factor', factor, 'at least 2, or none')
  for name in ('init_std', 'embed_std', 'router_noise'):
    value = getattr(model, name)
    require(value is None or value >= 0, f'model.{name}', value, '>= 0, or none')
  require(0 <= model.ema_decay < 1, 'model.ema_decay', model.ema_decay, 'in [0, 1)')
  require(0 < model.benefit_rows <= 1, 'model.benefit_rows', model.benefit_rows, 'in (0, 1]')
  if model.recursion_encoding and model.sharing.endswith('sequence'):
    raise ConfigError(
      f'model.recursion_encoding=True marks the passes over the shared block, which '
      f'model.sharing={model.sharing!r} does not make; use cycle or middle_cycle'
    )
  if model.kind == 'vanilla' and (model.recursion_encoding or not model.share_norms):
    raise ConfigError(
      f'model.recursion_encoding={model.recursion_encoding} and model.share_norms={model.share_norms} relax shared '
      f'layers, which model.kind=vanilla does not have; use False and True'
    )
  if model.kind == 'vanilla' and model.lora_rank and model.lora_layers == 'shared':
    raise ConfigError(
      f'model.lora_rank={model.lora_rank} with model.lora_layers=shared changes shared layers, which '
      f'model.kind=vanilla does not have; set --config.model.lora_layers=all'
    )
  if model.random_gate is not None and not (model.kind == 'mor' and model.random_router):
    raise ConfigError(
      f'model.random_gate={model.random_gate} is for model.random_router=True; leave it unset, or set that too'
    )
  if model.kind != 'vanilla' or model.kv == 'shared':
    _validate_sharing(model)
  if model.kind == 'mor':
    _validate_routing(model)
  validate_attention(model)
  _validate_kv(model)


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
  idle = [
    f'model.{field.name}={getattr(model, field.name)}'
    for field in dataclasses.fields(model)
    if field.name in _ONLY_BENEFIT and getattr(model, field.name) != field.default
  ]
  if idle and not model.learns_benefit:
    raise ConfigError(f'{", ".join(idle)} has no effect without model.router_target=benefit; set that too')
  (_validate_expert_choice if model.router == 'expert_choice' else _validate_token_choice)(model)


def _validate_benefit(model: ModelConfig) -> None:
  if model.causality != 'none':
    raise ConfigError(
      f'model.causality={model.causality} has nothing to teach with model.router_target=benefit, whose routers decide '
      f'without the future anyway; use auto or none'
    )
  if model.random_router:
    raise ConfigError(
      'model.random_router=True learns nothing; with model.router_target=benefit leave it at False'
    )
  if model.num_recursions < 2:
    raise ConfigError(
      'model.router_target=benefit compares exits after different recursions and needs model.num_recursions >= 2'
    )
  if model.step_capacities[0] != 1.0:
    raise ConfigError(
      f'model.capacities={model.capacities} begins below 1, and model.router_target=benefit compares exits from the '
      f'first recursion on; set the first capacity to 1.0'
    )
  if model.router_z_loss_weight:
    raise ConfigError(
      f'model.router_z_loss_weight={model.router_z_loss_weight} is a loss on scores as gates; with '
      f'model.router_target=benefit set it to 0'
    )


def _validate_expert_choice(model: ModelConfig) -> None:
  _refuse_activation(model, ('sigmoid', 'tanh', 'identity'))
  if model.learns_benefit:
    _validate_benefit(model)
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
  if model.random_router and model.router_noise:
    raise ConfigError(
      f'model.router_noise={model.router_noise} adds noise to noise with model.random_router=True; leave it unset'
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
  if model.learns_benefit:
    raise ConfigError(
      'model.router_target=benefit asks at every recursion whether to go on, which is for model.router=expert_choice; '
      'with model.router=token_choice use gate'
    )
  if model.router_noise:
    raise ConfigError(
      f'model.router_noise={model.router_noise} is for model.router=expert_choice; with token_choice leave it unset'
    )
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
    require(
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
