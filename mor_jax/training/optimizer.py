"""AdamW with decoupled weight decay, global-norm clipping and the learning-rate schedule."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from mor_jax.config import ModelConfig, TrainConfig

NOT_DECAYED = ('scale', 'bias')
AUX_ROUTER_RATE = 10.0  # as the authors


def learning_rate_schedule(train: TrainConfig) -> optax.Schedule:
  """Maps the number of completed updates to the learning rate of the next update.

  The warm-up is linear and reaches the peak at update `warmup_steps`. 'wsd' then holds the
  peak and decays linearly over the last `decay_fraction` of the steps, but never starts the
  decay before the end of the warm-up. 'cosine' decays from the end of the warm-up. Both reach
  `final_learning_rate` at the last update.
  """
  peak, final, warmup = train.learning_rate, train.final_learning_rate, train.warmup_steps
  pieces, boundaries = [optax.linear_schedule(0.0, peak, max(warmup, 1))], [max(warmup, 1)]
  if train.schedule == 'wsd':
    begin = max(train.steps - round(train.decay_fraction * train.steps), boundaries[-1])
    pieces += [optax.constant_schedule(peak)]
    if begin < train.steps:
      pieces += [optax.linear_schedule(peak, final, train.steps - begin)]
      boundaries += [begin]
  else:
    steps = max(train.steps - boundaries[-1], 1)
    pieces += [optax.cosine_decay_schedule(peak, steps, alpha=final / peak)]
  schedule = optax.join_schedules(pieces, boundaries)
  # Counted from 1, so that the first update has a learning rate above 0 and the last one the final.
  # And not below 0, where rounding would put the last one.
  return lambda count: jnp.maximum(schedule(count + 1), 0.0)


def decayed(params: Any) -> Any:
  """Weight-decay mask: True for matrices, False for norm scales and biases, stacked or not."""
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in NOT_DECAYED, params)


def make_optimizer(train: TrainConfig, model: ModelConfig | None = None) -> optax.GradientTransformation:
  """Clips the gradient by its global norm, then takes an AdamW step.

  Routers whose loss reaches no other parameter are a group of their own, with its own clipping: auxiliary ones
  ('aux_router'), at AUX_ROUTER_RATE times the learning rate, and those that learn the benefit ('router').
  """
  apart = {}
  if model is not None and model.has_aux_router:
    apart['aux_router'] = AUX_ROUTER_RATE
  if model is not None and model.learns_benefit:
    apart['router'] = 1.0
  if not apart:
    return _adamw(train, rate=1.0)
  groups = {'main': _adamw(train, rate=1.0)} | {name: _adamw(train, rate) for name, rate in apart.items()}
  return optax.partition(groups, lambda params: {name: name if name in apart else 'main' for name in params})


def _adamw(train: TrainConfig, rate: float) -> optax.GradientTransformation:
  schedule = learning_rate_schedule(train)
  return optax.chain(
    optax.clip_by_global_norm(train.clip_norm),
    optax.adamw(
      lambda count: rate * schedule(count),
      b1=train.beta1,
      b2=train.beta2,
      eps=train.adam_epsilon,
      weight_decay=train.weight_decay,
      mask=decayed,
    ),
  )
