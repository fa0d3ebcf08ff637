"""Checkpoints of Hugging Face, in and out: safetensors, config.json and tokenizer; no torch needed (`families`)."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mor_jax.config import Config, ConfigError, ModelConfig, with_changes
from mor_jax.config.model import PLAIN_STD
from mor_jax.config.model_rules import MOST_LAYERS
from mor_jax.data.conventions import Conventions
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.interop import families, folders, merging, names, rope, tensors, vocabulary, weights
from mor_jax.interop.reader import Reader
from mor_jax.interop.weights import HeldWeights, NamedWeights, Weights
from mor_jax.model.transformer import Transformer

_REQUIRED = {'hidden_act': 'silu', 'mlp_bias': False}
_SHAPE = {
  'vocab_size': 'vocab_size',
  'd_model': 'hidden_size',
  'mlp_dim': 'intermediate_size',
  'num_layers': 'num_hidden_layers',
  'num_heads': 'num_attention_heads',
}


class Opened(NamedTuple):
  """A model, its tokenizer (None where the folder has none), and the conventions of its texts."""

  weights: Weights
  tokenizer: Tokenizer | None
  conventions: Conventions


def load(folder: str | Path) -> tuple[Transformer, dict[str, Any], Tokenizer | None]:
  """The vanilla model of a checkpoint folder, its variables (NumPy, dtype as stored) and its tokenizer, if any.

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
  if config.tie_embeddings and names.HEAD in held.specs and not _are_equal(held, names.HEAD, names.EMBEDDING):
    config = dataclasses.replace(config, tie_embeddings=False)
  return NamedWeights(config, names.llama(config), held, ignored=(names.HEAD,))


def _are_equal(held: tensors.Tensors, *pair: str) -> bool:
  """Whether two tensors are the same numbers, of whatever dtypes; False where one is missing."""
  if not all(name in held.specs for name in pair):
    return False
  one, other = (held.read(name) for name in pair)
  return one.shape == other.shape and np.array_equal(one, other, equal_nan=True)


def save(
  folder: str | Path,
  model: Transformer,
  variables: Mapping[str, Any],
  tokenizer: Tokenizer | None,
  conventions: Conventions | None = None,
) -> None:
  """Writes a vanilla model as a checkpoint folder that `transformers` opens.

  The folder gets its name last. Parameters keep their dtype; low-rank changes are merged into the kernels.

  Raises:
    ConfigError: the model is not vanilla, of a form that no family has, or the folder exists.
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
      f'a model of model.kind={config.kind}, model.kv={config.kv} cannot be written for transformers, whose models have '
      f'layers that all have parameters, keys and values of their own; only vanilla models can'
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
  kind = config.get('model_type') or 'llama'
  if not isinstance(kind, str) or kind not in families.FAMILIES:
    problems.append(f'model_type={kind!r} (must be one of {", ".join(families.FAMILIES)})')
    kind = 'llama'
  family, read = families.FAMILIES[kind], Reader(config, problems)
  sizes = {ours: read.whole(theirs) for ours, theirs in _SHAPE.items()}
  heads = sizes['num_heads']
  usual = sizes['d_model'] // heads
  head_dim = read.whole('head_dim', default=usual if 'head_dim' in config else family.head_dim or usual)
  kv_heads = heads if 'num_key_value_heads' in config else family.kv_heads or heads
  model = {
    **sizes,
    **rope.settings(config, read, problems, family.theta),
    **families.settings(kind, config, min(sizes['num_layers'], MOST_LAYERS), read, problems),
    'kind': 'vanilla',
    'num_kv_heads': read.whole('num_key_value_heads', default=kv_heads),
    'head_dim': None if head_dim == usual else head_dim,
    'norm_epsilon': read.number('rms_norm_eps', 1e-6),
    'tie_embeddings': read.flag('tie_word_embeddings', family.ties),
    'init': 'plain',
    'init_std': read.number('initializer_range', PLAIN_STD),
    'dtype': 'float32' if (config.get('dtype') or config.get('torch_dtype')) == 'float32' else 'bfloat16',
  }
  if problems:
    raise ConfigError(f'{where} is not a checkpoint that can be read: {"; ".join(problems)}')
  return with_changes(Config(), model=model).model


def llama_config(
  config: ModelConfig,
  tokenizer: Tokenizer | None,
  dtype: np.dtype,
  conventions: Conventions | None = None,
) -> dict[str, Any]:
  """config.json of a model of its unrolled depth, as a Llama, or what else of its kin it is (`families.family_of`).

  Raises:
    ConfigError: none of them has such layers.
  """
  shape = {theirs: getattr(config, ours) for ours, theirs in _SHAPE.items()} | {
    'rms_norm_eps': config.norm_epsilon
  }
  texts = vocabulary.described(tokenizer, conventions)
  return {
    **families.described(config),
    **shape,
    'num_key_value_heads': config.num_kv_heads,
    'head_dim': config.head_width,
    'tie_word_embeddings': config.tie_embeddings,
    'initializer_range': config.weight_std,
    **texts,
    **rope.described(config, texts['max_position_embeddings']),
    'torch_dtype': str(dtype),
  }
