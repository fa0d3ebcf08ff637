"""What generating costs on a device that need not be there: the engine's own programs, compiled ahead of time.

A text costs, token by token, passes of the shared block and one of the boundary (last layer, head, sampling, embedding,
first layer), with many sequences side by side: `block` is one of `ticks.run`, `boundary` the other, `chunk` computes a
part of a prompt, `round` is a draft and its check (`speculation`). From the bytes and FLOPs of each comes the least time
it can take (`roofline`), and from the shares of the depths the most tokens that a second can give.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import SingleDeviceSharding

from mor_jax.config import ConfigError, ModelConfig
from mor_jax.console import Row
from mor_jax.inference import prefill, speculation, ticks
from mor_jax.inference import state as state_lib
from mor_jax.inference.speculation import Drafting
from mor_jax.inference.ticks import Batches
from mor_jax.model import cache as cache_lib
from mor_jax.model import decode, flops
from mor_jax.model.decode import CachedModel
from mor_jax.model.transformer import abstract_variables
from mor_jax.parallel import device_memory
from mor_jax.planning import chips, cost, roofline
from mor_jax.planning.cost import Cost
from mor_jax.units import megabytes, quantity

SHARE = 0.97  # of the memory, that a program may need
ATTEMPTS = 4  # at the largest number of slots
LANES = 8  # of which a number of lanes is a multiple
PROMPTS = 4  # that are computed together


@dataclasses.dataclass(frozen=True)
class Asked:
  """What is to be compiled.

  Attributes:
    max_len: longest text in tokens.
    cache_dtype: of keys and values.
    slots: sequences; None: as many as fit.
    chunk: tokens of a prompt that are computed together.
    speculate, draft_recursions: tokens of a draft, 0 for none, and recursions that write it.
    slack: places of a recursion per token expected.
    fast: let the compiler optimise little.
  """

  max_len: int
  cache_dtype: str
  slots: int | None = None
  chunk: int = 64
  speculate: int = 0
  draft_recursions: int = 1
  slack: float = 1.0
  fast: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
  """What generating costs on one device.

  Attributes:
    asked: what was asked for, with the number of slots.
    kind: of the device, and `memory` its bytes, None if unknown.
    lanes: of the block and the boundary.
    programs: by name; `round` only with drafts.
    parameter_bytes, cache_bytes: of all slots.
    depth: passes of the block per token.
  """

  asked: Asked
  kind: str
  memory: float | None
  lanes: Batches
  programs: dict[str, Cost]
  parameter_bytes: int
  cache_bytes: int
  depth: float

  @property
  def fits(self) -> bool:
    """Whether all programs fit."""
    return all(
      not one.problem and (self.memory is None or one.peak_bytes <= self.memory)
      for one in self.programs.values()
    )

  def seconds(self, name: str) -> float | None:
    """The least that a run of a program can take; None for unknown devices."""
    chip, one = chips.of_kind(self.kind), self.programs[name]
    if chip is None or one.problem:
      return None
    return roofline.estimate(chip, one.flops, one.traffic, one.collectives, np.zeros(1, int)).seconds

  @property
  def tokens_per_second(self) -> float | None:
    """The most tokens that a second can give, with every lane in use."""
    block, boundary = self.seconds('block'), self.seconds('boundary')
    if block is None or boundary is None:
      return None
    return 1 / (self.depth * block / self.lanes.block + boundary / self.lanes.boundary)


def compile_decoding(config: ModelConfig, device: jax.Device, asked: Asked) -> Plan:
  """Compiles the engine's programs for a device, by default for the largest number of slots that fits.

  Raises:
    ConfigError: the weights alone do not fit.
  """
  chip = chips.of_kind(device.device_kind)
  memory = chip.hbm if chip else None
  if asked.slots is not None:
    return _compile(config, device, memory, asked)
  if memory is None:
    raise ConfigError(f'--slots: the memory of {device.device_kind} is unknown; say how many sequences')
  parameters = flops.count_parameters(config).total * jnp.dtype(config.dtype).itemsize
  each = flops.kv_cache_bytes(config, asked.max_len, cache_lib.element_bytes(asked.cache_dtype))
  slots = int((0.9 * memory - parameters) // each) // LANES * LANES
  for _ in range(ATTEMPTS):
    if slots < LANES:
      raise ConfigError(
        f'--max_len={asked.max_len}: {device.device_kind} has no room for {LANES} such texts beside the weights'
      )
    plan = _compile(config, device, memory, dataclasses.replace(asked, slots=slots))
    if plan.fits:
      return plan
    most = max(one.peak_bytes for one in plan.programs.values())
    slots = (
      min(int(slots * (SHARE * memory - parameters) / (most - parameters)), slots - LANES) // LANES * LANES
    )
  raise ConfigError(f'--max_len={asked.max_len}: no number of slots was found that fits; give --slots')


def _compile(config, device, memory, asked) -> Plan:
  is_tpu = device.platform == 'tpu'
  layout = cache_lib.make_layout(config, asked.max_len, asked.slack, tiled=is_tpu)
  cached = CachedModel(config, layout, unroll=False, read='groups' if is_tpu else 'gather')
  depth = sum(config.step_capacities) if config.kind == 'mor' else cache_lib.num_steps(config)
  # In a steady state so many of the slots wait for the block, and the others for the boundary.
  block = max(int(asked.slots * depth / (depth + 1)) // LANES * LANES, min(LANES, asked.slots))
  batches = Batches(block, max(asked.slots - block, min(LANES, asked.slots)))

  def on_device(tree: Any) -> Any:
    where = SingleDeviceSharding(device)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree)

  variables = nn.unbox(abstract_variables(config))
  params = on_device(jax.eval_shape(functools.partial(decode.prepare, cached), variables))
  state = on_device(jax.eval_shape(lambda: state_lib.init_state(cached, asked.slots, asked.cache_dtype)))

  def block_of(params, state):
    return ticks.apply_block(cached, batches, params, (state, _tally(cached)))

  def boundary_of(params, state):
    return ticks.pass_boundary(cached, batches, params, (state, _tally(cached)))

  def chunk_of(params, prefix, tokens_BC, lengths_B, shift_B):
    return prefill.extend(cached, None, params, prefix, tokens_BC, lengths_B, (lengths_B, shift_B))

  lanes = min(PROMPTS, asked.slots)
  numbers = [((lanes, asked.chunk), jnp.int32), ((lanes,), jnp.int32), ((lanes,), jnp.float32)]
  prompts = on_device([jax.ShapeDtypeStruct(*one) for one in numbers])
  prefix = on_device(jax.eval_shape(lambda: prefill.empty(cached, lanes, asked.cache_dtype)))
  programs = {
    'block': (block_of, (params, state)),
    'boundary': (boundary_of, (params, state)),
    'chunk': (chunk_of, (params, prefix, *prompts)),
  }
  if asked.speculate:
    drafting = Drafting(asked.speculate, asked.draft_recursions, asked.slots)

    def round_of(params, state):
      return speculation.round_of(cached, drafting, params, (state, _tally(cached)))

    programs['round'] = (round_of, (params, state))

  def cost_of(function: Callable, arguments: tuple) -> Cost:
    jitted = jax.jit(function, donate_argnums=1)
    return cost.of(lambda: jitted.trace(*arguments), arguments, function.__name__, 1, is_tpu, asked.fast)

  costs = {name: cost_of(*program) for name, program in programs.items()}
  return Plan(
    asked,
    device.device_kind,
    memory,
    batches,
    costs,
    device_memory.bytes_on_a_device(params),
    device_memory.bytes_on_a_device((state.cache.first, state.cache.block, state.cache.last)),
    depth,
  )


def _tally(cached: CachedModel) -> ticks.Tally:
  return ticks.empty_tally(len(cached.layout.places))


def describe(plan: Plan) -> list[Row]:
  """The rows of the report on a plan."""
  asked, lanes = plan.asked, plan.lanes
  most = max(one.peak_bytes for one in plan.programs.values())
  of = (
    '' if plan.memory is None else f' of {megabytes(plan.memory)}: {"fits" if plan.fits else "DOES NOT FIT"}'
  )
  rows = [
    ('device', plan.kind),
    ('slots', f'{asked.slots} texts of up to {asked.max_len} tokens, keys and values in {asked.cache_dtype}'),
    (
      'lanes',
      f'block {lanes.block}, boundary {lanes.boundary}; {plan.depth:.2f} passes of the block a token',
    ),
    ('memory', f'{megabytes(most)}{of}'),
    ('', f'weights {megabytes(plan.parameter_bytes)}, keys and values {megabytes(plan.cache_bytes)}'),
  ]
  for name, one in plan.programs.items():
    if one.problem:
      rows.append((name, one.problem))
      continue
    seconds = plan.seconds(name)
    least = '' if seconds is None else f'; at least {seconds * 1e3:.2f} ms'
    rows.append((name, f'{quantity(one.flops)} FLOPs, HBM traffic {megabytes(one.traffic)}{least}'))
  if plan.tokens_per_second:
    rows.append(('roofline', f'at most {quantity(plan.tokens_per_second)} tokens/s'))
  return rows


def as_json(plan: Plan) -> dict[str, Any]:
  """Figures of the device; null where they are unknown or the program does not fit."""
  programs = {
    name: {
      'flops': one.flops,
      'traffic_bytes': one.traffic,
      'peak_bytes': one.peak_bytes,
      'temp_bytes': one.temp_bytes,
      'seconds': plan.seconds(name),
      'compile_seconds': one.compile_seconds,
      'problem': one.problem,
    }
    for name, one in plan.programs.items()
  }
  return {
    'device': plan.kind,
    'fits': plan.fits,
    'memory_bytes': None if plan.memory is None else int(plan.memory),
    'slots': plan.asked.slots,
    'max_len': plan.asked.max_len,
    'block_lanes': plan.lanes.block,
    'boundary_lanes': plan.lanes.boundary,
    'parameter_bytes': plan.parameter_bytes,
    'cache_bytes': plan.cache_bytes,
    'depth': plan.depth,
    'tokens_per_second': plan.tokens_per_second,
    'programs': programs,
  }
