"""Llama-type checkpoints of Hugging Face, in and out: safetensors, config.json and tokenizer.json; no torch needed."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from mor_jax.config import Config, ConfigError, ModelConfig
from mor_jax.data.tokenizer import END_OF_TEXT, Tokenizer
from mor_jax.interop.official import LAYER_TENSORS
from mor_jax.model.transformer import Transformer

INDEX = 'model.safetensors.index.json'
SHARD_BYTES = 5 * 10**9

_REQUIRED = {'model_type': 'llama', 'hidden_act': 'silu', 'attention_bias': False, 'mlp_bias': False}
_SHAPE = {
  'vocab_size': 'vocab_size',
  'd_model': 'hidden_size',
  'mlp_dim': 'intermediate_size',
  'num_layers': 'num_hidden_layers',
  'num_heads': 'num_attention_heads',
  'norm_epsilon': 'rms_norm_eps',
}


def load(folder: str | Path) -> tuple[Transformer, dict[str, Any], Tokenizer]:
  """The vanilla model of a Llama checkpoint folder, its variables (NumPy, dtype as stored) and its tokenizer.

  Raises:
    ConfigError: another architecture, rope scaling, missing, extra or misshapen tensors, a damaged
      file, or a tokenizer with more entries than the model: everything that is wrong, by name.
  """
  folder = Path(folder)
  config = _read_config(folder)
  settings = model_config(config, str(folder))
  return (
    Transformer(settings),
    {'params': _read_params(settings, folder)},
    _read_tokenizer(settings, folder, config),
  )


def save(folder: str | Path, model: Transformer, variables: Mapping[str, Any], tokenizer: Tokenizer) -> None:
  """Writes a vanilla model as a Llama checkpoint folder that `transformers` opens.

  The folder gets its name last. Parameters keep their dtype.

  Raises:
    ConfigError: the model is not vanilla, or the folder exists.
  """
  folder, config = Path(folder), model.config
  if config.kind != 'vanilla' or config.kv == 'shared':
    raise ConfigError(
      f'a model of model.kind={config.kind}, model.kv={config.kv} cannot be written as a Llama checkpoint, whose '
      f'layers all have parameters, keys and values of their own; only vanilla models can'
    )
  if folder.exists():
    raise ConfigError(f'{folder} exists; name a new folder, or remove it')
  partial = folder.with_name(f'{folder.name}.partial')
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  dtype = _write_tensors(partial, config, variables['params'])
  (partial / 'config.json').write_text(json.dumps(_to_config(config, tokenizer, dtype), indent=2) + '\n')
  tokenizer.save(partial / 'tokenizer.json')
  ends = {'eos_token': tokenizer.separator, 'bos_token': tokenizer.separator}
  names = {'tokenizer_class': 'PreTrainedTokenizerFast', **ends}
  (partial / 'tokenizer_config.json').write_text(json.dumps(names, indent=2) + '\n')
  partial.rename(folder)


def model_config(config: Mapping[str, Any], where: str) -> ModelConfig:
  """ModelConfig of a Hugging Face config.json. Raises ConfigError for what this model does not do."""
  problems = [
    f'{name}={config[name]!r} (must be {wanted!r})'
    for name, wanted in _REQUIRED.items()
    if config.get(name, wanted) != wanted
  ]
  problems += [f'{name} is missing' for name in _SHAPE.values() if name not in config]
  rope = config.get('rope_parameters') or {}
  scaling = config.get('rope_scaling') or {}
  kind = rope.get('rope_type') or scaling.get('rope_type') or scaling.get('type') or 'default'
  if kind != 'default':
    problems.append(f'rope scaling {kind!r} (only unscaled rotary embeddings are supported)')
  if problems:
    raise ConfigError(f'{where} is not a Llama checkpoint that can be read: {"; ".join(problems)}')
  heads = config['num_attention_heads']
  head_dim = config.get('head_dim')
  return (
    Config()
    .replace(
      model={
        **{ours: config[theirs] for ours, theirs in _SHAPE.items()},
        'kind': 'vanilla',
        'num_kv_heads': config.get('num_key_value_heads') or heads,
        'head_dim': None if head_dim in (None, config['hidden_size'] // heads) else head_dim,
        'rope_theta': float(rope.get('rope_theta') or config.get('rope_theta') or 10000.0),
        'tie_embeddings': bool(config.get('tie_word_embeddings', False)),
        'init_std': float(config.get('initializer_range', 0.02)),
        'dtype': 'float32' if (config.get('dtype') or config.get('torch_dtype')) == 'float32' else 'bfloat16',
      }
    )
    .model
  )


def tensor_table(config: ModelConfig) -> dict[str, tuple[str, int | None]]:
  """Every tensor of a Llama checkpoint: (our leaf, layer or None). Kernels are stored transposed there."""
  table: dict[str, tuple[str, int | None]] = {
    'model.embed_tokens.weight': ('embed/embedding', None),
    'model.norm.weight': ('final_norm/scale', None),
  }
  if not config.tie_embeddings:
    table['lm_head.weight'] = ('head/kernel', None)
  for layer in range(config.num_layers):
    for ours, theirs in LAYER_TENSORS.items():
      table[f'model.layers.{layer}.{theirs}'] = (f'layers/{ours}', layer)
  return table


# ---- reading ----


def _read_config(folder: Path) -> dict[str, Any]:
  try:
    return json.loads((folder / 'config.json').read_text())
  except FileNotFoundError:
    raise ConfigError(f'{folder} is no checkpoint folder: it has no config.json') from None
  except json.JSONDecodeError as error:
    raise ConfigError(f'{folder}/config.json cannot be read ({error})') from None


def _read_params(config: ModelConfig, folder: Path) -> dict[str, Any]:
  """The parameter tree, filled tensor by tensor."""
  shapes = _shapes(config)
  flat: dict[str, np.ndarray] = {}
  table, problems, seen = tensor_table(config), [], set()
  for name, read in _tensors(folder):
    if name == 'lm_head.weight' and config.tie_embeddings:
      continue  # a copy of the embedding
    if name not in table:
      problems.append(f'{name} has no place in the model')
      continue
    seen.add(name)
    leaf, layer = table[name]
    tensor = read()
    tensor = tensor.T if leaf.endswith('kernel') else tensor
    shape = shapes[leaf] if layer is None else shapes[leaf][1:]
    if tensor.shape != shape:
      problems.append(f'{name} has shape {tensor.shape[::-1]}, config.json asks for {shape[::-1]}')
      continue
    if layer is None:
      flat[leaf] = np.ascontiguousarray(tensor)
    else:
      flat.setdefault(leaf, np.empty(shapes[leaf], tensor.dtype))[layer] = tensor
  problems += [f'{name} is missing' for name in table if name not in seen]
  if problems:
    raise ConfigError(f'{folder}: {"; ".join(problems)}')
  tree: dict[str, Any] = {}
  for path, value in flat.items():
    *parents, leaf = path.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[leaf] = value
  return tree


def _tensors(folder: Path) -> Iterator[tuple[str, Any]]:
  """(name, function that reads the tensor) of all files, one open at a time."""
  if (folder / INDEX).exists():
    files = sorted(set(json.loads((folder / INDEX).read_text())['weight_map'].values()))
  else:
    files = ['model.safetensors']
  for name in files:
    path = folder / name
    if not path.exists():
      raise ConfigError(f'{folder} lacks the file {name}')
    try:
      with safetensors.safe_open(path, framework='numpy') as file:
        for key in file.keys():  # noqa: SIM118 (no dict)
          yield key, lambda file=file, key=key: file.get_tensor(key)
    except (safetensors.SafetensorError, OSError) as error:
      raise ConfigError(f'{path} cannot be read ({error}); it may be truncated: fetch it again') from None


def _read_tokenizer(settings: ModelConfig, folder: Path, config: Mapping[str, Any]) -> Tokenizer:
  path = folder / 'tokenizer.json'
  if not path.exists():
    raise ConfigError(f'{folder} has no tokenizer.json')
  entries = {entry['content']: entry['id'] for entry in json.loads(path.read_text()).get('added_tokens', [])}
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
  if tokenizer.vocab_size > settings.vocab_size:
    raise ConfigError(
      f'{path} has {tokenizer.vocab_size} entries, the model of {folder} only {settings.vocab_size}: they do not '
      f'belong together'
    )
  return tokenizer


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Shape of every leaf of the parameter tree by path."""
  import jax
  import jax.numpy as jnp

  tree = jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params']
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {'/'.join(entry.key for entry in path): leaf.shape for path, leaf in leaves}


