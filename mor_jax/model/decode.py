"""Layers of the model for lanes: some tokens each of different sequences, whose past is in the cache.

The same functions serve a chunk of a prompt (lanes x C tokens) and one token a lane (C = 1). The
tokens' keys and values are written first, then they attend to the updated cache, themselves
included: so a quantised cache gives prefill and decoding the same numbers, and XLA need not copy it.
Lanes may stand at different recursion steps.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mor_jax.config import ModelConfig
from mor_jax.model import cache as cache_lib
from mor_jax.model import cached_attention, sharing
from mor_jax.model.cache import Layout, Pool, num_steps
from mor_jax.model.cached_attention import View
from mor_jax.model.layers import rotate, rotation
from mor_jax.model.router import random_logits

LANES_STEP = -1


@dataclasses.dataclass(frozen=True)
class CachedModel:
  """Static choices of cached inference.

  Attributes:
    config: the model.
    layout: regions of a slot.
    unroll: compile every layer separately, with weights that need not be sliced out of a stack
      (the fastest on CPU), in place of one scan.
    read: how the cache is read (`cached_attention`).
  """

  config: ModelConfig
  layout: Layout
  unroll: bool
  read: str


@struct.dataclass
class DecodeParams:
  """Variables of the model as decoding reads them.

  Attributes:
    embed, head: (V, D) and (D, V), the latter None for tied embeddings.
    layers: all U unique layers: a tuple with one tree each (`unroll`), or one tree of stacked leaves.
    own: what recursion steps have of their own, leaves with a leading R axis.
    router: variables of the routers, the leaves of expert-choice with a leading R axis.
  """

  embed: jax.Array
  head: jax.Array | None
  final_norm: jax.Array
  layers: Any
  own: dict
  router: dict


@struct.dataclass
class Lanes:
  """Where the C tokens of each lane stand.

  Attributes:
    view: what they read; has the lanes' slots.
    positions_BC: their positions in the sequence.
    entries_BC: entries that they write; too large ones write nothing.
    steps_B: recursion step of each lane.
  """

  view: View
  positions_BC: jax.Array
  entries_BC: jax.Array
  steps_B: jax.Array


@dataclasses.dataclass(frozen=True)
class LayerUse:
  """One layer of a pass: its slot among the unique layers and in the pool, and what it does.

  Attributes:
    slot: which parameters.
    cache: which layer of the pool.
    writes: whether it has keys and values of its own there.
    own: which layer of the block, for what steps have of their own.
    step: recursion step, where that is not the lanes' (LANES_STEP).
  """

  slot: int
  cache: int
  writes: bool = True
  own: int = 0
  step: int = LANES_STEP


def prepare(cached: CachedModel, variables: dict) -> DecodeParams:
  """Variables of a model as decoding reads them; products are in the model's dtype, as in training."""
  config = cached.config
  variables = jax.tree.map(jnp.asarray, variables)
  params = variables['params']
  dtype = jnp.dtype(config.dtype)

  def cast(path, leaf):
    return leaf if path[-1].key == 'scale' else leaf.astype(dtype)

  layers = jax.tree_util.tree_map_with_path(cast, params['layers'])
  if cached.unroll:
    layers = tuple(jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in range(config.num_unique_layers))
  router = {name: params[name] for name in ('router', 'aux_router') if name in params}
  router |= variables.get('routing', {})
  if config.kind == 'mor' and config.random_router:
    router['noise'] = router_noise(config, cached.layout.max_len)
  head = None if config.tie_embeddings else params['head']['kernel'].astype(dtype)
  embed = params['embed']['embedding'].astype(dtype)
  return DecodeParams(embed, head, params['final_norm']['scale'], layers, params.get('steps', {}), router)


def router_noise(config: ModelConfig, max_len: int) -> jax.Array:
  """What a random router gives the positions of a sequence (R, max_len): as for a single row in `Transformer`."""
  keys_R = jax.random.split(jax.random.key(0), config.recursions)
  return jax.vmap(lambda key: random_logits(key, (1, max_len))[0])(keys_R)


# ---- which layers make a pass ----


def first_uses(config: ModelConfig) -> list[LayerUse]:
  """The layer before the recursions, where there is one."""
  return [LayerUse(0, 0)] * config.unique_ends


def last_uses(config: ModelConfig) -> list[LayerUse]:
  """The layer after the recursions, where there is one."""
  return [LayerUse(config.num_unique_layers - 1, 0)] * config.unique_ends


