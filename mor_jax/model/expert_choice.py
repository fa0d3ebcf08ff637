"""Expert-choice routing: every recursion step takes its best tokens (paper section 2.2.1; docs/model.md).

At each step a router scores the tokens that are still active. In training the step takes
the best C_r of the row; where the future is unknown it takes every token whose score
passes a threshold, while places last. A token that is left out stays out.

* `route_gathered`: each step computes on its C_r gathered tokens alone; sizes differ, so
  the steps are unrolled;
* `route_masked`: each step computes on all tokens and drops what was not selected: the
  reference for the former, and the way of threshold routing, whose sizes are not static.
  All steps have one shape and are scanned.
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from mor_jax.config import ModelConfig
from mor_jax.model import recursion, router, tokens
from mor_jax.model.context import TokenContext
from mor_jax.model.recursion import Given, Rule


def top_k(logits_BT: jax.Array, active_BT: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
  """The `count` best active tokens of every row: (indices_BC in ascending order, chosen_BC).

  Rows with fewer active tokens fill up with tokens that are not chosen.
  """
  indices_BC = tokens.best(jnp.where(active_BT, logits_BT, -jnp.inf), count)
  return indices_BC, tokens.take(active_BT, indices_BC)


def top_k_mask(logits_BT: jax.Array, active_BT: jax.Array, count: int | jax.Array) -> jax.Array:
  """The same choice as a mask (B, T), found by sorting; `count` may be traced."""
  return active_BT & (tokens.rank(jnp.where(active_BT, logits_BT, -jnp.inf)) < count)


def admit(
  logits_BT: jax.Array,
  active_BT: jax.Array,
  starts_BT: jax.Array,
  places: int | jax.Array,
  always: bool | jax.Array,
  threshold: float | jax.Array = 0.0,
) -> tuple[jax.Array, jax.Array]:
  """Causal choice: (selected_BT, overflow_BT), decided left to right within each segment.

  Args:
    logits_BT: router logits.
    active_BT: tokens that took the step before.
    starts_BT: True at the first token of each segment.
    places: tokens of one segment that the step can take.
    always: True for a step of capacity 1, which takes every active token.
    threshold: logits above it enter.

  Returns:
    The tokens that take the step, and those that wanted to but found no place.
  """
  wants_BT = active_BT & (always | (logits_BT > threshold))
  fits_BT = always | router.has_place(wants_BT, starts_BT, places)
  return wants_BT & fits_BT, wants_BT & ~fits_BT


Routed = tuple[jax.Array, router.RoutingOutput, jax.Array | None]
"""Residual stream, what routers did, and the streams after each recursion (R, B, T, D) if the rule keeps them."""


def route_gathered(
  block: nn.Module, steps_R: dict, x_BTD: jax.Array, context: TokenContext, rule: Rule, given: Given
) -> Routed:
  """Top-k routing in which a step computes on its selected tokens only.

  Args:
    block: the shared layers.
    steps_R: what each step to be taken, R or fewer, has of its own, leaves with a leading R axis: 'router', with
      `causality=aux_router` also 'aux_router', their parameters; 'own', relaxed parameters
      (`relaxation.Steps`); 'threshold', logits above it enter under threshold routing;
      with `random_router`, 'key', the step's random key; in training with noise on the choice, 'noise', its key.
    x_BTD: residual stream; tokens of segment 0 are padding and never selected.
    context: positions and segments of the tokens.
    rule: 'topk'.
    given: `most_B` at most.
  """
  config, length = block.config, x_BTD.shape[1]
  active_BT = context.segments_BC > 0
  remembered, decisions, indices, states = None, [], [], []
  for step, count in enumerate(config.selected_tokens(length)[: rule.steps]):
    params = jax.tree.map(lambda leaf, r=step: leaf[r], steps_R)
    logits_BT, causal_BT = scores(config, params, x_BTD)
    active_BT = entered_BT = given.may_go_on(active_BT, step)
    if count == length:  # nothing to leave out: no need to move tokens
      indices_BC = jnp.broadcast_to(jnp.arange(length), active_BT.shape)
      x_BTD, remembered = _step_on_all(block, params['own'], x_BTD, context, logits_BT, active_BT, remembered)
    else:
      indices_BC, chosen_BC = top_k(with_noise(config, params, logits_BT), active_BT, count)
      x_BCD = tokens.take(x_BTD, indices_BC)
      y_BCD, remembered = recursion.run_step(
        block, params['own'], x_BCD, context.take(indices_BC), indices_BC, chosen_BC, remembered
      )
      change_BCD = change(config, x_BCD, y_BCD, tokens.take(logits_BT, indices_BC))
      change_BCD = jnp.where(chosen_BC[..., None], change_BCD, 0)
      x_BTD = tokens.add(x_BTD, indices_BC, change_BCD)
      active_BT = tokens.mask(indices_BC, chosen_BC, length)
    indices.append(indices_BC)
    states.append(x_BTD)
    decisions.append((logits_BT, causal_BT, entered_BT, active_BT, jnp.zeros_like(active_BT)))
  stacked = jax.tree.map(lambda *steps: jnp.stack(steps), *decisions)
  states_RBTD = jnp.stack(states) if rule.keeps_states else None
  return x_BTD, _record(config, steps_R, stacked, tuple(indices), 'topk'), states_RBTD


def route_masked(
  block: nn.Module, steps_R: dict, x_BTD: jax.Array, context: TokenContext, rule: Rule, given: Given
) -> Routed:
  """Routing in which every step computes on all tokens: top-k, threshold, or given depths.

  Arguments as in `route_gathered`.
  """
  config, steps = block.config, rule.steps
  starts_BT = context.positions_BC == 0
  always_R = jnp.array([capacity == 1.0 for capacity in config.step_capacities])
  limit_R = jnp.array(recursion.limits(config, rule, x_BTD.shape[1]))

  def step(block, carry, params_and_limits):
    x_BTD, active_BT, remembered = carry
    params, limit, always, index = params_and_limits
    logits_BT, causal_BT = scores(config, params, x_BTD)
    active_BT = given.may_go_on(active_BT, index)
    if given.depths_BT is not None:
      selected_BT, overflow_BT = active_BT & (given.depths_BT > index), jnp.zeros_like(active_BT)
    elif rule.routing == 'topk':
      selected_BT = top_k_mask(with_noise(config, params, logits_BT), active_BT, limit)
      overflow_BT = jnp.zeros_like(selected_BT)
    else:
      selected_BT, overflow_BT = admit(causal_BT, active_BT, starts_BT, limit, always, params['threshold'])
    x_BTD, remembered = _step_on_all(block, params['own'], x_BTD, context, logits_BT, selected_BT, remembered)
    decisions = logits_BT, causal_BT, active_BT, selected_BT, overflow_BT
    return (x_BTD, selected_BT, remembered), (decisions, x_BTD if rule.keeps_states else None)

  start = x_BTD, context.segments_BC > 0, None
  per_step = steps_R, limit_R[:steps], always_R[:steps], jnp.arange(steps)
  (x_BTD, _, _), (decisions, states_RBTD) = recursion.scan_steps(block, step, start, per_step, steps)
  return x_BTD, _record(config, steps_R, decisions, None, rule.routing), states_RBTD


def scores(config: ModelConfig, params: dict, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Logits (B, T) that rank and weigh the tokens of a step, and those that decide causally."""
  if config.random_router:
    logits_BT = router.random_logits(params['key'], x_BTD.shape[:2])
    return logits_BT, logits_BT
  if config.learns_benefit:
    x_BTD = jax.lax.stop_gradient(x_BTD)
  scaled_BTD = x_BTD.astype(jnp.float32) / config.router_temperature
  logits_BT = router.score(config, params['router'], scaled_BTD, 1)[..., 0]
  if config.causality != 'aux_router':
    return logits_BT, logits_BT
  aux_BT1 = router.score(config, params['aux_router'], jax.lax.stop_gradient(x_BTD), 1)
  return logits_BT, aux_BT1[..., 0]


