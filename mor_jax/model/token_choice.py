"""Token-choice routing: every token chooses its depth at the start (paper section 2.2.1; docs/model.md).

One router looks at a token before the first recursion and scores the depths 1 to R; the
token takes as many steps as the best of them says. That is causal by itself. Steps may have
a limited size, then the latest tokens find no place and stop at the step before.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from mor_jax.config import ModelConfig
from mor_jax.model import recursion, router, tokens
from mor_jax.model.context import TokenContext
from mor_jax.model.recursion import Given, Rule


def route(
  block: nn.Module,
  params: dict | jax.Array,
  own_R: dict,
  bias_R: jax.Array,
  x_BTD: jax.Array,
  context: TokenContext,
  rule: Rule,
  given: Given,
) -> tuple[jax.Array, router.RoutingOutput, jax.Array | None]:
  """The recursions of a token-choice model.

  Under gather dispatch with top-k routing, steps of limited size compute on gathered tokens;
  otherwise every step computes on all tokens.

  Args:
    block: the shared layers.
    params: the router's parameters, or the keys (R,) of a random one.
    own_R: what each step has of its own (`relaxation.Steps`).
    bias_R: added to the gates for the choice only (loss-free balancing), else 0.
    x_BTD: residual stream; tokens of segment 0 are padding.
    context: positions and segments of the tokens.
    rule: under 'topk' places are counted over the row, as in training; under 'threshold' over each document. A
      token that chose more than `rule.steps` recursions stops there.
    given: depths in place of the tokens' choice, and the most that rows allow.

  Returns:
    Residual stream, what the router did, and, if the rule keeps them, what the stream would be if it ended after
    each recursion (R, B, T, D).
  """
  config, real_BT = block.config, context.segments_BC > 0
  logits_BTR = scores(config, params, x_BTD)
  gates_BTR, choice_BT, gate_BT1 = choose(config, logits_BTR, bias_R)
  if given.depths_BT is not None:
    choice_BT = jnp.clip(given.depths_BT - 1, 0, config.recursions - 1)
    gate_BT1 = jnp.take_along_axis(gates_BTR, choice_BT[..., None], axis=-1)
  free = given.depths_BT is None
  run = _run_gathered if config.dispatch == 'gather' and rule.routing == 'topk' and free else _run_masked
  h_BTD, (entered_RBT, selected_RBT, overflow_RBT), indices, states_RBTD = run(
    block, own_R, x_BTD, context, choice_BT, gate_BT1, rule, given
  )

  def ended(h_BTD):
    return jnp.where(real_BT[..., None], finish(config, x_BTD, h_BTD, gate_BT1), x_BTD)

  if states_RBTD is not None:
    states_RBTD = jax.vmap(ended)(states_RBTD)
  y_BTD = ended(h_BTD)
  depths_R11 = jnp.arange(config.recursions)[:, None, None]
  routed = router.RoutingOutput(
    logits_RBT=jnp.moveaxis(logits_BTR, -1, 0),
    entered_RBT=entered_RBT,
    selected_RBT=selected_RBT,
    causal_RBT=(choice_BT >= depths_R11[: rule.steps]) & entered_RBT,
    overflow_RBT=overflow_RBT,
    indices=indices,
    losses=_losses(config, logits_BTR, gates_BTR, choice_BT, real_BT),
    extra_counts={'chosen_R': ((choice_BT == depths_R11) & real_BT).sum((1, 2))},
  )
  return y_BTD, routed, states_RBTD


def scores(config: ModelConfig, params: dict | jax.Array, x_BTD: jax.Array) -> jax.Array:
  """Logits (B, T, R) of the depths 1 to R."""
  if config.random_router:
    draw = functools.partial(router.random_logits, shape=x_BTD.shape[:2])
    return jax.vmap(draw, out_axes=-1)(params)
  scaled_BTD = x_BTD.astype(jnp.float32) / config.router_temperature
  return router.score(config, params, scaled_BTD, config.recursions)


def choose(
  config: ModelConfig, logits_BTR: jax.Array, bias_R: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Gates (B, T, R), the depth chosen minus 1 (B, T), and its gate (B, T, 1)."""
  gates_BTR = router.activate(config, logits_BTR)
  preferred_BTR = logits_BTR if config.random_router else gates_BTR
  choice_BT = (preferred_BTR + bias_R).argmax(axis=-1)
  gate_BT1 = jnp.take_along_axis(gates_BTR, choice_BT[..., None], axis=-1)
  return gates_BTR, choice_BT, gate_BT1


def finish(config: ModelConfig, x: jax.Array, h: jax.Array, gate: jax.Array) -> jax.Array:
  """The stream after the recursions, from that before them and what the steps made of it: x + g * h."""
  if config.gating == 'weighted' and config.token_gating == 'once':
    h = (gate * h.astype(jnp.float32)).astype(h.dtype)
  return x + h


