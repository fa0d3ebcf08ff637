"""One table of names: which tensor of another library's checkpoint is which part of our variables.

The other side names every unrolled layer and stores kernels as (outputs, inputs); ours stacks the layers of
the block on a leading axis. Where layers are shared, several names mean the same part.
"""

import dataclasses
import itertools
from collections.abc import Iterator

import jax
import numpy as np
from flax import linen as nn

from mor_jax.config import ModelConfig
from mor_jax.model import sharing
from mor_jax.model.layers import projections
from mor_jax.model.transformer import abstract_variables

# Our leaf of one layer: the tensor's name below the layer's prefix. Some models have more (`layer`).
LAYER = {
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
_QK_NORM = {
  'attention/query_norm/scale': 'self_attn.q_norm.weight',
  'attention/key_norm/scale': 'self_attn.k_norm.weight',
}
EMBEDDING, HEAD = 'model.embed_tokens.weight', 'lm_head.weight'


@dataclasses.dataclass(frozen=True)
class Place:
  """A part of our variables: a leaf, or one entry of it along its leading axis."""

  leaf: str
  index: int | None = None

  @property
  def is_transposed(self) -> bool:
    """Whether the other side stores it as (outputs, inputs)."""
    return self.leaf.endswith('kernel')

  def shape(self, leaf_shape: tuple[int, ...]) -> tuple[int, ...]:
    """The tensor's shape on the other side."""
    shape = leaf_shape if self.index is None else leaf_shape[1:]
    return shape[::-1] if self.is_transposed else shape

  def cut(self, leaf: np.ndarray) -> np.ndarray:
    """The tensor as the other side has it, a view of our leaf."""
    part = leaf if self.index is None else leaf[self.index]
    return part.T if self.is_transposed else part


Table = dict[str, Place]  # name of a tensor -> its place


def llama(config: ModelConfig) -> Table:
  """Names of a Llama checkpoint; a recursive model has those of its unrolled depth, as the authors' code does."""
  table = _around_layers(config)
  for depth, slot in enumerate(sharing.layer_slots(config)):
    table |= _layer(config, f'model.layers.{depth}', sharing.place(config, slot))
  return table


def official(config: ModelConfig) -> Table:
  """Names of the authors' PyTorch checkpoints, where a tied head is stored as well.

  An expert-choice model has an entry of its layer list for every recursion, with the block inside and a
  router of its own; a token-choice model has one entry and one router for all of them.
  """
  table = (_around_layers(config) if config.kind == 'mor' else llama(config)) | _tied_head(config)
  if config.kind != 'mor':
    return table
  ends, is_expert = config.unique_ends, config.router == 'expert_choice'
  entries = config.recursions if is_expert else 1
  for depth, slot in enumerate(sharing.layer_slots(config)):
    step, layer = divmod(depth - ends, config.shared_depth)
    if depth < ends:
      prefix = 'model.layers.0'
    elif step == config.recursions:
      prefix = f'model.layers.{ends + entries}'
    elif is_expert:
      prefix = f'model.layers.{ends + step}.block.{layer}'
    else:
      prefix = f'model.layers.{ends}.block_list.{step}.{layer}'
    table |= _layer(config, prefix, sharing.place(config, slot))
  if config.random_router:
    return table
  routers = {'router': 'mor_router', **({'aux_router': 'mlp_router'} if config.has_aux_router else {})}
  for (ours, theirs), entry in itertools.product(routers.items(), range(entries)):
    kernels = (
      {'output': 'weight'} if config.router_head == 'linear' else {'hidden': '0.weight', 'output': '2.weight'}
    )
    for kernel, name in kernels.items():
      place = Place(f'params/{ours}/{kernel}/kernel', entry if is_expert else None)
      table[f'model.layers.{ends + entry}.{theirs}.router.{name}'] = place
  if config.router == 'token_choice' and config.balancing == 'loss_free':
    table[f'model.layers.{ends}.router_bias'] = Place('routing/bias')
  return table


def _around_layers(config: ModelConfig) -> Table:
  table = {EMBEDDING: Place('params/embed/embedding'), 'model.norm.weight': Place('params/final_norm/scale')}
  if not config.tie_embeddings:
    table[HEAD] = Place('params/head/kernel')
  return table


def _tied_head(config: ModelConfig) -> Table:
  return {HEAD: Place('params/embed/embedding')} if config.tie_embeddings else {}


def layer(config: ModelConfig) -> dict[str, str]:
  """Our leaf of one layer -> the tensor's name below the layer's prefix."""
  biases = {}
  for name, projection in projections(config).items():
    if projection.has_bias:
      biases[f'{name}/bias'] = f'{LAYER[f"{name}/kernel"].removesuffix("weight")}bias'
  return LAYER | biases | (_QK_NORM if config.qk_norm else {})


def _layer(config: ModelConfig, prefix: str, place: sharing.Place) -> Table:
  return {
    f'{prefix}.{theirs}': Place(f'params/{place.part}/{ours}', place.index)
    for ours, theirs in layer(config).items()
  }


# ---- our side ----


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Shape of every leaf of a model's variables by its path, 'params/block/mlp/up/kernel'."""
  return {path: leaf.shape for path, leaf in leaves(nn.unbox(abstract_variables(config)))}


def leaves(tree: dict) -> Iterator[tuple[str, jax.Array]]:
  """(path, leaf) of nested dicts; of a quantised matrix its values and scales."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    yield jax.tree_util.keystr(path, simple=True, separator='/'), leaf


def nest(flat: dict[str, np.ndarray]) -> dict:
  """The nested dicts of leaves by path."""
  tree: dict = {}
  for path, value in flat.items():
    *parents, name = path.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = value
  return tree
