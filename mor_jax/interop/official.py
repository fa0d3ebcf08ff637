"""The authors' PyTorch checkpoints of MoR and recursive models, in and out."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mor_jax.config import Config, ConfigError, ModelConfig, with_changes
from mor_jax.config.typed import from_dict
from mor_jax.data.conventions import Conventions
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.files import parse_json
from mor_jax.interop import folders, huggingface, merging, names, tensors, weights
from mor_jax.interop.weights import HeldWeights, NamedWeights, Weights
from mor_jax.model.transformer import Transformer

OURS = 'mor_jax'  # key of config.json with all settings of the model

# Settings that say how the vectors were made, not what the model is.
_DESCRIPTIVE = {'name', 'seed', 'S', 'B', 'attn', 'rinit', 'init'}
_NOT_THEIRS = ('attention_bias', 'qk_norm', 'sliding_window', 'no_rope_layers')
_PLAIN = ('none', False, None, ())
_REQUIRED = ('vocab', 'd', 'ff', 'L', 'h', 'kv', 'Nr', 'sharing')


def load(
  weights_path: str | Path, settings: Mapping[str, Any] | None = None, untied: str = 'refuse'
) -> tuple[Transformer, dict]:
  """The model and its variables (NumPy, dtype as stored).

  Args:
    weights_path: safetensors file with the authors' state dict under its own names, or .bin or .pt where
      torch is installed, or a folder with one or several of them.
    settings: the dict of a fixture's JSON file (see `model_config`); None: the folder was written by `save`.
    untied: where copies of a shared layer differ: 'refuse', or 'average' them.

  Raises:
    ConfigError (a ValueError): a setting that is not supported; tensors missing, left over or of wrong
      shape; copies of a shared layer that are not equal.
  """
  opened = open_weights(weights_path, settings, untied)
  return Transformer(opened.config), weights.tree(opened)


def open_weights(
  path: str | Path, settings: Mapping[str, Any] | None = None, untied: str = 'refuse'
) -> Weights:
  """As `load`, with weights that are read leaf by leaf."""
  held = tensors.open_tensors(path)
  if settings is not None:
    config = _with_their_router(model_config(settings), held)
  else:
    raw = folders.read_config(Path(path))
    if OURS not in raw:
      raise ConfigError(f'{path} does not say which model it holds; give a file of settings (--settings)')
    config = with_changes(Config(model=from_dict(ModelConfig, raw[OURS], 'model.'))).model
  return NamedWeights(config, names.official(config), held, untied)


def save(
  folder: str | Path, model: Transformer, variables: Mapping[str, Any], tokenizer: Tokenizer | None = None
) -> None:
  """Writes a MoR or recursive model under the authors' names: safetensors, config.json, tokenizer.

  Every copy of a shared tensor is written, as their state dicts have it. A recursive model whose steps
  have keys and values of their own is then a Llama checkpoint too, which `transformers` opens.

  Raises:
    ConfigError: the folder exists, or the model has parameters that the authors' models do not have.
  """
  write(folder, HeldWeights(model.config, variables), tokenizer)


def write(
  folder: str | Path,
  opened: Weights,
  tokenizer: Tokenizer | None,
  conventions: Conventions | None = None,
) -> None:
  """As `save`, from weights that come leaf by leaf; low-rank changes are merged where they can be."""
  opened = merging.without_adapters(opened)
  config = opened.config
  if config.kind == 'vanilla':
    raise ConfigError("model.kind=vanilla is not among the authors' models; write it as a Llama checkpoint")
  if config.learns_benefit:
    raise ConfigError(
      "model.router_target=benefit has routers that only choose; in the authors' models their scores are gates, which "
      'would give other logits: such a model cannot be written in their form'
    )
  unsaid = [
    f'model.{name}={getattr(config, name)}' for name in _NOT_THEIRS if getattr(config, name) not in _PLAIN
  ]
  if unsaid:
    raise ConfigError(
      f"the authors' models have plain Llama layers, without {', '.join(unsaid)}: such a model cannot be written in "
      f'their form'
    )
  table = names.official(config)
  unnamed = sorted(set(opened.shapes) - {place.leaf for place in table.values()})
  if unnamed:
    raise ConfigError(
      f"the authors' models have no {', '.join(unnamed)}: a model with lora_sharing=own, recursion_encoding, "
      f'embed_factor, share_norms=False, selection=ema_threshold or calibrated thresholds cannot be written in their form'
    )
  dtype = opened.dtypes['params/embed/embedding']
  described = huggingface.llama_config(config, tokenizer, dtype, conventions)
  described |= _their_config(config) | {OURS: dataclasses.asdict(config)}
  folders.write(folder, table, opened, described, tokenizer, conventions)


def read_settings(path: str | Path) -> dict[str, Any]:
  """Settings from a JSON file. Raises ConfigError."""
  try:
    found = parse_json(Path(path).read_text(encoding='utf-8'))
  except (OSError, ValueError) as error:
    raise ConfigError(f'--settings={path} cannot be read ({error})') from None
  if not isinstance(found, dict):
    raise ConfigError(f'--settings={path} holds no JSON object')
  return found


def model_config(settings: Mapping[str, Any]) -> ModelConfig:
  """ModelConfig of a fixture's settings.

  Shape: vocab, d, ff, L, h, kv, tie, theta. Recursion: Nr, sharing, kvshare. Routing: type
  (expert, token, none: a recursive model), router, gating, temp, z; for experts cap, func, alpha,
  sampling; for tokens tfunc, talpha, bal.

  Raises:
    ConfigError: a setting, or a value of one, that is missing or not supported.
  """
  try:
    return _model_config(settings)
  except ConfigError:
    raise
  except (
    TypeError,
    ValueError,
    AttributeError,
    OverflowError,
  ) as error:  # a text where a number was meant, and so on
    raise ConfigError(f'settings that cannot be meant: {error}') from None


def _model_config(settings: Mapping[str, Any]) -> ModelConfig:
  rest = {key: value for key, value in settings.items() if key not in _DESCRIPTIVE}
  if missing := [name for name in _REQUIRED if name not in rest]:
    raise ConfigError(f'settings lack {", ".join(missing)}')
  kind = rest.pop('type', 'none')
  if not isinstance(kind, str) or kind not in ('expert', 'token', 'none'):
    raise ConfigError(f"settings: type={kind!r} is not one of 'expert', 'token', 'none'")
  fields = {
    'vocab_size': rest.pop('vocab'),
    'd_model': rest.pop('d'),
    'mlp_dim': rest.pop('ff'),
    'num_layers': rest.pop('L'),
    'num_heads': rest.pop('h'),
    'num_kv_heads': rest.pop('kv'),
    'num_recursions': rest.pop('Nr'),
    'sharing': rest.pop('sharing'),
    'kv': 'shared' if rest.pop('kvshare', False) else 'recursion_wise',
    'tie_embeddings': rest.pop('tie', True),
    'rope_theta': float(rest.pop('theta', 10000.0)),
    'kind': 'recursive' if kind == 'none' else 'mor',
    'dtype': 'float32',
  }
  if kind != 'none':
    fields |= _routing(rest, is_expert=kind == 'expert')
  if rest:
    raise ConfigError(f'settings not supported: {", ".join(f"{k}={v!r}" for k, v in sorted(rest.items()))}')
  return with_changes(Config(model=from_dict(ModelConfig, fields, 'model.'))).model


def _routing(rest: dict[str, Any], is_expert: bool) -> dict[str, Any]:
  """Settings of the router, taken out of `rest`."""
  fields = {
    'router': 'expert_choice' if is_expert else 'token_choice',
    'router_head': rest.pop('router', 'linear'),
    'router_temperature': float(rest.pop('temp', 1.0)),
    'router_z_loss_weight': 0.001 if rest.pop('z', False) else 0.0,
    'gating': rest.pop('gating', 'weighted'),
  }
  capacities = rest.pop('cap', None)
  if is_expert:
    return fields | {
      'capacities': capacities and tuple(float(capacity) for capacity in capacities.split(',')),
      'router_activation': rest.pop('func', 'sigmoid') or 'identity',
      'router_alpha': rest.pop('alpha', None),
      'causality': rest.pop('sampling', 'aux_loss'),
    }
  return fields | {
    'router_activation': rest.pop('tfunc', 'softmax'),
    'router_alpha': rest.pop('talpha', None),
    'balancing': rest.pop('bal', 'loss'),
  }


def to_params(config: ModelConfig, held: Mapping[str, np.ndarray]) -> dict:
  """Our parameter tree from the authors' tensors; also reads gradients, where each layer appears once.

  Raises:
    ConfigError: see `load`.
  """
  named = NamedWeights(config, names.official(config), tensors.Held(held, 'tensors'))
  return weights.tree(named)['params']


def _with_their_router(config: ModelConfig, held: tensors.Tensors) -> ModelConfig:
  """The config with the width that the router has, since their wide_mlp is no wider than their mlp."""
  hidden = held.specs.get(f'model.layers.{config.unique_ends}.mor_router.router.0.weight')
  if config.router_head == 'wide_mlp' and hidden is not None and hidden[0][0] == 2 * config.d_model:
    return dataclasses.replace(config, router_head='mlp')
  biased = [name for name in held.specs if name.endswith('router_bias')]
  if biased and (config.router != 'token_choice' or config.balancing != 'loss_free'):
    raise ConfigError(f"tensor {biased[0]} belongs to loss-free balancing; set bal='loss_free'")
  return config


def _their_config(config: ModelConfig) -> dict[str, Any]:
  """What config.json says about recursion and routing, under the keys of the authors' settings."""
  described: dict[str, Any] = {
    'recursive': {
      'enable': True,
      'num_recursion': config.num_recursions,
      'sharing': config.sharing,
      'ln_share': config.share_norms,
    },
    'kv_sharing': {'enable': config.kv != 'recursion_wise', 'update_cache': config.kv == 'hybrid'},
  }
  if config.kind == 'recursive':
    is_llama = config.kv == 'recursion_wise'
    return (
      described
      if is_llama
      else described | {'model_type': 'recursive_llama', 'architectures': ['RecursiveLlama']}
    )
  is_expert = config.router == 'expert_choice'
  squash = None if config.squash == 'identity' else config.squash
  gate = {'router_func': squash, 'alpha': config.gate_scale, 'gating': config.gating}
  own = {'sampling': config.causality, 'coeff': config.aux_loss_weight}
  if not is_expert:
    own = {'balancing': config.balancing, 'coeff': config.balancing_loss_weight, 'u': config.bias_update_rate}
  described['mor'] = {
    'enable': True,
    'type': 'expert' if is_expert else 'token',
    'capacity': ','.join(map(str, config.step_capacities)),
    'router_type': config.router_head,
    'temp': config.router_temperature,
    'z_loss': config.router_z_loss_weight > 0,
    'z_coeff': config.router_z_loss_weight,
    'rand_router': config.random_router,
    'expert' if is_expert else 'token': gate | own,
  }
  return described | {'model_type': 'mor_llama', 'architectures': ['MoRLlamaForCausalLM']}
