"""Llama-type checkpoints of Hugging Face, in and out: safetensors, config.json and tokenizer.json; no torch needed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mor_jax.config import Config, ConfigError, ModelConfig, with_changes
from mor_jax.data.tokenizer import END_OF_TEXT, Tokenizer
from mor_jax.interop import folders, names, tensors, weights
from mor_jax.interop.weights import HeldWeights, NamedWeights, Weights
from mor_jax.model.transformer import Transformer

_REQUIRED = {'model_type': 'llama', 'hidden_act': 'silu', 'attention_bias': False, 'mlp_bias': False}
_SHAPE = {
  'vocab_size': 'vocab_size',
  'd_model': 'hidden_size',
  'mlp_dim': 'intermediate_size',
  'num_layers': 'num_hidden_layers',
  'num_heads': 'num_attention_heads',
  'norm_epsilon': 'rms_norm_eps',
}
_LLAMA3 = {
  'rope_low_frequency_factor': 'low_freq_factor',
  'rope_high_frequency_factor': 'high_freq_factor',
  'rope_original_length': 'original_max_position_embeddings',
}


def load(folder: str | Path) -> tuple[Transformer, dict[str, Any], Tokenizer]:
  """The vanilla model of a Llama checkpoint folder, its variables (NumPy, dtype as stored) and its tokenizer.

  Raises:
    ConfigError: another architecture, a rope scaling unknown here, missing, extra or misshapen tensors, a
      damaged file, or a tokenizer with more entries than the model: everything that is wrong, by name.
  """
  opened, tokenizer = open_folder(folder)
  return Transformer(opened.config), weights.tree(opened), tokenizer


def open_folder(folder: str | Path) -> tuple[Weights, Tokenizer]:
  """The same, with weights that are read leaf by leaf. Raises ConfigError as `load`."""
  folder = Path(folder)
  raw = folders.read_config(folder)
  config = model_config(raw, str(folder))
  table = names.with_tied_head(config, names.llama(config))
  opened, problems = [], []
  for part in (
    lambda: NamedWeights(config, table, tensors.open_tensors(folder)),
    lambda: read_tokenizer(config, folder, raw),
  ):
    try:
      opened.append(part())
    except ConfigError as error:
      problems.append(str(error))
  if problems:
    raise ConfigError('; '.join(problems))
  return tuple(opened)


def save(folder: str | Path, model: Transformer, variables: Mapping[str, Any], tokenizer: Tokenizer) -> None:
  """Writes a vanilla model as a Llama checkpoint folder that `transformers` opens.

  The folder gets its name last. Parameters keep their dtype.

  Raises:
    ConfigError: the model is not vanilla, or the folder exists.
  """
  write(folder, HeldWeights(model.config, variables), tokenizer)


def write(folder: str | Path, opened: Weights, tokenizer: Tokenizer) -> None:
  """As `save`, from weights that come leaf by leaf."""
  config = opened.config
  if config.kind != 'vanilla' or config.kv == 'shared':
    raise ConfigError(
      f'a model of model.kind={config.kind}, model.kv={config.kv} cannot be written as a Llama checkpoint, whose '
      f'layers all have parameters, keys and values of their own; only vanilla models can'
    )
  settings = llama_config(config, tokenizer, opened.dtypes['params/embed/embedding'])
  folders.write(folder, names.llama(config), opened, settings, tokenizer)


def model_config(config: Mapping[str, Any], where: str) -> ModelConfig:
  """ModelConfig of a Hugging Face config.json. Raises ConfigError for what this model does not do."""
  problems = [
    f'{name}={config[name]!r} (must be {wanted!r})'
    for name, wanted in _REQUIRED.items()
    if config.get(name, wanted) != wanted
  ]
  problems += [f'{name} is missing' for name in _SHAPE.values() if name not in config]
  if config.get('quantization_config'):
    problems.append('quantization_config is set (quantised weights cannot be read)')
  rope = _rope(config, problems)
  if problems:
    raise ConfigError(f'{where} is not a Llama checkpoint that can be read: {"; ".join(problems)}')
  heads = config['num_attention_heads']
  head_dim = config.get('head_dim')
  return with_changes(
    Config(),
    model={
      **{ours: config[theirs] for ours, theirs in _SHAPE.items()},
      **rope,
      'kind': 'vanilla',
      'num_kv_heads': config.get('num_key_value_heads') or heads,
      'head_dim': None if head_dim in (None, config['hidden_size'] // heads) else head_dim,
      'tie_embeddings': bool(config.get('tie_word_embeddings', False)),
      'init_std': float(config.get('initializer_range', 0.02)),
      'dtype': 'float32' if (config.get('dtype') or config.get('torch_dtype')) == 'float32' else 'bfloat16',
    },
  ).model


def _rope(config: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
  """Settings of the rotary embedding, from either of the two forms that config.json has had."""
  rope = {**(config.get('rope_scaling') or {}), **(config.get('rope_parameters') or {})}
  settings: dict[str, Any] = {
    'rope_theta': float(rope.get('rope_theta') or config.get('rope_theta') or 10000.0)
  }
  kind = rope.get('rope_type') or rope.get('type') or 'default'
  if rope.get('partial_rotary_factor', config.get('partial_rotary_factor', 1.0)) != 1.0:
    problems.append('partial_rotary_factor is not 1 (only whole heads are rotated)')
  if kind == 'default':
    return settings
  if kind not in ('linear', 'llama3'):
    problems.append(f'rope scaling {kind!r} (default, linear and llama3 are supported)')
    return settings
  needed = {'rope_scaling_factor': 'factor', **(_LLAMA3 if kind == 'llama3' else {})}
  if missing := [theirs for theirs in needed.values() if theirs not in rope]:
    problems.append(f'rope scaling {kind!r} lacks {", ".join(missing)}')
    return settings
  settings |= {ours: float(rope[theirs]) for ours, theirs in needed.items()}
  if kind == 'llama3':
    settings['rope_original_length'] = int(rope['original_max_position_embeddings'])
  return settings | {'rope_scaling': kind}


def llama_config(config: ModelConfig, tokenizer: Tokenizer | None, dtype: np.dtype) -> dict[str, Any]:
  """config.json of a model with layers of Llama's form, of its unrolled depth."""
  shape = {theirs: getattr(config, ours) for ours, theirs in _SHAPE.items()}
  end = tokenizer.end_of_text if tokenizer else None
  scaling = None
  if config.rope_scaling != 'none':
    scaling = {'rope_type': config.rope_scaling, 'factor': config.rope_scaling_factor}
  if config.rope_scaling == 'llama3':
    scaling |= {theirs: getattr(config, ours) for ours, theirs in _LLAMA3.items()}
  return {
    'architectures': ['LlamaForCausalLM'],
    **_REQUIRED,
    **shape,
    'num_key_value_heads': config.num_kv_heads,
    'head_dim': config.head_width,
    'rope_theta': config.rope_theta,
    'rope_scaling': scaling,
    'tie_word_embeddings': config.tie_embeddings,
    'initializer_range': config.init_std,
    'max_position_embeddings': max(2048, config.rope_original_length if scaling else 0),
    'bos_token_id': end,
    'eos_token_id': end,
    'torch_dtype': str(dtype),
  }