def block_uses(config: ModelConfig) -> list[LayerUse]:
  """The layers of one pass; where layers follow one another instead of passes, all of them."""
  ends = config.unique_ends
  depth = (config.num_layers - 2 * ends) // num_steps(config)
  slots = sharing.layer_slots(config)[ends : ends + depth]
  cycles = config.sharing.endswith('cycle')
  own_per_pass = depth if cycles else depth // config.recursions
  uses = []
  for index, slot in enumerate(slots):
    own, step = (index, LANES_STEP) if cycles else divmod(index, depth // own_per_pass)
    cache, writes = index, True
    if config.kv == 'shared':
      shared = (config.num_layers - 2 * ends) // config.passes  # layers that keys and values differ in
      cache, turn = (index % shared, index // shared) if cycles else divmod(index, config.passes)
      writes = turn == 0
    uses.append(LayerUse(slot, cache, writes, own, step))
  return uses


# ---- layers ----


def apply_layers(
  cached: CachedModel,
  params: DecodeParams,
  uses: list[LayerUse],
  pool: Pool,
  x_BCD: jax.Array,
  lanes: Lanes,
  in_block: bool = False,
) -> tuple[jax.Array, Pool]:
  """Applies layers in order to the lanes' tokens.

  Args:
    uses: the layers.
    pool: their keys and values; the lanes' are added.
    x_BCD: residual stream.
    in_block: these are layers of the shared block, with regions and relaxed parameters of the steps.

  Returns:
    Residual stream and updated pool.
  """
  if not uses:
    return x_BCD, pool
  config = cached.config
  cos_sin = rotation(config, lanes.positions_BC)
  own = params.own if in_block else {}
  region = cached_attention.largest_region(cached.layout) if in_block else cached.layout.max_len
  if 'encoding' in own:
    x_BCD += own['encoding']['embedding'][lanes.steps_B][:, None].astype(x_BCD.dtype)

  def body(carry, use):
    x_BCD, pool = carry
    slot, cache, writes, own_layer, step = use
    layer = params.layers[slot] if cached.unroll else jax.tree.map(lambda leaf: leaf[slot], params.layers)
    steps_B = jnp.where(step == LANES_STEP, lanes.steps_B, step)
    own_of_layer = {name: tree for name, tree in own.items() if name != 'encoding'}
    own_of_layer = jax.tree.map(lambda leaf: leaf[steps_B, own_layer], own_of_layer)
    entries_BC = jnp.where(writes, lanes.entries_BC, pool.keys.shape[3])
    view = lanes.view
    return _layer(cached, layer, own_of_layer, pool, cache, x_BCD, cos_sin, view, region, entries_BC), None

  columns = [dataclasses.astuple(use) for use in uses]
  if cached.unroll or len(uses) == 1:
    for use in columns:
      (x_BCD, pool), _ = body((x_BCD, pool), use)
    return x_BCD, pool
  (x_BCD, pool), _ = jax.lax.scan(body, (x_BCD, pool), tuple(map(np.array, zip(*columns, strict=True))))
  return x_BCD, pool


def _layer(cached, layer, own, pool, cache, x_BCD, cos_sin, view, region, entries_BC):
  """A decoder layer (`layers.DecoderLayer`) whose keys and values go to the cache and come from there."""
  config = cached.config
  attention, mlp, lora, norms = layer['attention'], layer['mlp'], own.get('lora', {}), own.get('norms', {})
  batch, length, _ = x_BCD.shape

  def linear(x_BCI, group, name):
    kernel = (attention if group == 'attention' else mlp)[name]['kernel']
    y_BCO = (x_BCI.reshape(-1, x_BCI.shape[-1]) @ kernel).reshape(batch, length, -1)
    if f'{group}_{name}' not in lora:
      return y_BCO
    factors = lora[f'{group}_{name}']
    low_BCr = x_BCI.astype(jnp.float32) @ factors['down']
    change_BCO = config.lora_alpha / config.lora_rank * (low_BCr @ factors['up'])
    return (y_BCO + change_BCO).astype(x_BCI.dtype)

  def normed(x_BCD, name):
    change_B1D = norms[name]['scale'][:, None] if name in norms else 0
    return rms_norm(config, x_BCD, layer[name]['scale'] + change_B1D)

  def heads(x_BCD, name, count):
    return linear(x_BCD, 'attention', name).reshape(batch, length, count, -1)

  inner_BCD = normed(x_BCD, 'attention_norm')
  q_BCHE = rotate(heads(inner_BCD, 'query', config.num_heads), *cos_sin)
  k_BCKE = rotate(heads(inner_BCD, 'key', config.num_kv_heads), *cos_sin)
  v_BCKE = heads(inner_BCD, 'value', config.num_kv_heads)
  pool = cache_lib.write(pool, cache, view.slots_B, entries_BC, k_BCKE, v_BCKE)
  out_BCHE = cached_attention.attend(q_BCHE, pool, cache, view, region, cached.read)
  x_BCD = x_BCD + linear(out_BCHE.reshape(batch, length, -1), 'attention', 'output')
  inner_BCD = normed(x_BCD, 'mlp_norm')
  hidden_BCF = jax.nn.silu(linear(inner_BCD, 'mlp', 'gate')) * linear(inner_BCD, 'mlp', 'up')
  return x_BCD + linear(hidden_BCF, 'mlp', 'down'), pool


def rms_norm(config: ModelConfig, x: jax.Array, scale: jax.Array) -> jax.Array:
  """RMSNorm as in `layers.norm`, with a scale that may differ from lane to lane."""
  x32 = x.astype(jnp.float32)
  root = jax.lax.rsqrt(jnp.square(x32).mean(axis=-1, keepdims=True) + config.norm_epsilon)
  return (x32 * (root * scale)).astype(jnp.dtype(config.dtype))


def embed(params: DecodeParams, tokens: jax.Array) -> jax.Array:
  """Embeddings (..., D) of token ids."""
  return params.embed[tokens]


def logits(cached: CachedModel, params: DecodeParams, x_BD: jax.Array) -> jax.Array:
  """Logits (B, V) in float32 of the last layer's output."""
  x_BD = rms_norm(cached.config, x_BD, params.final_norm)
  head_DV = params.embed.T if params.head is None else params.head
  return jnp.dot(x_BD, head_DV, preferred_element_type=jnp.float32)
