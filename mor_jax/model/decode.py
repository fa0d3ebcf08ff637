"""Layers of the model for lanes: some tokens each of different sequences, whose past is in the cache.

The same functions serve a chunk of a prompt (lanes x C tokens) and one token a lane (C = 1). The layers are
those of training (`layers.DecoderLayer`) with a `memory.SlotCache`. Lanes may stand at different recursion steps.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mor_jax.config import ModelConfig
from mor_jax.model import cached_attention, embedding, kernels, relaxation, sharing
from mor_jax.model.cache import Layout, Pool, num_steps
from mor_jax.model.cached_attention import View
from mor_jax.model.layers import DecoderLayer, PerLayer, RMSNorm
from mor_jax.model.memory import SlotCache
from mor_jax.model.rotary import rotation
from mor_jax.model.router import random_logits
from mor_jax.model.transformer import head_product

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
    embed, head: (V, D) and (D, V), arrays or quantised (`kernels`), the latter None for tied embeddings.
    final_norm: parameters of the last norm.
    first, last: parameters of the layers around the block; None where there are none.
    block: parameters of the N layers of the block: a tuple with one tree each (`unroll`), or one tree of
      stacked leaves.
    own: what recursion steps have of their own, leaves with a leading R axis.
    router: variables of the routers, the leaves of expert-choice with a leading R axis.
  """

  embed: Any
  head: Any
  final_norm: dict
  first: dict | None
  block: Any
  last: dict | None
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
  """One layer of a pass over the block.

  Attributes:
    layer: which parameters of the block.
    cache: which layer of the pool.
    writes: whether it has keys and values of its own there.
    own: which layer, for what steps have of their own.
    step: recursion step, where that is not the lanes' (LANES_STEP).
  """

  layer: int
  cache: int
  writes: bool = True
  own: int = 0
  step: int = LANES_STEP


def prepare(cached: CachedModel, variables: dict) -> DecodeParams:
  """Variables of a model as decoding reads them; products are in the model's dtype, as in training."""
  config = cached.config
  variables = jax.tree.map(jnp.asarray, variables)
  params = relaxation.merged(config, variables['params'])
  dtype = jnp.dtype(config.dtype)

  def cast(path, leaf):
    return leaf if path.endswith('scale') else kernels.cast(leaf, dtype)

  layers = {name: params[name] for name in ('first', 'block', 'last') if name in params}
  layers = kernels.map_paths(cast, layers)
  if cached.unroll:
    depth = config.shared_depth
    layers['block'] = tuple(jax.tree.map(lambda leaf, i=i: leaf[i], layers['block']) for i in range(depth))
  router = {name: params[name] for name in ('router', 'aux_router') if name in params}
  router |= variables.get('routing', {})
  if config.kind == 'mor' and config.random_router:
    router['noise'] = router_noise(config, cached.layout.max_len)
  head = None if config.tie_embeddings else kernels.cast(params['head']['kernel'], dtype)
  embed = kernels.cast(embedding.table(config, params['embed']), dtype)
  first, block, last = layers.get('first'), layers['block'], layers.get('last')
  return DecodeParams(embed, head, params['final_norm'], first, block, last, params.get('steps', {}), router)


def router_noise(config: ModelConfig, max_len: int) -> jax.Array:
  """What a random router gives the positions of a sequence (R, max_len): as for a single row in `Transformer`."""
  keys_R = jax.random.split(jax.random.key(0), config.recursions)
  return jax.vmap(lambda key: random_logits(key, (1, max_len))[0])(keys_R)


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
    uses.append(LayerUse(slot - ends, cache, writes, own, step))
  return uses


