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
from mor_jax.inference import balance, prefill, speculation, ticks
from mor_jax.inference import state as state_lib
from mor_jax.inference.speculation import Drafting
from mor_jax.inference.ticks import Batches
from mor_jax.model import cache as cache_lib
from mor_jax.model import decode, flops
from mor_jax.model.decode import CachedModel
from mor_jax.model.transformer import abstract_variables
from mor_jax.parallel import device_memory
from mor_jax.planning import chips, cost, full_texts, roofline
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
    batches: lanes of block and boundary; None: those with which a token moves least bytes.
  """

  max_len: int
  cache_dtype: str
  slots: int | None = None
  chunk: int = 64
  speculate: int = 0
  draft_recursions: int = 1
  slack: float = 1.0
  fast: bool = False
  batches: Batches | None = None


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
    flow: how often block and boundary run for a token.
    parts: of what a pass of them reads, the bytes of weights, of keys and values, and of the head.
  """

  asked: Asked
  kind: str
  memory: float | None
  lanes: Batches
  programs: dict[str, Cost]
  parameter_bytes: int
  cache_bytes: int
  depth: float
  flow: balance.Flow
  parts: dict[str, dict[str, int]]

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
    """The most tokens that a second can give: passes as often as a token needs them, lanes out of use included."""
    block, boundary = self.seconds('block'), self.seconds('boundary')
    if block is None or boundary is None:
      return None
    return 1 / (self.flow.ticks * block + self.flow.boundaries * boundary)


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
  layout = _cached(config, device, asked).layout
  pools = jax.eval_shape(lambda: cache_lib.init_cache(config, layout, 1, asked.cache_dtype))
  slots = _rounded((SHARE * memory - parameters) / device_memory.bytes_on_a_device(pools))
  for _ in range(ATTEMPTS):
    if slots < 1:
      raise ConfigError(
        f'--max_len={asked.max_len}: {device.device_kind} has no room for such a text beside the weights'
      )
    plan = _compile(config, device, memory, dataclasses.replace(asked, slots=slots))
    if plan.fits:
      return plan
    most = max(one.peak_bytes for one in plan.programs.values())
    slots = min(_rounded(slots * (SHARE * memory - parameters) / (most - parameters)), _rounded(slots - 1))
  raise ConfigError(f'--max_len={asked.max_len}: no number of slots was found that fits; give --slots')


def _rounded(slots: float) -> int:
  """At most so many, whole lanes of a TPU's tiles where there are some."""
  return int(slots) // LANES * LANES or int(slots)


def _cached(config, device, asked) -> CachedModel:
  is_tpu = device.platform == 'tpu'
  layout = cache_lib.make_layout(config, asked.max_len, asked.slack, tiled=is_tpu)
  return CachedModel(config, layout, unroll=False, read='groups' if is_tpu else 'gather')


def _compile(config, device, memory, asked) -> Plan:
  cached, is_tpu = _cached(config, device, asked), device.platform == 'tpu'

  def on_device(tree: Any) -> Any:
    where = SingleDeviceSharding(device)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree)

  variables = nn.unbox(abstract_variables(config))
  params = on_device(jax.eval_shape(functools.partial(decode.prepare, cached), variables))
  state = on_device(jax.eval_shape(lambda: state_lib.init_state(cached, asked.slots, asked.cache_dtype)))

  batches = asked.batches or _balanced(cached, params, chips.of_kind(device.device_kind), asked)

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
    name, is_block = function.__name__, function is block_of
    taken = full_texts.branches(cached, batches.block, asked.cache_dtype, is_block)
    return cost.of(lambda: jitted.trace(*arguments), arguments, name, 1, is_tpu, asked.fast, taken)

  costs = {name: cost_of(*program) for name, program in programs.items()}
  return Plan(
    asked,
    device.device_kind,
    memory,
    batches,
    costs,
    device_memory.bytes_on_a_device(params),
    device_memory.bytes_on_a_device((state.cache.first, state.cache.block, state.cache.last)),
    sum(full_texts.entering(cached)),
    balance.flow(batches, asked.slots, full_texts.entering(cached)),
    _parts(cached, params, batches, asked),
  )


def _parts(cached, params, batches, asked) -> dict[str, dict[str, int]]:
  """Bytes that block and boundary cannot but read, by what they are."""
  entry, layers = full_texts.entry_bytes(cached, asked.cache_dtype), len(decode.block_uses(cached.config))
  size = device_memory.bytes_on_a_device
  head = params.embed if params.head is None else params.head
  ends = 2 * cached.config.unique_ends * cached.layout.max_len
  return {
    'block': {
      'weights': size((params.block, params.own, params.router)),
      'caches': layers * entry * full_texts.reads(cached, batches.block),
    },
    'boundary': {
      'weights': size((params.first, params.last)),
      'caches': ends * entry * batches.boundary,
      'head': size(head),
    },
  }


def _balanced(cached, params, chip, asked) -> Batches:
  """The sizes of the batches with which a token moves least bytes."""
  sample = Batches(asked.slots, asked.slots)
  parts = _parts(cached, params, sample, asked)
  costs = []
  for name in ('block', 'boundary'):
    caches = parts[name].pop('caches') / asked.slots
    logits = 4 * cached.config.vocab_size if name == 'boundary' else 0
    costs += [sum(parts[name].values()), caches + logits]
  bandwidth = chip.hbm_bandwidth if chip else 1.0
  of = balance.Costs(*(one / bandwidth for one in costs))
  return balance.choose(of, asked.slots, full_texts.entering(cached), multiple=min(LANES, asked.slots))


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
      'parts': plan.parts.get(name),
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
    'ticks_per_token': plan.flow.ticks,
    'boundaries_per_token': plan.flow.boundaries,
    'tokens_per_second': plan.tokens_per_second,
    'programs': programs,
  }
