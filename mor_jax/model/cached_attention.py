"""Attention from a few tokens of each lane to the part of the cache that belongs to them.

Lanes of one batch may stand at different recursion steps, hence read regions of different places and
sizes. Three ways, which give the same:

* 'lanes': one lane after the other, each reading a slice just long enough for what it may see. The
  fastest on CPU;
* 'gather': all lanes at once, as many entries as the longest region has. For GPUs, where lanes must
  not wait for each other;
* 'groups': some lanes after the others, so many that what they read stays on the chip, and no larger a part of the
  longest region than they see. For TPUs, which would else write what they read to memory and read it again. Lanes that
  see about as many should be neighbours (`order`).

Where entries are scattered (kv='hybrid') they are gathered one by one, whichever of them is asked for.
"""

import itertools
import math

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental import layout as layouts

from mor_jax.model import axes
from mor_jax.model.attention_xla import MASKED_SCORE
from mor_jax.model.cache import POOL_AXES, TILE, Layout, Pool, numbers

SMALLEST_EXTENT = 64
READS = ('lanes', 'gather', 'groups')
# What a group reads at most: bytes of keys, and of values as many, well within the 64 to 128 MiB on a TPU's chip; lanes,
# each of which is a slice of its own in the program.
GROUP_BYTES, GROUP_LANES = 2**23, 8
# Of the largest region, what a group may read: regions of 2, 3 and 4 recursions.
PARTS = tuple(twelfths / 12 for twelfths in (3, 4, 6, 8, 9, 12))
READ_AXES = (None, *POOL_AXES[2:])  # of what lanes read of a layer: lanes, entries, heads


@struct.dataclass
class View:
  """What the C tokens of each lane may read.

  Attributes:
    slots_B: slot of the lane.
    base_B: first entry of the region.
    limit_BC: entries of the region that the token sees, counted from `base_B`.
    first_BC: the first of them that it sees, for a window; None: all.
    entries_BS: under kv='hybrid', in place of base_B: where the entry of each position lies.
  """

  slots_B: jax.Array
  base_B: jax.Array
  limit_BC: jax.Array
  first_BC: jax.Array | None = None
  entries_BS: jax.Array | None = None

  def sees(self, index_S: jax.Array) -> jax.Array:
    """Mask (B, C, S) of entries of a region by their number in it, (S,) or (B, 1, S)."""
    before_BCS = index_S < self.limit_BC[..., None]
    return before_BCS if self.first_BC is None else before_BCS & (index_S >= self.first_BC[..., None])

  def from_first(self) -> 'View':
    """The same with regions that begin where the first token of each lane begins to see."""
    skipped_B = self.first_BC.min(axis=1)
    limit_BC, first_BC = (a_BC - skipped_B[:, None] for a_BC in (self.limit_BC, self.first_BC))
    return self.replace(base_B=self.base_B + skipped_B, limit_BC=limit_BC, first_BC=first_BC)


def attend(
  q_BCHE: jax.Array,
  pool: Pool,
  layer: int | jax.Array,
  view: View,
  kv_heads: int,
  region: int,
  read: str,
  window: int | None = None,
) -> jax.Array:
  """Scaled dot-product attention (B, C, H, E) of queries to the cache of one layer.

  Args:
    q_BCHE: rotated queries; head h reads key/value head h // (H / K).
    kv_heads: K.
    region: entries of the largest region.
    read: one of READS.
    window: positions that a token sees, as `view.first_BC` says; None: all.
  """
  batch, length, heads, width = q_BCHE.shape
  q_BKGCE = (q_BCHE * width**-0.5).reshape(batch, length, kv_heads, -1, width).transpose(0, 2, 3, 1, 4)
  if view.entries_BS is not None:
    out_BKGCE = _scattered(q_BKGCE, pool, layer, view)
  else:
    most = min(region, pool.keys.shape[2])
    if window is not None:
      view = view.from_first()
      most = min(most, window) if length == 1 else most  # several may stand far from each other
    if read == 'gather':
      out_BKGCE = _all_lanes(q_BKGCE, pool, layer, view, most)
    elif read == 'lanes':
      out_BKGCE = _lane_by_lane(q_BKGCE, pool, layer, view, extents(most))
    else:
      out_BKGCE = _in_groups(q_BKGCE, pool, layer, view, lengths(most))
  return out_BKGCE.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, width)


def extents(region: int) -> tuple[int, ...]:
  """Lengths that a slice may have: powers of 2 up to the region's size; each is compiled for each layer."""
  powers = itertools.takewhile(lambda size: size < region, (SMALLEST_EXTENT * 2**n for n in range(32)))
  return (*powers, region)


def lengths(region: int) -> tuple[int, ...]:
  """What a group of lanes may read of a region, rising: PARTS of it in whole tiles, and all."""
  whole_tiles = (math.ceil(region * part / TILE) * TILE for part in PARTS)
  return tuple(sorted({min(size, region) for size in whole_tiles}))


def order(seen_B: jax.Array) -> jax.Array:
  """Numbers of lanes (B,) in the order in which groups of them read least, by the entries that each sees."""
  return jnp.argsort(-seen_B, stable=True)


def _lane_by_lane(q_BKGCE, pool, layer, view, sizes):
  index_B = jnp.searchsorted(jnp.array(sizes), view.limit_BC.max(axis=1))

  def branch(size: int):
    def run(lane):
      q_KGCE, view = jax.tree.map(lambda leaf: leaf[None], lane)
      return _all_lanes(q_KGCE, pool, layer, view, size)[0]

    return run

  branches = [branch(size) for size in sizes]

  def one(args):
    index, lane = args
    return branches[0](lane) if len(branches) == 1 else jax.lax.switch(index, branches, lane)

  return jax.lax.map(one, (index_B, (q_BKGCE, view)))


