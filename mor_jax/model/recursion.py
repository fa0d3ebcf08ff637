"""The shared block, applied up to R times: to all tokens, or to those that a router selects.

What all kinds of routing are made of: `repeat` lets every token take every step (recursive
models); `run_step` takes one step with the tokens that it is given.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mor_jax.config import ModelConfig
from mor_jax.model import relaxation
from mor_jax.model.context import TokenContext
from mor_jax.model.layers import Memory
from mor_jax.model.stack import apply_stack


def repeat(
  config: ModelConfig, block: dict, own_R: dict, x_BTD: jax.Array, context: TokenContext, steps: int
) -> jax.Array:
  """Applies the shared block `steps` times, or under `sequence` sharing each of its layers R times.

  Args:
    own_R: what each step has of its own (`relaxation.init_steps`).
    steps: at most R.
  """
  if config.sharing.endswith('cycle'):
    return _repeat_stack(config, block, own_R, x_BTD, context, steps)

  def repeat_layer(x_BTD, layer_and_own):
    one_layer = jax.tree.map(lambda leaf: leaf[None], layer_and_own[0])
    own_R = jax.tree.map(lambda leaf_R: leaf_R[:, None], layer_and_own[1])
    return _repeat_stack(config, one_layer, own_R, x_BTD, context, config.recursions), None

  own_N = jax.tree.map(lambda leaf_RN: leaf_RN.swapaxes(0, 1), own_R)
  return jax.lax.scan(repeat_layer, x_BTD, (block, own_N), unroll=config.unroll_layers)[0]


def share_memory(config: ModelConfig, layers_N: dict, x_BTD: jax.Array, context: TokenContext) -> jax.Array:
  """Layers of their own parameters, which in every pass but the first read keys and values of the first.

  Under `cycle` layer n of each pass reads those of layer n of the first pass; under
  `sequence` the layers of a group follow one another and read those of its first.
  """
  passes = config.passes

  def run_passes(x_BTD, layers_Rn):
    def one_pass(carry, layers_n):
      x_BTD, memory = carry
      x_BTD, made = run_block(config, layers_n, x_BTD, context, memory, remember=memory is None)
      return (x_BTD, made if memory is None else memory), None

    return scan_steps(config, one_pass, (x_BTD, None), layers_Rn, passes)[0][0], None

  if config.sharing.endswith('cycle'):
    layers_Rn = jax.tree.map(lambda leaf: leaf.reshape(passes, -1, *leaf.shape[1:]), layers_N)
    return run_passes(x_BTD, layers_Rn)[0]
  groups = jax.tree.map(lambda leaf: leaf.reshape(-1, passes, 1, *leaf.shape[1:]), layers_N)
  return jax.lax.scan(run_passes, x_BTD, groups, unroll=config.unroll_layers)[0]


def _repeat_stack(config, layers, own_R, x_BTD, context, steps):
  """Passes over a stack; under KV sharing all attend to the keys and values of the first."""

  def one_pass(carry, own):
    x_BTD, memory = carry
    inputs_BTD, own_layers = relaxation.encode(x_BTD, own), relaxation.relax(config, layers, own)
    remember = config.kv == 'shared' and memory is None
    x_BTD, made = run_block(config, own_layers, inputs_BTD, context, memory, remember)
    return (x_BTD, made if remember else memory), None

  own_steps = jax.tree.map(lambda leaf_R: leaf_R[:steps], own_R)
  (x_BTD, _), _ = scan_steps(config, one_pass, (x_BTD, None), own_steps, steps)
  return x_BTD


def run_step(
  config: ModelConfig,
  block: dict,
  own: dict,
  x_BCD: jax.Array,
  context: TokenContext,
  indices_BC: jax.Array,
  chosen_BC: jax.Array,
  memory: Memory | None,
) -> tuple[jax.Array, Memory | None]:
  """One pass of the block over C tokens of each row, with the keys and values `config.kv` asks for.

  Args:
    own: what this step has of its own (`relaxation.init_steps`).
    x_BCD: the tokens' residual stream.
    context: positions and segments of the tokens.
    indices_BC: their places in the row, ascending.
    chosen_BC: which of them take the step; the others only fill the static size, and no token sees them.
    memory: what the step before returned; None at the first.

  Returns:
    The block's output and the memory for the next step.
  """
  context = context.only(chosen_BC)
  x_BCD, block = relaxation.encode(x_BCD, own), relaxation.relax(config, block, own)
  if config.kv == 'recursion_wise':
    return run_block(config, block, x_BCD, context)
  if memory is None:
    return run_block(config, block, x_BCD, context, remember=True)
  if config.kv == 'shared':
    return run_block(config, block, x_BCD, context, memory)[0], memory
  memory = memory.replace(indices_BC=indices_BC, chosen_BC=chosen_BC)
  return run_block(config, block, x_BCD, context, memory, remember=True)


def run_block(config, block, x_BCD, context, memory=None, remember=False):
  run = partial(apply_stack, config, remember=remember)
  if config.remat == 'block':
    run = jax.checkpoint(run)
  return run(block, x_BCD, context, memory)


def scan_steps(
  config: ModelConfig, step: Callable, carry: tuple, per_step: Any, steps: int
) -> tuple[tuple, Any]:
  """Scans `step(carry, inputs)` over so many recursions, whose memory is the last entry of the carry.

  The first step turns a carry without memory into one with it, so that it stands apart where
  keys and values are shared.
  """
  if config.kv == 'recursion_wise':
    return jax.lax.scan(step, carry, per_step, length=steps, unroll=config.unroll_layers)
  carry, first = step(carry, jax.tree.map(lambda leaf: leaf[0], per_step))
  others = jax.tree.map(lambda leaf: leaf[1:], per_step)
  carry, rest = jax.lax.scan(step, carry, others, steps - 1, unroll=config.unroll_layers)
  return carry, jax.tree.map(lambda one, more: jnp.concatenate([one[None], more]), first, rest)


def step_places(config: ModelConfig, max_len: int, slack: float) -> tuple[int, ...]:
  """Tokens of one sequence that each step can take under threshold routing (and its cache can hold)."""
  # Rounded first, so that 0.1 * 30 asks for 3 places and not, by a float's error, for 4.
  return tuple(
    min(max_len, max(1, math.ceil(round(capacity * max_len * slack, 6))))
    for capacity in config.step_capacities
  )
