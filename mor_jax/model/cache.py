"""KV caches of static size: where keys and values of a sequence lie, and how they get there and back.

A cache holds some sequences, each in a slot. For the layers of the shared block, a slot has one
region per recursion step, as large as that step may take tokens (`ModelConfig.step_places`), so that
memory shrinks with the capacities; under recursive KV sharing one region serves all steps. The
unique layers before and after have one region of full length. Within a region entries stand in
order of position. Pools are written and read, never copied.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mor_jax.config import ModelConfig
from mor_jax.model import axes, kernels

# int4 has two numbers in a byte.
DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16, 'int8': jnp.int8, 'int4': kernels.PACKED}
LARGEST = {'int8': 127, 'int4': 7}
TILE, LANES = 8, 128  # rows and columns of a tile of a TPU
POOL_AXES = ('layers', 'batch', None, 'kv_heads')  # logical names of the axes of a pool's leaves
POOL_LEAVES = ('keys', 'values', 'key_scales', 'value_scales')


@dataclasses.dataclass(frozen=True)
class Layout:
  """Sizes of one slot of the shared block's pool, the same for each of its layers.

  Attributes:
    max_len: longest sequence.
    places: tokens of a sequence that each step may take, one entry for each of the P steps.
    always: steps of capacity 1, which never refuse a token.
    offsets: where each step's region begins.
    entries: entries of a slot, all regions together, in whole tiles.
    width: numbers of an entry: K x E, and what fills the last tile (`make_layout`).
    kv: 'recursion_wise', 'shared' (all steps read the first region, which the first step writes), or
      'hybrid' (each step writes its own region; a step reads, of every token, the latest that was
      written up to this step).
  """

  max_len: int
  places: tuple[int, ...]
  always: tuple[bool, ...]
  offsets: tuple[int, ...]
  entries: int
  width: int
  kv: str


def make_layout(
  config: ModelConfig, max_len: int, slack: float, steps: int | None = None, tiled: bool = False
) -> Layout:
  """The layout for sequences of up to `max_len` tokens.

  Args:
    slack: places of a step per token that it takes on average (`ModelConfig.step_places`).
    steps: recursions there shall be room for; default all.
    tiled: fill entries up to whole tiles of a TPU, where they take as much anyway; it would else keep the pools in
      another order outside its programs, and bring them into this one in each.
  """
  count = num_steps(config) if steps is None else min(steps, num_steps(config))
  capacities = config.step_capacities[:count]
  always = tuple(capacity == 1.0 for capacity in capacities)
  limited = config.step_places(max_len, slack)[:count]
  places = tuple(max_len if free else size for free, size in zip(always, limited, strict=True))
  regions = places if config.kv != 'shared' else (max_len, *(0,) * (count - 1))
  offsets = (0, *np.cumsum(regions[:-1]).tolist())
  if config.kv == 'shared':
    offsets = (0,) * count
  width = config.num_kv_heads * config.head_width
  width = _whole_tiles(width, LANES) if tiled else width
  return Layout(max_len, places, always, offsets, _whole_tiles(sum(regions)), width, config.kv)


def _whole_tiles(size: int, tile: int = TILE) -> int:
  """So many at least; slots begin where a tile of a TPU does in the matrix whose rows are a pool's entries."""
  return -(-size // tile) * tile


def num_steps(config: ModelConfig) -> int:
  """Times P that a token may pass through the shared block: R, or 1 where its layers follow one another."""
  return config.recursions if config.sharing.endswith('cycle') else 1


@struct.dataclass
class Pool:
  """Keys and values of some layers.

  An entry is one run of K x E numbers: written and read as a whole, it makes no layout better for one than for the
  other (a TPU would copy the whole pool from one to the other and back in every layer), and fills its tiles.

  Attributes:
    keys, values: (layers, slots, entries, K x E, or `Layout.width`) in the cache's dtype; of int4 half as wide.
    key_scales, value_scales: (layers, slots, entries, K) of an int8 or int4 cache, one for each head of
      each entry; else None.
  """

  keys: jax.Array
  values: jax.Array
  key_scales: jax.Array | None
  value_scales: jax.Array | None


@struct.dataclass
class Cache:
  """The cache of a number of slots.

  Attributes:
    first, block, last: pools of the layers before the recursions, of the shared block, and after.
    versions: under kv='hybrid', (slots, P, max_len): the entry that a step reads for each position.
    positions: (slots, entries) of the tokens in the shared block's regions, where a window must know them.
  """

  first: Pool
  block: Pool
  last: Pool
  versions: jax.Array | None
  positions: jax.Array | None = None


def init_cache(config: ModelConfig, layout: Layout, slots: int, dtype: str) -> Cache:
  """An empty cache. Raises ValueError for an unknown dtype."""
  if dtype not in DTYPES:
    raise ValueError(f'cache dtype {dtype!r} is not one of {", ".join(DTYPES)}')

  def pool(layers: int, entries: int) -> Pool:
    heads, shape = config.num_kv_heads, (layers, slots, _whole_tiles(entries))
    scales = [jnp.zeros((*shape, heads)) if dtype in LARGEST else None for _ in range(2)]
    width = layout.width // 2 if dtype == 'int4' else layout.width
    return Pool(*(jnp.zeros((*shape, width), DTYPES[dtype]) for _ in range(2)), *scales)

  ends, versions, positions = config.unique_ends, None, None
  if config.sliding_window is not None and config.kind == 'mor' and layout.kv == 'recursion_wise':
    positions = jnp.zeros((slots, layout.entries), jnp.int32)
  if layout.kv == 'hybrid':
    versions = jnp.zeros((slots, len(layout.places), layout.max_len), jnp.int32)
  return Cache(
    pool(ends, layout.max_len),
    pool(block_caches(config), layout.entries),
    pool(ends, layout.max_len),
    versions,
    positions,
  )


def element_bytes(dtype: str) -> float:
  """Bytes of a number of keys or values."""
  return 0.5 if dtype == 'int4' else jnp.dtype(DTYPES[dtype]).itemsize


def block_caches(config: ModelConfig) -> int:
  """Layers of the block's pool: each layer of a pass has one, unless it reads that of another."""
  depth = (config.num_layers - 2 * config.unique_ends) // num_steps(config)
  if config.kv != 'shared':
    return depth
  return (config.num_layers - 2 * config.unique_ends) // config.passes


def allocated_bytes(cache: Cache) -> int:
  """Bytes of keys, values and their scales."""
  return sum(leaf.nbytes for leaf in jax.tree.leaves((cache.first, cache.block, cache.last)))


def write(
  pool: Pool,
  layer: int | jax.Array,
  slots_B: jax.Array,
  entries_BC: jax.Array,
  k_BCKE: jax.Array,
  v_BCKE: jax.Array,
  as_matrix: bool = False,
) -> Pool:
  """Puts keys and values into their entries; what lies outside the pool (an entry too large) is dropped.

  Args:
    as_matrix: write rows of a matrix. For places in several axes a TPU brings the whole pool into another order first,
      and back; a CPU copies it to see it as a matrix.
  """

  def put(leaf: jax.Array, new_BCK: jax.Array) -> jax.Array:
    layers, slots, entries, width = leaf.shape
    new_BCN = new_BCK.reshape(*entries_BC.shape, -1).astype(leaf.dtype)
    new_BCN = jnp.pad(new_BCN, ((0, 0), (0, 0), (0, width - new_BCN.shape[-1])))
    if not as_matrix:
      written = leaf.at[layer, slots_B[:, None], entries_BC].set(new_BCN, mode='drop')
      return axes.constrain(written, *POOL_AXES)
    rows_BC = (layer * slots + slots_B[:, None]) * entries + entries_BC
    rows_BC = jnp.where(entries_BC < entries, rows_BC, layers * slots * entries)
    written = leaf.reshape(-1, width).at[rows_BC].set(new_BCN, mode='drop')
    return axes.constrain(written.reshape(leaf.shape), *POOL_AXES)

  if pool.key_scales is None:
    return pool.replace(keys=put(pool.keys, k_BCKE), values=put(pool.values, v_BCKE))
  is_packed = pool.keys.dtype == kernels.PACKED
  largest = LARGEST['int4' if is_packed else 'int8']
  k_BCKE, key_scales_BCK = quantize(k_BCKE, largest)
  v_BCKE, value_scales_BCK = quantize(v_BCKE, largest)
  if is_packed:
    k_BCKE, v_BCKE = (kernels.pack(a_BCKE[..., None])[..., 0] for a_BCKE in (k_BCKE, v_BCKE))
  return Pool(
    put(pool.keys, k_BCKE),
    put(pool.values, v_BCKE),
    put(pool.key_scales, key_scales_BCK),
    put(pool.value_scales, value_scales_BCK),
  )


def numbers(stored: jax.Array) -> jax.Array:
  """Keys or values (..., K x E) as they are stored, one by one."""
  return kernels.unpack(stored[..., None])[..., 0] if stored.dtype == kernels.PACKED else stored


def quantize(x_BCKE: jax.Array, largest: int = LARGEST['int8']) -> tuple[jax.Array, jax.Array]:
  """Integers from -largest to largest and the factor of each head, (B, C, K), that gives the values back."""
  x_BCKE = x_BCKE.astype(jnp.float32)
  scale_BCK = jnp.maximum(jnp.abs(x_BCKE).max(axis=-1), 1e-12) / largest
  return jnp.round(x_BCKE / scale_BCK[..., None]), scale_BCK


def copy_slots(cache: Cache, slots_B: jax.Array, source: Cache, lanes_B: jax.Array) -> Cache:
  """The cache with what lanes of another cache of the same layout hold in slots; those beyond the last are dropped."""

  def put(leaf: jax.Array, other: jax.Array) -> jax.Array:
    return leaf.at[:, slots_B].set(other[:, lanes_B], mode='drop')

  pools = [
    jax.tree.map(put, getattr(cache, name), getattr(source, name)) for name in ('first', 'block', 'last')
  ]

  def put_table(table: jax.Array, other: jax.Array) -> jax.Array:
    return table.at[slots_B].set(other[lanes_B], mode='drop')

  tables = (cache.versions, cache.positions), (source.versions, source.positions)
  return Cache(*pools, *jax.tree.map(put_table, *tables))
