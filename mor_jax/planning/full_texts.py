"""What a tick reads of texts at their full length: entries of each lane, and which branches of a program read them.

On TPUs lanes are read in groups, each as far as the longest of them needs (`cached_attention`): a program has one branch
for each length, and a conditional takes one of them. How often is known where every text is at full length and the
lanes stand at the recursions in proportion to the tokens that take them.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from mor_jax.model import cache as cache_lib
from mor_jax.model import cached_attention
from mor_jax.model.decode import CachedModel
from mor_jax.planning import hlo


def entering(cached: CachedModel) -> tuple[float, ...]:
  """Shares of the tokens that take each recursion."""
  config = cached.config
  return config.step_capacities if config.kind == 'mor' else (1.0,) * cache_lib.num_steps(config)


def seen(cached: CachedModel) -> list[int]:
  """Entries that a token sees at each recursion, if as many took it as are expected to."""
  layout, shares = cached.layout, entering(cached)
  if layout.kv != 'recursion_wise':
    return [layout.max_len] * len(shares)
  return [
    min(places, round(share * layout.max_len)) for places, share in zip(layout.places, shares, strict=True)
  ]


def seen_by_lanes(cached: CachedModel, lanes: int) -> np.ndarray:
  """The same for the lanes of the block, falling."""
  shares = np.array(entering(cached))
  ends = np.rint(lanes * np.cumsum(shares) / shares.sum()).astype(int)
  return np.repeat(seen(cached), np.diff(ends, prepend=0))


def reads(cached: CachedModel, lanes: int) -> int:
  """Entries that the lanes of the block read in a layer, all together."""
  sizes = np.array(_lengths(cached))
  if cached.read != 'groups':
    return lanes * int(sizes[-1])
  return int(sizes[np.searchsorted(sizes, seen_by_lanes(cached, lanes))].sum())


def _lengths(cached: CachedModel) -> tuple[int, ...]:
  return cached_attention.lengths(cached_attention.largest_region(cached.layout))


def entry_bytes(cached: CachedModel, dtype: str) -> int:
  """Bytes of the keys and values of a token in a layer, scales of int8 included."""
  scales = 2 * 4 * cached.config.num_kv_heads if dtype == 'int8' else 0
  return 2 * cached.layout.width * jnp.dtype(cache_lib.DTYPES[dtype]).itemsize + scales


def branches(cached: CachedModel, lanes: int, dtype: str, is_block: bool) -> hlo.Taken:
  """Shares of the branches of a program's conditionals; those of `sampling` are as for greedy requests.

  Args:
    lanes: of the block.
    is_block: the program is a pass of the block, with lanes at all recursions; else what is read is the largest region,
      but for what checks drafts, of which each recursion reads its own.
  """
  sizes = _lengths(cached)
  keys = sizes[-1] * cached.layout.width * jnp.dtype(cache_lib.DTYPES[dtype]).itemsize
  groups, each = cached_attention.groups_of(lanes, keys)

  def shares(wanted: Sequence[int]) -> list[float]:
    return (np.bincount(np.searchsorted(sizes, wanted), minlength=len(sizes)) / len(wanted)).tolist()

  of_lanes = shares(seen_by_lanes(cached, lanes)[::each][:groups])
  of_checks = shares(seen(cached)[1:] or seen(cached))

  def taken(conditional: hlo.Instruction) -> Sequence[float] | None:
    path = conditional.attributes
    if '/attention/' not in path:
      return (1.0, 0.0) if '/sampling/' in path else None
    count = len(conditional.called)
    if '/end/' not in path and count == len(sizes):
      if is_block:
        return of_lanes
      if '/check/' in path:
        return of_checks
    return (0.0,) * (count - 1) + (1.0,)

  return taken
