"""Attention to caches: every way to read them gives softmax attention to the entries that a token may see."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.model import cache as cache_lib
from mor_jax.model import cached_attention
from mor_jax.model.cached_attention import View
from tests import tiny

MAX_LEN = 150  # longer than the smallest slice, and no whole tiles
SLOTS, LANES, CHUNK = 5, 3, 2


def rounded(x_SKE, dtype):
  """What a cache gives back: multiples of 1/7 or 1/127 of the largest number of a head."""
  if dtype == 'float32':
    return x_SKE
  step_SK1 = np.abs(x_SKE).max(-1, keepdims=True) / {'int8': 127, 'int4': 7}[dtype]
  return np.round(x_SKE / step_SK1) * step_SK1


@pytest.mark.parametrize(
  ('read', 'tiled', 'dtype'),
  [
    ('lanes', False, 'float32'),
    ('lanes', True, 'int8'),
    ('gather', False, 'int8'),
    ('lanes', False, 'int4'),
    ('gather', True, 'int4'),
    ('groups', True, 'float32'),
    ('groups', False, 'int8'),
  ],
)
def test_reads_what_was_written(read, tiled, dtype, monkeypatch):
  # Every lane by itself, or two together and the third with a lane that is idle.
  monkeypatch.setattr(cached_attention, 'GROUP_BYTES', 1 if tiled else 5 * MAX_LEN * 32)
  config = tiny.config(num_layers=8, num_recursions=3)
  heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.head_width
  layout = cache_lib.make_layout(config, MAX_LEN, 1.0, tiled=tiled)
  pool = cache_lib.init_cache(config, layout, SLOTS, dtype).block
  assert pool.keys.shape[2] % 8 == 0
  assert (pool.keys.shape[3] == (64 if dtype == 'int4' else 128)) == tiled
  draw = np.random.default_rng(0).normal
  slots_B, base_B = np.array([4, 0, 2]), np.array(layout.offsets)[[0, 1, 2]]
  sizes_B = np.minimum(np.array(layout.places)[[0, 1, 2]], [150, 70, 9])
  written = {}
  for lane, slot in enumerate(slots_B):
    keys, values = (draw(size=(1, sizes_B[lane], kv_heads, width)).astype(np.float32) for _ in range(2))
    entries = base_B[lane] + np.arange(sizes_B[lane])
    pool = cache_lib.write(pool, 1, np.array([slot]), entries[None], keys, values, read != 'lanes')
    written[lane] = rounded(keys[0], dtype), rounded(values[0], dtype)
  # What lies beyond the pool is not written anywhere.
  nowhere = jnp.full((1, 1), jnp.iinfo(jnp.int32).max)
  ones = jnp.ones((1, 1, kv_heads, width))
  pool = cache_lib.write(pool, 1, np.array([0]), nowhere, ones, ones, read != 'lanes')
  limit_BC = np.stack([sizes_B - 1, sizes_B], axis=1)
  q_BCHE = draw(size=(LANES, CHUNK, heads, width)).astype(np.float32)
  view = View(jnp.array(slots_B), jnp.array(base_B), jnp.array(limit_BC))
  region = cached_attention.largest_region(layout)
  found = cached_attention.attend(jnp.array(q_BCHE), pool, 1, view, kv_heads, region, read)
  for lane in range(LANES):
    for column in range(CHUNK):
      for head in range(heads):
        keys, values = (of[: limit_BC[lane, column], head // (heads // kv_heads)] for of in written[lane])
        weights = jax.nn.softmax(keys @ q_BCHE[lane, column, head] / width**0.5)
        tolerance = 0.05 if read == 'groups' and dtype != 'float32' else 1e-4
        np.testing.assert_allclose(found[lane, column, head], weights @ values, atol=tolerance)


def test_a_group_reads_no_further_than_its_lanes_see(monkeypatch):
  """Each lane by itself, at recursions whose regions are shorter and shorter: all that is not of its region is NaN."""
  monkeypatch.setattr(cached_attention, 'GROUP_BYTES', 1)
  config = tiny.config(num_layers=8, num_recursions=3)
  layout = cache_lib.make_layout(config, 144, 1.0)  # whose thirds are whole tiles
  assert layout.places == (144, 96, 48)
  pool = jax.tree.map(lambda leaf: leaf + np.nan, cache_lib.init_cache(config, layout, 3, 'float32').block)
  steps_B = np.arange(3)
  base_B, limit_B = np.array(layout.offsets), np.array(layout.places)
  for step in steps_B:
    own = slice(base_B[step], base_B[step] + limit_B[step])
    pool = jax.tree.map(lambda leaf, step=step, own=own: leaf.at[:, step, own].set(1.0), pool)
  view = View(jnp.array(steps_B), jnp.array(base_B), jnp.array(limit_B)[:, None])
  q_BCHE = jnp.ones((3, 1, config.num_heads, config.head_width))
  region = cached_attention.largest_region(layout)
  attend = functools.partial(cached_attention.attend, q_BCHE, pool, 1, view, config.num_kv_heads, region)
  np.testing.assert_allclose(attend('groups'), 1.0, rtol=1e-6)
  assert np.isnan(attend('gather')).any(), 'the way of GPUs reads as much for all'
