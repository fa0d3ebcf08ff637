"""AdamW with decoupled weight decay, global-norm clipping and the learning-rate schedule."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mor_jax.config import ModelConfig, TrainConfig
from mor_jax.training import trainable

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


def make_optimizer(
  train: TrainConfig, model: ModelConfig | None = None, done: int = 0
) -> optax.GradientTransformation:
  """Clips the gradient by its global norm, then takes an AdamW step, of the parameters that are trained.

  `init` and `update` take all parameters; gradients, updates and moments are of the trained ones alone
  (`trainable.split`). Routers whose loss reaches no other parameter are a group of their own, with its own clipping: auxiliary ones
  ('aux_router'), at AUX_ROUTER_RATE times the learning rate, and those that learn the benefit ('router').

  Args:
    done: updates after which it takes over: the stage of `train.stages` that is under way.
  """
  apart = {}
  if model is not None and model.has_aux_router:
    apart['aux_router'] = AUX_ROUTER_RATE
  if model is not None and model.learns_benefit:
    apart['router'] = 1.0
  past = trainable.past_stages(train, done)
  groups = {name: _adamw(train, rate, past) for name, rate in {'main': 1.0, **apart}.items()}
  inner = groups['main']
  if apart:
    inner = optax.partition(
      groups, lambda params: {name: name if name in apart else 'main' for name in params}
    )

  def init(params):
    return inner.init(trainable.split(past[-1], params)[0])

  def update(grads, state, params):
    return inner.update(grads, state, trainable.split(past[-1], params)[0])

  return optax.GradientTransformation(init, update)


def _adamw(train: TrainConfig, rate: float, past: Sequence[str]) -> optax.GradientTransformation:
  schedule = learning_rate_schedule(train)
  return optax.chain(
    optax.clip_by_global_norm(train.clip_norm),
    # As optax.adamw, but that moments may have begun at different times, whereas the schedule runs through.
    optax.chain(
      _moments(train, past),
      optax.add_decayed_weights(train.weight_decay, decayed),
      optax.scale_by_learning_rate(lambda count: rate * schedule(count)),
    ),
  )


def _moments(train: TrainConfig, past: Sequence[str]) -> optax.GradientTransformation:
  """Adam, whose bias correction counts from the stage on in which a parameter began to be trained."""

  def adam():
    return optax.scale_by_adam(b1=train.beta1, b2=train.beta2, eps=train.adam_epsilon)

  if train.stages is None:
    return adam()

  def began(params):
    return jax.tree_util.tree_map_with_path(
      lambda path, _: f'stage_{trainable.since(past, "/".join(entry.key for entry in path))}', params
    )

  return optax.partition({f'stage_{number}': adam() for number in range(len(past))}, began)
