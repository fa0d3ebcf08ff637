"""Loads the authors' PyTorch MoR weights (safetensors) as a `Transformer` and its variables."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import safetensors.numpy
from etils import epath

from mor_jax.config import Config, ModelConfig
from mor_jax.model import sharing
from mor_jax.model.transformer import Transformer

# Our leaf of one layer: their tensor, below the layer's prefix. Kernels are stored transposed there.
LAYER_TENSORS = {
  'attention_norm/scale': 'input_layernorm.weight',
  'attention/query/kernel': 'self_attn.q_proj.weight',
  'attention/key/kernel': 'self_attn.k_proj.weight',
  'attention/value/kernel': 'self_attn.v_proj.weight',
  'attention/output/kernel': 'self_attn.o_proj.weight',
  'mlp_norm/scale': 'post_attention_layernorm.weight',
  'mlp/gate/kernel': 'mlp.gate_proj.weight',
  'mlp/up/kernel': 'mlp.up_proj.weight',
  'mlp/down/kernel': 'mlp.down_proj.weight',
}

# Settings that say how the vectors were made, not what the model is.
_DESCRIPTIVE = {'name', 'seed', 'S', 'B', 'attn', 'rinit'}


def load(weights_path: epath.PathLike, settings: Mapping[str, Any]) -> tuple[Transformer, dict]:
  """The model that `settings` describe and its variables, in float32.

  Args:
    weights_path: safetensors file with the authors' state dict under its own names.
    settings: the dict of a fixture's JSON file (see `model_config`).

  Raises:
    ValueError: a setting that is not supported, tensors missing or left over, or copies of a
      shared layer that are not equal.
  """
  config = model_config(settings)
  tensors = safetensors.numpy.load(epath.Path(weights_path).read_bytes())
  return Transformer(config), {'params': to_params(config, tensors)}


def model_config(settings: Mapping[str, Any]) -> ModelConfig:
  """ModelConfig of a fixture's settings: vocab, d, ff, L, h, kv, Nr, sharing, type, cap, tie, theta."""
  rest = {key: value for key, value in settings.items() if key not in _DESCRIPTIVE}
  kind = rest.pop('type')
  if kind != 'expert':
    raise ValueError(f"type={kind!r} is not supported; use 'expert'")
  fields = {
    'vocab_size': rest.pop('vocab'),
    'd_model': rest.pop('d'),
    'mlp_dim': rest.pop('ff'),
    'num_layers': rest.pop('L'),
    'num_heads': rest.pop('h'),
    'num_kv_heads': rest.pop('kv'),
    'num_recursions': rest.pop('Nr'),
    'sharing': rest.pop('sharing'),
    'capacities': tuple(float(capacity) for capacity in rest.pop('cap').split(',')),
    'kv': 'shared' if rest.pop('kvshare', False) else 'recursion_wise',
    'tie_embeddings': rest.pop('tie', True),
    'rope_theta': float(rest.pop('theta', 10000.0)),
  }
  if rest:
    raise ValueError(f'settings not supported: {", ".join(f"{k}={v!r}" for k, v in sorted(rest.items()))}')
  return Config().replace(model={**fields, 'kind': 'mor', 'dtype': 'float32'}).model


def to_params(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> dict:
  """Our parameter tree from the authors' tensors; also reads gradients, where each layer appears once."""
  reader = _Reader(tensors)
  slots = sharing.layer_slots(config)
  layers: dict[str, list] = {}
  for name, theirs in LAYER_TENSORS.items():
    copies: list[list] = [[] for _ in range(config.num_unique_layers)]
    for depth, slot in enumerate(slots):
      copies[slot].append(f'{_layer_prefix(config, depth)}.{theirs}')
    layers[name] = np.stack([reader.shared(names) for names in copies])
  routers = [reader.one(f'{_router_prefix(config, step)}.router.weight') for step in range(config.recursions)]
  params = {
    'embed': {'embedding': reader.one('model.embed_tokens.weight', np.asarray)},
    'final_norm': {'scale': reader.one('model.norm.weight')},
    'layers': _nest(layers),
    'router': {'kernel': np.stack([kernel[:, 0] for kernel in routers])},
  }
  if config.tie_embeddings:
    reader.used.add('lm_head.weight')
  else:
    params['head'] = {'kernel': reader.one('lm_head.weight')}
  left_over = sorted(set(tensors) - reader.used)
  if left_over:
    raise ValueError(f'tensors without a place in the model: {", ".join(left_over)}')
  return params


def _layer_prefix(config: ModelConfig, depth: int) -> str:
  """Name of the unrolled layer at `depth`: recursions are entries of the layer list, with blocks inside."""
  ends, per_step = config.unique_ends, config.shared_depth
  if depth < ends:
    return 'model.layers.0'
  step, layer = divmod(depth - ends, per_step)
  if step == config.recursions:
    return f'model.layers.{ends + config.recursions}'
  return f'model.layers.{ends + step}.block.{layer}'


def _router_prefix(config: ModelConfig, step: int) -> str:
  return f'model.layers.{config.unique_ends + step}.mor_router'


def _kernel(tensor: np.ndarray) -> np.ndarray:
  return tensor.T if tensor.ndim == 2 else tensor


class _Reader:
  """Takes tensors by name and remembers which were used."""

  def __init__(self, tensors: Mapping[str, np.ndarray]):
    self.tensors = tensors
    self.used: set[str] = set()

  def one(self, name: str, transform: Callable[[np.ndarray], np.ndarray] = _kernel) -> np.ndarray:
    if name not in self.tensors:
      raise ValueError(f'tensor {name} is missing')
    self.used.add(name)
    return transform(self.tensors[name])

  def shared(self, names: list[str]) -> np.ndarray:
    """The one value of a shared layer's copies; copies that were saved must be equal."""
    value = self.one(names[0])
    for name in names[1:]:
      if name in self.tensors and not np.array_equal(self.one(name), value):
        raise ValueError(
          f'{names[0]} and {name} differ, though the layers are shared; weights of this kind were '
          f'trained before the authors tied their projections and cannot be one shared layer'
        )
    return value


def _nest(flat: Mapping[str, np.ndarray]) -> dict:
  tree: dict = {}
  for path, value in flat.items():
    *parents, leaf = path.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[leaf] = value
  return tree
