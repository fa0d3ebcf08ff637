"""Llama-type checkpoints of Hugging Face, in and out: safetensors, config.json and tokenizer.json; no torch needed."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mor_jax.config import Config, ConfigError, ModelConfig, with_changes
from mor_jax.config.model import PLAIN_STD
from mor_jax.data.conventions import Conventions
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.interop import folders, merging, names, tensors, vocabulary, weights
from mor_jax.interop.reader import Reader
from mor_jax.interop.weights import HeldWeights, NamedWeights, Weights
from mor_jax.model.transformer import Transformer

_REQUIRED = {'model_type': 'llama', 'hidden_act': 'silu', 'attention_bias': False, 'mlp_bias': False}
_SHAPE = {
  'vocab_size': 'vocab_size',
  'd_model': 'hidden_size',
  'mlp_dim': 'intermediate_size',
  'num_layers': 'num_hidden_layers',
  'num_heads': 'num_attention_heads',
}
_LLAMA3 = {
  'rope_low_frequency_factor': 'low_freq_factor',
  'rope_high_frequency_factor': 'high_freq_factor',
  'rope_original_length': 'original_max_position_embeddings',
}


class Opened(NamedTuple):
  """A model, its tokenizer (None where the folder has none), and the conventions of its texts."""

  weights: Weights
  tokenizer: Tokenizer | None
  conventions: Conventions


def load(folder: str | Path) -> tuple[Transformer, dict[str, Any], Tokenizer | None]:
  """The vanilla model of a Llama checkpoint folder, its variables (NumPy, dtype as stored) and its tokenizer, if any.

  Raises:
    ConfigError: another architecture, a rope scaling unknown here, missing, extra or misshapen tensors, a
      damaged file, or a tokenizer with more entries than the model: everything that is wrong, by name.
  """
  opened = open_folder(folder)
  return Transformer(opened.weights.config), weights.tree(opened.weights), opened.tokenizer


def open_folder(folder: str | Path, separator: str | None = None, tokenizer: Path | None = None) -> Opened:
  """The same, with weights that are read leaf by leaf.

  Args:
    separator, tokenizer: see `vocabulary.read`.

  Raises:
    ConfigError: as `load`.
  """
  folder = Path(folder)
  raw = folders.read_config(folder)
  config = model_config(raw, str(folder))
  opened: list[Any] = []
  problems = []
  for part in (
    lambda: _open_weights(config, tensors.open_tensors(folder)),
    lambda: vocabulary.read(folder, raw, config, separator, tokenizer),
  ):
    try:
      opened.append(part())
    except ConfigError as error:
      problems.append(str(error))
  if problems:
    raise ConfigError('; '.join(problems))
  return Opened(opened[0], *opened[1])


def _open_weights(config: ModelConfig, held: tensors.Tensors) -> Weights:
  """The weights by our names. A head that differs from the embedding is one of its own, as `transformers` takes it."""
  tied = names.with_tied_head(config, names.llama(config))
  opened = NamedWeights(config, tied, held)
  if not config.tie_embeddings or names.HEAD not in held.specs:
    return opened
  if held.read(names.HEAD).tobytes() == held.read(names.EMBEDDING).tobytes():
    return opened
  config = dataclasses.replace(config, tie_embeddings=False)
  return NamedWeights(config, names.llama(config), held)


def save(
  folder: str | Path,
  model: Transformer,
  variables: Mapping[str, Any],
  tokenizer: Tokenizer | None,
  conventions: Conventions | None = None,
) -> None:
  """Writes a vanilla model as a Llama checkpoint folder that `transformers` opens.

  The folder gets its name last. Parameters keep their dtype; low-rank changes are merged into the kernels.

  Raises:
    ConfigError: the model is not vanilla, or the folder exists.
  """
  write(folder, HeldWeights(model.config, variables), tokenizer, conventions)


def write(
  folder: str | Path, opened: Weights, tokenizer: Tokenizer | None, conventions: Conventions | None = None
) -> None:
  """As `save`, from weights that come leaf by leaf."""
  opened = merging.without_adapters(opened)
  config = opened.config
  if config.kind != 'vanilla' or config.kv == 'shared':
    raise ConfigError(
      f'a model of model.kind={config.kind}, model.kv={config.kv} cannot be written as a Llama checkpoint, whose '
      f'layers all have parameters, keys and values of their own; only vanilla models can'
    )
  if config.embed_factor is not None:
    raise ConfigError(
      f'model.embed_factor={config.embed_factor} has embeddings that tokens share, which a Llama checkpoint has not'
    )
  settings = llama_config(config, tokenizer, opened.dtypes['params/embed/embedding'], conventions)
  folders.write(folder, names.llama(config), opened, settings, tokenizer, conventions)


def model_config(config: Mapping[str, Any], where: str) -> ModelConfig:
  """ModelConfig of a Hugging Face config.json. Raises ConfigError for what this model does not do, or nobody means."""
  problems = [
    f'{name}={config[name]!r} (must be {wanted!r})'
    for name, wanted in _REQUIRED.items()
    if config.get(name) not in (None, wanted)
  ]
  if config.get('quantization_config'):
    problems.append('quantization_config is set (quantised weights cannot be read)')
  read = Reader(config, problems)
  sizes = {ours: read.whole(theirs) for ours, theirs in _SHAPE.items()}
  heads = sizes['num_heads']
  head_dim = read.whole('head_dim', default=sizes['d_model'] // heads)
  model = {
    **sizes,
    **_rope(config, read, problems),
    'kind': 'vanilla',
    'num_kv_heads': read.whole('num_key_value_heads', default=heads),
    'head_dim': None if head_dim == sizes['d_model'] // heads else head_dim,
    'norm_epsilon': read.number('rms_norm_eps', 1e-6),
    'tie_embeddings': read.flag('tie_word_embeddings', False),
    'init': 'plain',
    'init_std': read.number('initializer_range', PLAIN_STD),
    'dtype': 'float32' if (config.get('dtype') or config.get('torch_dtype')) == 'float32' else 'bfloat16',
  }
  if problems:
    raise ConfigError(f'{where} is not a Llama checkpoint that can be read: {"; ".join(problems)}')
  return with_changes(Config(), model=model).model


def _rope(config: Mapping[str, Any], read: Reader, problems: list[str]) -> dict[str, Any]:
  """Settings of the rotary embedding, from either of the two forms that config.json has had."""
  rope = {**read.group('rope_scaling'), **read.group('rope_parameters')}
  inner = Reader({'rope_theta': config.get('rope_theta'), **rope}, problems)
  settings: dict[str, Any] = {'rope_theta': inner.number('rope_theta', 10000.0)}
  kind = rope.get('rope_type') or rope.get('type') or 'default'
  if rope.get('partial_rotary_factor', config.get('partial_rotary_factor')) not in (None, 1.0):
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
  settings |= {ours: inner.number(theirs) for ours, theirs in needed.items()}
  if kind == 'llama3':
    settings['rope_original_length'] = inner.whole('original_max_position_embeddings')
  return settings | {'rope_scaling': kind}


def llama_config(
  config: ModelConfig,
  tokenizer: Tokenizer | None,
  dtype: np.dtype,
  conventions: Conventions | None = None,
) -> dict[str, Any]:
  """config.json of a model with layers of Llama's form, of its unrolled depth."""
  shape = {theirs: getattr(config, ours) for ours, theirs in _SHAPE.items()} | {
    'rms_norm_eps': config.norm_epsilon
  }
  texts = vocabulary.described(tokenizer, conventions)
  if config.rope_scaling != 'none':
    texts['max_position_embeddings'] = max(texts['max_position_embeddings'], config.rope_original_length)
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
    'initializer_range': config.weight_std,
    **texts,
    'torch_dtype': str(dtype),
  }
