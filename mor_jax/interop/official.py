"""Loads the authors' PyTorch MoR weights (safetensors) as a `Transformer` and its variables."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import safetensors.numpy
from etils import epath

from mor_jax.config import Config, ModelConfig
from mor_jax.model import sharing
from mor_jax.model.router import init_state
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
  tensors = safetensors.numpy.load(epath.Path(weights_path).read_bytes())
  config = model_config(settings)
  hidden = tensors.get(f'{_router_prefix(config, 0)}.router.0.weight')
  if hidden is not None and len(hidden) == 2 * config.d_model:
    # Their wide_mlp is as wide as their mlp, half of what the paper says.
    config = dataclasses.replace(config, router_head='mlp')
  variables, state = {}, init_state(config)
  for name in [name for name in tensors if name.endswith('router_bias')]:
    if 'bias' not in state:
      raise ValueError(f"tensor {name} belongs to loss-free balancing; set bal='loss_free'")
    state['bias'] = tensors.pop(name).reshape(-1)
  if state:
    variables['routing'] = state
  return Transformer(config), {**variables, 'params': to_params(config, tensors)}


def model_config(settings: Mapping[str, Any]) -> ModelConfig:
  """ModelConfig of a fixture's settings.

  Shape: vocab, d, ff, L, h, kv, tie, theta. Recursion: Nr, sharing, kvshare. Routing: type
  (expert, token), router, gating, temp, z; for experts cap, func, alpha, sampling; for tokens
  tfunc, talpha, bal.

  Raises:
    ValueError: a setting, or a value of one, that is not supported.
  """
  rest = {key: value for key, value in settings.items() if key not in _DESCRIPTIVE}
  expert = rest.pop('type') == 'expert'
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
    'router': 'expert_choice' if expert else 'token_choice',
    'router_head': rest.pop('router', 'linear'),
    'router_temperature': float(rest.pop('temp', 1.0)),
    'router_z_loss_weight': 0.001 if rest.pop('z', False) else 0.0,
    'gating': rest.pop('gating', 'weighted'),
  }
  capacities = tuple(float(capacity) for capacity in rest.pop('cap').split(','))
  if expert:
    fields |= {
      'capacities': capacities,
      'router_activation': rest.pop('func', 'sigmoid') or 'identity',
      'router_alpha': rest.pop('alpha', None),
      'causality': rest.pop('sampling', 'aux_loss'),
    }
  else:
    fields |= {
      'router_activation': rest.pop('tfunc', 'softmax'),
      'router_alpha': rest.pop('talpha', None),
      'balancing': rest.pop('bal', 'loss'),
    }
  if rest:
    raise ValueError(f'settings not supported: {", ".join(f"{k}={v!r}" for k, v in sorted(rest.items()))}')
  return Config().replace(model={**fields, 'kind': 'mor', 'dtype': 'float32'}).model


def to_params(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> dict:
  """Our parameter tree from the authors' tensors; also reads gradients, where each layer appears once."""
  reader = _Reader(tensors)
  params = {
    'embed': {'embedding': reader.one('model.embed_tokens.weight', np.asarray)},
    'final_norm': {'scale': reader.one('model.norm.weight')},
    'layers': _layers(config, reader),
    'router': _router(config, reader, 'mor_router'),
  }
  if config.router == 'expert_choice' and config.causality == 'aux_router':
    params['aux_router'] = _router(config, reader, 'mlp_router')
  if config.tie_embeddings:
    reader.used.add('lm_head.weight')
  else:
    params['head'] = {'kernel': reader.one('lm_head.weight')}
  left_over = sorted(set(tensors) - reader.used)
  if left_over:
    raise ValueError(f'tensors without a place in the model: {", ".join(left_over)}')
  return params


def _layers(config: ModelConfig, reader: '_Reader') -> dict:
  slots = sharing.layer_slots(config)
  layers = {}
  for name, theirs in LAYER_TENSORS.items():
    copies: list[list[str]] = [[] for _ in range(config.num_unique_layers)]
    for depth, slot in enumerate(slots):
      copies[slot].append(f'{_layer_prefix(config, depth)}.{theirs}')
    layers[name] = np.stack([reader.shared(names) for names in copies])
  return _nest(layers)


def _router(config: ModelConfig, reader: '_Reader', module: str) -> dict:
  """Router of our form from theirs: `router.weight`, or `router.0.weight` and `router.2.weight`."""
  theirs = {'output': 'router.weight'}
  if config.router_head != 'linear':
    theirs = {'hidden': 'router.0.weight', 'output': 'router.2.weight'}

  def kernel(step: int, name: str) -> np.ndarray:
    return reader.one(f'{_router_prefix(config, step, module)}.{name}')

  if config.router == 'token_choice':
    return {ours: {'kernel': kernel(0, name)} for ours, name in theirs.items()}
  steps = range(config.recursions)
  return {ours: {'kernel': np.stack([kernel(r, name) for r in steps])} for ours, name in theirs.items()}


def _layer_prefix(config: ModelConfig, depth: int) -> str:
  """Name of the unrolled layer at `depth`.

  Expert-choice has an entry of the layer list for every recursion, with the block inside;
  token-choice has one entry for all of them.
  """
  ends, per_step = config.unique_ends, config.shared_depth
  if depth < ends:
    return 'model.layers.0'
  step, layer = divmod(depth - ends, per_step)
  expert = config.router == 'expert_choice'
  if step == config.recursions:
    return f'model.layers.{ends + (config.recursions if expert else 1)}'
  if expert:
    return f'model.layers.{ends + step}.block.{layer}'
  return f'model.layers.{ends}.block_list.{step}.{layer}'


def _router_prefix(config: ModelConfig, step: int, module: str = 'mor_router') -> str:
  return f'model.layers.{config.unique_ends + step}.{module}'


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