def with_noise(config: ModelConfig, params: dict, logits_BT: jax.Array) -> jax.Array:
  """The logits that the choice is made by: in training, those of the router plus logistic noise."""
  if 'noise' not in params:
    return logits_BT
  return logits_BT + config.noise_scale * router.random_logits(params['noise'], logits_BT.shape)


def _step_on_all(block, own, x_BTD, context, logits_BT, selected_BT, remembered):
  """One step computed on every token and kept where selected."""
  indices_BT = jnp.broadcast_to(jnp.arange(x_BTD.shape[1]), selected_BT.shape)
  y_BTD, remembered = recursion.run_step(block, own, x_BTD, context, indices_BT, selected_BT, remembered)
  change_BTD = change(block.config, x_BTD, y_BTD, logits_BT)
  return jnp.where(selected_BT[..., None], x_BTD + change_BTD, x_BTD), remembered


def change(config: ModelConfig, x: jax.Array, y: jax.Array, logits: jax.Array) -> jax.Array:
  """What a selected token gains: w * f(x) as in the authors' code, f(x), or w * (f(x) - x) (eq. 2.1)."""
  if config.gating == 'additive':
    return y
  update = y - x if config.gating == 'residual' else y
  return (router.activate(config, logits)[..., None] * update.astype(jnp.float32)).astype(x.dtype)


def _record(config, steps_R, decisions, indices, routing) -> router.RoutingOutput:
  logits_RBT, causal_RBT, entered_RBT, selected_RBT, overflow_RBT = decisions
  losses, extra_counts = {'z': _over_entered(jnp.square(logits_RBT), entered_RBT)}, {}
  if routing == 'topk':
    extra_counts = _border(causal_RBT, entered_RBT, selected_RBT)
    if config.causality != 'none':
      errors_RBT = optax.sigmoid_binary_cross_entropy(causal_RBT, selected_RBT.astype(jnp.float32))
      losses['aux'] = _over_entered(errors_RBT, entered_RBT)
  return router.RoutingOutput(
    logits_RBT=logits_RBT,
    entered_RBT=entered_RBT,
    selected_RBT=selected_RBT,
    causal_RBT=causal_RBT > steps_R['threshold'][:, None, None],
    overflow_RBT=overflow_RBT,
    indices=indices,
    losses=losses,
    extra_counts=extra_counts,
  )


def _border(logits_RBT, entered_RBT, selected_RBT) -> dict[str, jax.Array]:
  """Sum over rows of the logit halfway between the last token taken and the first refused, and their number.

  Rows that refuse nobody have no border.
  """
  last_RB = jnp.where(selected_RBT, logits_RBT, jnp.inf).min(axis=2)
  first_RB = jnp.where(entered_RBT & ~selected_RBT, logits_RBT, -jnp.inf).max(axis=2)
  exists_RB = jnp.isfinite(last_RB) & jnp.isfinite(first_RB)
  border_RB = jnp.where(exists_RB, last_RB + first_RB, 0) / 2
  return {'border_R': border_RB.sum(axis=1), 'border_rows_R': exists_RB.sum(axis=1)}


def _over_entered(loss_RBT: jax.Array, entered_RBT: jax.Array) -> router.LossTerm:
  """The routers' losses are means over the tokens that entered the step."""
  return router.LossTerm(jnp.where(entered_RBT, loss_RBT, 0).sum((1, 2)), entered_RBT.sum((1, 2)))