def read_tokenizer(settings: ModelConfig, folder: Path, config: Mapping[str, Any]) -> Tokenizer:
  """The tokenizer of a checkpoint folder.

  Raises:
    ConfigError: there is none, it names no end of a text, or it has ids that the model has no embedding for.
  """
  path = folder / 'tokenizer.json'
  if not path.exists():
    raise ConfigError(f'{folder} has no tokenizer.json')
  try:
    added = json.loads(path.read_text(encoding='utf-8')).get('added_tokens', [])
    entries = {entry['content']: entry['id'] for entry in added}
  except (ValueError, AttributeError, KeyError, TypeError) as error:
    raise ConfigError(f'{path} cannot be used ({error})') from None
  end = config.get('eos_token_id')
  ends = end if isinstance(end, list) else [end]
  named = [content for content, index in entries.items() if index in ends]
  separator = END_OF_TEXT if END_OF_TEXT in entries else next(iter(named), None)
  if separator is None:
    raise ConfigError(f'{path} has no token for the end of a text: config.json names eos_token_id={end}')
  try:
    tokenizer = Tokenizer.load(path, separator)
  except ValueError as error:
    raise ConfigError(f'{path} cannot be used ({error})') from None
  check_vocabulary(tokenizer, settings, path)
  return tokenizer


def check_vocabulary(tokenizer: Tokenizer, settings: ModelConfig, path: Path) -> None:
  """Raises ConfigError if the tokenizer has ids that the model has no embedding for."""
  if tokenizer.vocab_size > settings.vocab_size:
    raise ConfigError(
      f'{path} has {tokenizer.entries} entries with ids up to {tokenizer.vocab_size - 1}, the model only '
      f'{settings.vocab_size} embeddings: they do not belong together'
    )
