"""What the two batches of a tick cost on this device: one layer, and the head, measured with few lanes and with all.

Whole passes would have to be compiled for each size, which takes longer than the choice may save. A layer and the head
are nearly all that a pass does, and compile in a second or two together.
"""

import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mor_jax.config import ConfigError, ModelConfig
from mor_jax.inference import balance
from mor_jax.inference.balance import Costs
from mor_jax.model import cache as cache_lib
from mor_jax.model import decode, lane_routing
from mor_jax.model.decode import CachedModel, DecodeParams

SECONDS = 0.4  # that a layer, or the head, is measured, once it is compiled
LEAST_RUNS = 5


def check(config: ModelConfig, batch_invariant: bool, has_mesh: bool) -> None:
  """Raises ConfigError for an engine that cannot choose its batches by what it measures."""
  why = {
    'batch_invariant, whose bits shall not depend on what was measured': batch_invariant,
    'a mesh, whose parts wait for each other': has_mesh,
    f'model.sharing={config.sharing}, which has no layers around the block': not config.unique_ends,
  }
  for what, holds in why.items():
    if holds:
      raise ConfigError(f'measure_batches=True cannot be used with {what}; set lanes and boundary_lanes')


def measure(cached: CachedModel, params: DecodeParams, slots: int, dtype: str) -> Costs:
  """Costs in seconds, of texts at half their length; what `check` allows can be measured.

  Args:
    dtype: of keys and values.
  """
  sizes = balance.fewest(slots), slots
  layer, layer_lane = _affine(sizes, [_layer(cached, params, dtype, lanes) for lanes in sizes])
  head, head_lane = _affine(sizes, [_head(cached, params, lanes) for lanes in sizes])
  depth, ends = len(decode.block_uses(cached.config)), 2 * cached.config.unique_ends
  return Costs(depth * layer, depth * layer_lane, ends * layer + head, ends * layer_lane + head_lane)


def _affine(sizes: tuple[int, int], runs: list[Callable[[], None]]) -> tuple[float, float]:
  """Seconds once, and for each lane, of runs with so many lanes, which take turns; the fastest of each counts."""
  for run in runs:
    run()  # is compiled
  taken, begin = [[], []], time.perf_counter()
  while len(taken[0]) < LEAST_RUNS or time.perf_counter() - begin < SECONDS:
    for run, of in zip(runs, taken, strict=True):
      start = time.perf_counter()
      run()
      of.append(time.perf_counter() - start)
  few, many = map(min, taken)
  lane = max(many - few, 0.0) / max(sizes[1] - sizes[0], 1)
  return max(many - sizes[1] * lane, 0.0), lane


def _layer(cached: CachedModel, params: DecodeParams, dtype: str, lanes: int) -> Callable[[], None]:
  pool = cache_lib.init_cache(cached.config, cached.layout, lanes, dtype).last
  slots_B, positions_B1 = jnp.arange(lanes), jnp.full((lanes, 1), cached.layout.max_len // 2)
  placed = lane_routing.at_ends(positions_B1, slots_B, jnp.ones((lanes, 1), bool))
  x_BCD = jnp.ones((lanes, 1, cached.config.d_model), cached.config.dtype)
  run = jax.jit(functools.partial(decode.apply_end, cached), static_argnums=1, donate_argnums=2)

  def once():
    nonlocal pool
    y_BCD, pool = run(params, 'last', pool, x_BCD, placed)
    y_BCD.block_until_ready()

  return once


def _head(cached: CachedModel, params: DecodeParams, lanes: int) -> Callable[[], None]:
  x_BD = jnp.ones((lanes, cached.config.d_model), cached.config.dtype)
  run = jax.jit(lambda params, x_BD: decode.logits(cached, params, x_BD).argmax(axis=-1))
  return lambda: run(params, x_BD).block_until_ready()
