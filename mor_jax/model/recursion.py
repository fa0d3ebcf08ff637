"""The heart: the shared block, applied up to R times, to fewer and fewer tokens.

Three ways through the recursions:

* `repeat`: every token takes every step (recursive models);
* `route_gathered`: each step gathers the C_r tokens its router selects, runs the block on
  them alone and adds the result back; sizes differ, so the steps are unrolled;
* `route_masked`: the block runs on all tokens and the result is dropped where not
  selected; the reference for the former, and the way of threshold routing, whose
  sizes are not static. All steps have one shape and are scanned.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from mor_jax.config import ModelConfig
from mor_jax.model import router
from mor_jax.model.layers import Memory, TokenContext
from mor_jax.model.stack import apply_stack


def repeat(config: ModelConfig, block: dict, x_BTD: jax.Array, context: TokenContext) -> jax.Array:
  """Applies the shared block R times, or under `sequence` sharing each of its layers R times."""
  if config.sharing.endswith('cycle'):
    return _repeat_stack(config, block, x_BTD, context)

  def repeat_layer(x_BTD, params):
    return _repeat_stack(config, jax.tree.map(lambda leaf: leaf[None], params), x_BTD, context), None

  return jax.lax.scan(repeat_layer, x_BTD, block, unroll=config.unroll_layers)[0]


def _repeat_stack(config: ModelConfig, layers: dict, x_BTD: jax.Array, context: TokenContext) -> jax.Array:
  """R passes over a stack; under KV sharing all attend to the keys and values of the first."""
  steps, memory = config.recursions, None
  if config.kv == 'shared':
    x_BTD, memory = _run_block(config, layers, x_BTD, context, remember=True)
    steps -= 1
  return jax.lax.scan(
    lambda x_BTD, _: (_run_block(config, layers, x_BTD, context, memory)[0], None),
    x_BTD,
    length=steps,
    unroll=config.unroll_layers,
  )[0]


def route_gathered(
  config: ModelConfig, block: dict, routers: dict, x_BTD: jax.Array, context: TokenContext
) -> tuple[jax.Array, router.RoutingOutput]:
  """Top-k routing in which a step computes on its selected tokens only.

  Args:
    block: stacked parameters of the shared layers.
    routers: stacked parameters of the R routers.
    x_BTD: residual stream; tokens of segment 0 are padding and never selected.
    context: positions and segments of the tokens.
  """
  length = x_BTD.shape[1]
  active_BT = context.segments_BC > 0
  memory = None
  logits, entered, selected, indices = [], [], [], []
  for step, count in enumerate(config.selected_tokens(length)):
    logits_BT = router.score(config, jax.tree.map(lambda leaf, r=step: leaf[r], routers), x_BTD)
    logits.append(logits_BT)
    entered.append(active_BT)
    if count == length:  # nothing to leave out: no need to move tokens
      indices_BC = jnp.broadcast_to(jnp.arange(length), active_BT.shape)
      x_BTD, memory = _step_on_all(config, block, x_BTD, context, logits_BT, active_BT, memory)
    else:
      indices_BC, chosen_BC = router.top_k(logits_BT, active_BT, count)
      x_BTD, memory = _step_on(config, block, x_BTD, context, logits_BT, indices_BC, chosen_BC, memory)
      active_BT = _scatter_mask(indices_BC, chosen_BC, length)
    indices.append(indices_BC)
    selected.append(active_BT)
  logits_RBT, entered_RBT, selected_RBT = (jnp.stack(steps) for steps in (logits, entered, selected))
  return x_BTD, router.RoutingOutput(
    logits_RBT=logits_RBT,
    entered_RBT=entered_RBT,
    selected_RBT=selected_RBT,
    overflow_RBT=jnp.zeros_like(selected_RBT),
    indices=tuple(indices),
    losses={'aux': router.auxiliary_loss(logits_RBT, entered_RBT, selected_RBT)},
  )


def route_masked(
  config: ModelConfig,
  block: dict,
  routers: dict,
  x_BTD: jax.Array,
  context: TokenContext,
  routing: str,
  max_len: int,
  slack: float,
) -> tuple[jax.Array, router.RoutingOutput]:
  """Routing by top-k or threshold in which every step computes on all tokens.

  Args:
    routing: 'topk' or 'threshold'.
    max_len: longest sequence the places of threshold routing are counted for.
    slack: places of a step per token it takes on average (`step_places`).
    The rest as in `route_gathered`.
  """
  starts_BT = context.positions_BC == 0
  always_R = jnp.array([capacity == 1.0 for capacity in config.step_capacities])
  if routing == 'topk':
    limit_R = jnp.array(config.selected_tokens(x_BTD.shape[1]))
  else:
    limit_R = jnp.array(step_places(config, max_len, slack))

  def step(carry, params_and_limits):
    x_BTD, active_BT, memory = carry
    params, limit, always = params_and_limits
    logits_BT = router.score(config, params, x_BTD)
    if routing == 'topk':
      selected_BT = router.top_k_mask(logits_BT, active_BT, limit)
      overflow_BT = jnp.zeros_like(selected_BT)
    else:
      selected_BT, overflow_BT = router.admit(logits_BT, active_BT, starts_BT, limit, always)
    x_BTD, memory = _step_on_all(config, block, x_BTD, context, logits_BT, selected_BT, memory)
    return (x_BTD, selected_BT, memory), (logits_BT, active_BT, selected_BT, overflow_BT)

  carry = x_BTD, context.segments_BC > 0, None
  per_step = routers, limit_R, always_R
  if config.kv == 'recursion_wise':
    (x_BTD, _, _), decisions = jax.lax.scan(step, carry, per_step, unroll=config.unroll_layers)
  else:  # the first step makes the memory that the others read
    carry, first = step(carry, jax.tree.map(lambda leaf: leaf[0], per_step))
    rest_of_steps = jax.tree.map(lambda leaf: leaf[1:], per_step)
    (x_BTD, _, _), rest = jax.lax.scan(step, carry, rest_of_steps, unroll=config.unroll_layers)
    decisions = jax.tree.map(lambda one, others: jnp.concatenate([one[None], others]), first, rest)
  logits_RBT, entered_RBT, selected_RBT, overflow_RBT = decisions
  losses = {}
  if routing == 'topk':
    losses['aux'] = router.auxiliary_loss(logits_RBT, entered_RBT, selected_RBT)
  return x_BTD, router.RoutingOutput(logits_RBT, entered_RBT, selected_RBT, overflow_RBT, None, losses)


def step_places(config: ModelConfig, max_len: int, slack: float) -> tuple[int, ...]:
  """Tokens of one sequence that each step can take under threshold routing (and its cache can hold)."""
  # Rounded first, so that 0.1 * 30 asks for 3 places and not, by a float's error, for 4.
  return tuple(
    min(max_len, max(1, math.ceil(round(capacity * max_len * slack, 6))))
    for capacity in config.step_capacities
  )


def _step_on_all(config, block, x_BTD, context, logits_BT, selected_BT, memory):
  """One step computed on every token and kept where selected."""
  indices_BT = jnp.broadcast_to(jnp.arange(x_BTD.shape[1]), selected_BT.shape)
  own_context = context.only(selected_BT)
  y_BTD, memory = _run_step(config, block, x_BTD, own_context, indices_BT, selected_BT, memory)
  change_BTD = _change(config, x_BTD, y_BTD, logits_BT)
  return jnp.where(selected_BT[..., None], x_BTD + change_BTD, x_BTD), memory


def _step_on(config, block, x_BTD, context, logits_BT, indices_BC, chosen_BC, memory):
  """One step computed on gathered tokens, the gated result added back where they came from."""
  x_BCD = jnp.take_along_axis(x_BTD, indices_BC[..., None], axis=1, mode='promise_in_bounds')
  own_context = context.take(indices_BC, chosen_BC)
  y_BCD, memory = _run_step(config, block, x_BCD, own_context, indices_BC, chosen_BC, memory)
  change_BCD = _change(config, x_BCD, y_BCD, jnp.take_along_axis(logits_BT, indices_BC, axis=1))
  change_BCD = jnp.where(chosen_BC[..., None], change_BCD, 0)
  rows_B1 = jnp.arange(x_BTD.shape[0])[:, None]
  target = x_BTD.at[rows_B1, indices_BC]
  x_BTD = target.add(change_BCD, indices_are_sorted=True, unique_indices=True, mode='promise_in_bounds')
  return x_BTD, memory


def _run_step(config, block, x_BCD, context, indices_BC, chosen_BC, memory: Memory | None):
  """The block with the keys and values that `config.kv` asks for; returns the next step's memory."""
  if config.kv == 'recursion_wise':
    return _run_block(config, block, x_BCD, context)
  if memory is None:
    return _run_block(config, block, x_BCD, context, remember=True)
  if config.kv == 'shared':
    return _run_block(config, block, x_BCD, context, memory)[0], memory
  memory = memory.replace(indices_BC=indices_BC, chosen_BC=chosen_BC)
  return _run_block(config, block, x_BCD, context, memory, remember=True)


def _run_block(config, block, x_BCD, context, memory=None, remember=False):
  run = partial(apply_stack, config, remember=remember)
  if config.remat == 'block':
    run = jax.checkpoint(run)
  return run(block, x_BCD, context, memory)


def _change(config: ModelConfig, x: jax.Array, y: jax.Array, logits: jax.Array) -> jax.Array:
  """What a selected token gains: w * f(x) as in the authors' code, or w * (f(x) - x) (paper, eq. 2.1)."""
  update = y - x if config.gating == 'residual' else y
  return (router.gate(config, logits)[..., None] * update.astype(jnp.float32)).astype(x.dtype)


def _scatter_mask(indices_BC: jax.Array, chosen_BC: jax.Array, length: int) -> jax.Array:
  rows_B1 = jnp.arange(indices_BC.shape[0])[:, None]
  return jnp.zeros((indices_BC.shape[0], length), bool).at[rows_B1, indices_BC].set(chosen_BC)