@jax.named_scope('end')
def apply_end(
  cached: CachedModel, params: DecodeParams, part: str, pool: Pool, x_BCD: jax.Array, lanes: Lanes
) -> tuple[jax.Array, Pool]:
  """The 'first' layer, before the recursions, or the 'last', where the model has them, on the lanes' tokens.

  Returns:
    Residual stream and updated pool.
  """
  layer, config = getattr(params, part), cached.config
  if layer is None:
    return x_BCD, pool
  if config.sliding_window is not None:
    view = lanes.view.replace(first_BC=first_in_window(config, lanes.positions_BC))
    lanes = lanes.replace(view=view)
  memory = SlotCache(lanes.view, lanes.entries_BC, cached.layout.max_len, cached.read)
  turns = rotation(config, lanes.positions_BC)
  per_layer = PerLayer(jnp.zeros((), jnp.int32), pool, rotates=sharing.rotating(config, part))
  return _layer(cached, layer, x_BCD, per_layer, memory, turns)


def first_in_window(config: ModelConfig, positions_BC: jax.Array) -> jax.Array:
  """The first position that tokens at these positions see."""
  return jnp.maximum(positions_BC - config.sliding_window + 1, 0)


def apply_block(
  cached: CachedModel, params: DecodeParams, pool: Pool, x_BCD: jax.Array, lanes: Lanes
) -> tuple[jax.Array, Pool]:
  """A pass over the block on the lanes' tokens, each with the regions and the relaxed parameters of its step.

  Returns:
    Residual stream and updated pool.
  """
  config, own = cached.config, dict(params.own)
  if 'encoding' in own:
    encoding_BCD = own.pop('encoding')['embedding'][lanes.steps_B][:, None]
    x_BCD = relaxation.encode(x_BCD, {'encoding': {'embedding': encoding_BCD}})
  turns = rotation(config, lanes.positions_BC)
  rotates_N = sharing.rotating(config, 'block')
  memory = SlotCache(
    lanes.view, lanes.entries_BC, cached_attention.largest_region(cached.layout), cached.read
  )

  def body(carry, use):
    x_BCD, pool = carry
    layer, cache, writes, own_layer, step = use
    tree = params.block[layer] if cached.unroll else jax.tree.map(lambda leaf: leaf[layer], params.block)
    steps_B = jnp.where(step == LANES_STEP, lanes.steps_B, step)
    own_of_lanes = jax.tree.map(lambda leaf: leaf[steps_B, own_layer], own)
    entries_BC = jnp.where(writes, lanes.entries_BC, pool.keys.shape[2])
    rotates = None if rotates_N is None else jnp.asarray(rotates_N)[layer]
    per_layer = PerLayer(jnp.asarray(cache), pool, own_of_lanes, rotates)
    return _layer(cached, tree, x_BCD, per_layer, memory.replace(entries_BC=entries_BC), turns), None

  columns = [dataclasses.astuple(use) for use in block_uses(config)]
  if cached.unroll or len(columns) == 1:
    for use in columns:
      (x_BCD, pool), _ = body((x_BCD, pool), use)
    return x_BCD, pool
  return jax.lax.scan(body, (x_BCD, pool), tuple(map(np.array, zip(*columns, strict=True))))[0]


def _layer(cached, params, x_BCD, per_layer, memory, turns):
  layer = DecoderLayer(cached.config, parent=None)
  return layer.apply({'params': params}, x_BCD, per_layer, memory, turns)


def embed(cached: CachedModel, params: DecodeParams, tokens: jax.Array) -> jax.Array:
  """Embeddings (..., D) of token ids."""
  return kernels.rows(params.embed, tokens).astype(cached.config.dtype)


def logits(cached: CachedModel, params: DecodeParams, x_BD: jax.Array) -> jax.Array:
  """Logits (B, V) in float32 of the last layer's output."""
  x_BD = RMSNorm(cached.config, parent=None).apply({'params': params.final_norm}, x_BD)
  if params.head is None and isinstance(params.embed, kernels.Quantised):
    return params.embed.product_with_rows(x_BD.astype(jnp.float32))
  return head_product(cached.config, x_BD, params.embed.T if params.head is None else params.head)