def _run_masked(block, own_R, x_BTD, context, choice_BT, gate_BT1, rule, given):
  config, steps = block.config, rule.steps
  always_R = jnp.array([capacity == 1.0 for capacity in config.step_capacities])
  limit_R = jnp.array(recursion.limits(config, rule, x_BTD.shape[1]))
  if given.depths_BT is not None:
    always_R = jnp.ones_like(always_R)
  starts_BT = _count_from(context, rule.routing)

  def step(block, carry, step_and_limits):
    h_BTD, active_BT, remembered = carry
    index, limit, always, own = step_and_limits
    active_BT = given.may_go_on(active_BT, index)
    selected_BT, overflow_BT = _enter(active_BT, choice_BT >= index, starts_BT, limit, always)
    h_BTD, remembered = _step_on_all(block, own, h_BTD, context, selected_BT, gate_BT1, remembered)
    decisions = active_BT, selected_BT, overflow_BT
    return (h_BTD, selected_BT, remembered), (decisions, h_BTD if rule.keeps_states else None)

  start = x_BTD, context.segments_BC > 0, None
  per_step = jnp.arange(config.recursions), limit_R, always_R, own_R
  per_step = jax.tree.map(lambda leaf_R: leaf_R[:steps], per_step)
  (h_BTD, _, _), (decisions, states) = recursion.scan_steps(block, step, start, per_step, steps)
  return h_BTD, decisions, None, states


def _run_gathered(block, own_R, x_BTD, context, choice_BT, gate_BT1, rule, given):
  config, length = block.config, x_BTD.shape[1]
  starts_BT = _count_from(context, rule.routing)
  h_BTD, active_BT, remembered = x_BTD, context.segments_BC > 0, None
  decisions, indices, states = [], [], []
  for index, count in enumerate(config.selected_tokens(length)[: rule.steps]):
    active_BT = entered_BT = given.may_go_on(active_BT, index)
    own = jax.tree.map(lambda leaf, r=index: leaf[r], own_R)
    always = config.step_capacities[index] == 1.0
    active_BT, overflow_BT = _enter(active_BT, choice_BT >= index, starts_BT, count, always)
    decisions.append((entered_BT, active_BT, overflow_BT))
    if count == length:
      indices_BC = jnp.broadcast_to(jnp.arange(length), active_BT.shape)
      h_BTD, remembered = _step_on_all(block, own, h_BTD, context, active_BT, gate_BT1, remembered)
    else:
      indices_BC = tokens.best(active_BT.astype(jnp.int32), count)
      chosen_BC = tokens.take(active_BT, indices_BC)
      h_BCD = tokens.take(h_BTD, indices_BC)
      y_BCD, remembered = recursion.run_step(
        block, own, h_BCD, context.take(indices_BC), indices_BC, chosen_BC, remembered
      )
      y_BCD = gated(config, y_BCD, tokens.take(gate_BT1, indices_BC))
      kept_BCD = jnp.where(chosen_BC[..., None], y_BCD, h_BCD)
      h_BTD = tokens.put(h_BTD, indices_BC, kept_BCD)
    indices.append(indices_BC)
    states.append(h_BTD)
  stacked = jax.tree.map(lambda *steps: jnp.stack(steps), *decisions)
  return h_BTD, stacked, tuple(indices), jnp.stack(states) if rule.keeps_states else None


def _step_on_all(block, own, h_BTD, context, selected_BT, gate_BT1, remembered):
  indices_BT = jnp.broadcast_to(jnp.arange(h_BTD.shape[1]), selected_BT.shape)
  y_BTD, remembered = recursion.run_step(block, own, h_BTD, context, indices_BT, selected_BT, remembered)
  return jnp.where(selected_BT[..., None], gated(block.config, y_BTD, gate_BT1), h_BTD), remembered


def gated(config: ModelConfig, y: jax.Array, gate: jax.Array) -> jax.Array:
  """What a step leaves: f(h) in the authors' code, g * f(h) in the paper (eq. 2.2)."""
  if config.token_gating == 'once':
    return y
  return (gate * y.astype(jnp.float32)).astype(y.dtype)


def _enter(active_BT, chose_it_BT, starts_BT, places, always) -> tuple[jax.Array, jax.Array]:
  """Tokens that take a step, in order of position while places last, and those left without one."""
  wants_BT = active_BT & chose_it_BT
  fits_BT = always | router.has_place(wants_BT, starts_BT, places)
  return wants_BT & fits_BT, wants_BT & ~fits_BT


def _count_from(context: TokenContext, routing: str) -> jax.Array:
  """Where the counting of places begins anew: at every row in training, at every document else."""
  if routing == 'threshold':
    return context.positions_BC == 0
  return jnp.zeros(context.positions_BC.shape, bool).at[:, 0].set(True)


def _losses(config, logits_BTR, gates_BTR, choice_BT, real_BT) -> dict[str, router.LossTerm]:
  """Balancing loss, R * sum over depths of share * mean gate, and z-loss; weighted by tokens.

  The balancing loss is not additive over batches: micro-batches contribute theirs by size.
  """
  tokens = real_BT.sum()
  real_BT1 = real_BT[..., None]
  chosen_BTR = jax.nn.one_hot(choice_BT, config.recursions) * real_BT1
  share_R = chosen_BTR.sum((0, 1)) / jnp.maximum(tokens, 1)
  mean_gate_R = jnp.where(real_BT1, gates_BTR, 0).sum((0, 1)) / jnp.maximum(tokens, 1)
  squared_BT = jnp.square(jax.nn.logsumexp(logits_BTR, axis=-1))
  losses = {'z': router.LossTerm(jnp.where(real_BT, squared_BT, 0).sum()[None], tokens[None])}
  if config.balancing == 'loss':
    balancing = config.recursions * (share_R * mean_gate_R).sum()
    losses['balancing'] = router.LossTerm((balancing * tokens)[None], tokens[None])
  return losses