def _gathered(pool, layer, view, region):
  return jax.vmap(lambda slot, base: _slice(pool, layer, slot, base, region))(view.slots_B, view.base_B)


def _all_lanes(q_BKGCE, pool, layer, view, region, read=_gathered):
  found, before_B = read(pool, layer, view, region)
  index_B1S = jnp.arange(region) - before_B[:, None, None]
  return _softmax_attention(q_BKGCE, found, view.sees(index_B1S) & (index_B1S >= 0))


def groups_of(lanes: int, lane_bytes: int) -> tuple[int, int]:
  """How many groups so many lanes are read in, each of which may read so many bytes of keys; and lanes of a group."""
  groups = -(-lanes // min(max(GROUP_BYTES // lane_bytes, 1), GROUP_LANES))
  return groups, -(-lanes // groups)


def _slices(pool, layer, view, region):
  """As `_gathered`, a slice for each lane: for a gather of some a TPU brings the whole pool into another order."""
  lanes = [_slice(pool, layer, *lane, region) for lane in zip(view.slots_B, view.base_B, strict=True)]
  found, before_B = jax.tree.map(lambda *leaves: jnp.stack(leaves), *lanes)
  # On each device for its heads: to the compiler the constraint is a program that it cannot split.
  as_it_lies = axes.per_shard(_as_it_lies, READ_AXES, READ_AXES)
  return jax.tree.map(as_it_lies, found), before_B


def _as_it_lies(leaf):
  """The same, of which a TPU brings what was read into another order if it wants one, not the pool."""
  return layouts.with_layout_constraint(leaf, layouts.Layout(tuple(range(leaf.ndim))))


def _in_groups(q_BKGCE, pool, layer, view, sizes):
  batch = q_BKGCE.shape[0]
  groups, each = groups_of(batch, sizes[-1] * pool.keys.shape[3] * pool.keys.dtype.itemsize)
  idle = groups * each - batch  # lanes that see nothing

  def split(leaf):
    filled = jnp.pad(leaf, ((0, idle), *((0, 0),) * (leaf.ndim - 1)))
    return filled.reshape(groups, each, *leaf.shape[1:])

  def branch(size: int):
    return lambda q_BKGCE, view: _all_lanes(q_BKGCE, pool, layer, view, size, _slices)

  def one(group):
    q_BKGCE, view = group
    index = jnp.searchsorted(jnp.array(sizes), view.limit_BC.max())
    return jax.lax.switch(index, [branch(size) for size in sizes], q_BKGCE, view)

  out = jax.lax.map(one, jax.tree.map(split, (q_BKGCE, view)))
  return out.reshape(groups * each, *q_BKGCE.shape[1:])[:batch]


def _slice(pool, layer, slot, base, size):
  """So many entries (S, ...) of a slot, with those of a region; and how many of them lie before it.

  A slice that would reach beyond the pool starts earlier.
  """
  start = jnp.minimum(base, pool.keys.shape[2] - size)

  def read(leaf):
    return jax.lax.dynamic_slice(leaf, (layer, slot, start, 0), (1, 1, size, leaf.shape[3]))[0, 0]

  return jax.tree.map(read, pool), base - start


def _scattered(q_BKGCE, pool, layer, view):
  visible_BCS = view.sees(jnp.arange(view.entries_BS.shape[1]))

  def read(leaf):
    return leaf.at[layer, view.slots_B[:, None], view.entries_BS].get(mode='clip')

  return _softmax_attention(q_BKGCE, jax.tree.map(read, pool), visible_BCS)


def _softmax_attention(q_BKGCE, cached: Pool, visible_BCS):
  """Attention to keys and values (B, S, K x E) as they are stored; scales of integers go to scores and weights."""
  batch, kv_heads, groups, length, width = q_BKGCE.shape
  dtype = q_BKGCE.dtype
  q_BKME = q_BKGCE.reshape(batch, kv_heads, groups * length, width)
  k_BSKE, v_BSKE = (
    numbers(leaf)[..., : kv_heads * width].astype(dtype).reshape(*leaf.shape[:2], kv_heads, width)
    for leaf in (cached.keys, cached.values)
  )
  scores_BKMS = jnp.einsum('bkme,bske->bkms', q_BKME, k_BSKE, preferred_element_type=jnp.float32)
  if cached.key_scales is not None:
    scores_BKMS = scores_BKMS * _by_head(cached.key_scales)
  scores_BKGCS = scores_BKMS.reshape(batch, kv_heads, groups, length, -1)
  scores_BKGCS = jnp.where(visible_BCS[:, None, None], scores_BKGCS, MASKED_SCORE)
  weights_BKMS = jax.nn.softmax(scores_BKGCS).reshape(scores_BKMS.shape)
  if cached.value_scales is not None:
    weights_BKMS = weights_BKMS * _by_head(cached.value_scales)
  out_BKME = jnp.einsum('bkms,bske->bkme', weights_BKMS.astype(dtype), v_BSKE)
  return out_BKME.reshape(q_BKGCE.shape)


def _by_head(scales_BSK: jax.Array) -> jax.Array:
  return scales_BSK.transpose(0, 2, 1)[:, :, None, :]


def largest_region(layout: Layout) -> int:
  """Entries of the longest region that a token may read."""
  return layout.max_len if layout.kv == 'shared' else max(layout.places)