# ---- writing ----


def _write_tensors(folder: Path, config: ModelConfig, params: Mapping[str, Any]) -> str:
  """Writes shards of at most SHARD_BYTES and, if there are several, their index; returns the dtype's name."""
  shards: list[dict[str, tuple[str, int | None]]] = [{}]
  size = 0
  for name, place in tensor_table(config).items():
    num_bytes = _tensor(params, *place).nbytes
    if size and size + num_bytes > SHARD_BYTES:
      shards.append({})
      size = 0
    shards[-1][name] = place
    size += num_bytes
  weight_map = {}
  for number, table in enumerate(shards, start=1):
    file = 'model.safetensors' if len(shards) == 1 else f'model-{number:05d}-of-{len(shards):05d}.safetensors'
    tensors = {name: np.ascontiguousarray(_tensor(params, *place)) for name, place in table.items()}
    safetensors.numpy.save_file(tensors, folder / file, metadata={'format': 'pt'})
    weight_map |= dict.fromkeys(table, file)
  if len(shards) > 1:
    (folder / INDEX).write_text(json.dumps({'metadata': {}, 'weight_map': weight_map}, indent=2) + '\n')
  return str(np.asarray(params['embed']['embedding']).dtype)


def _tensor(params: Mapping[str, Any], leaf: str, layer: int | None) -> np.ndarray:
  node: Any = params
  for part in leaf.split('/'):
    node = node[part]
  value = np.asarray(node if layer is None else node[layer])
  return value.T if leaf.endswith('kernel') else value


def _to_config(config: ModelConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
  shape = {theirs: getattr(config, ours) for ours, theirs in _SHAPE.items()}
  return {
    'architectures': ['LlamaForCausalLM'],
    **_REQUIRED,
    **shape,
    'num_key_value_heads': config.num_kv_heads,
    'head_dim': config.head_width,
    'rope_theta': config.rope_theta,
    'tie_word_embeddings': config.tie_embeddings,
    'initializer_range': config.init_std,
    'max_position_embeddings': 2048,
    'bos_token_id': tokenizer.end_of_text,
    'eos_token_id': tokenizer.end_of_text,
    'torch_dtype': dtype,
  }
