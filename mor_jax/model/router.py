"""What routers have in common: scores, gate, places, and the record of their decisions (docs/model.md)."""

from collections.abc import Mapping

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from mor_jax.config import ModelConfig

FORCING_BIAS = 1e6  # larger than any gate
HIDDEN_FACTOR = {'linear': 0, 'mlp': 2, 'wide_mlp': 4}


class RouterHead(nn.Module):
  """Scores (B, T, outputs) of the residual stream, in float32 whatever the model's dtype."""

  config: ModelConfig
  outputs: int

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    chex.assert_shape(x_BTD, (None, None, self.config.d_model))
    x = x_BTD.astype(jnp.float32)
    hidden = HIDDEN_FACTOR[self.config.router_head] * x.shape[-1]
    if hidden:
      x = self._dense('hidden', hidden, ('embed', 'router_hidden'))(x)
      x = nn.gelu(x, approximate=False)
    return self._dense('output', self.outputs, ('router_input', 'scores'))(x)

  def _dense(self, name: str, features: int, names: tuple[str, str]) -> nn.Dense:
    init = nn.with_logical_partitioning(nn.initializers.normal(self.config.weight_std), names)
    # By default, TPUs and some GPUs round float32 operands of a product.
    highest = jax.lax.Precision.HIGHEST
    return nn.Dense(features, use_bias=False, kernel_init=init, precision=highest, name=name)


def stacked_heads(config: ModelConfig) -> nn.Module:
  """The module that makes all routers.

  Expert-choice has one router with one output for each recursion step, every parameter with a leading
  R axis; token-choice has one router with R outputs. Steps compute with theirs by `score`.
  """
  if config.router == 'token_choice':
    return RouterHead(config, config.recursions)
  stacked = nn.vmap(
    RouterHead,
    in_axes=None,
    axis_size=config.recursions,
    variable_axes={'params': 0},
    split_rngs={'params': True},
    metadata_params={nn.PARTITION_NAME: 'recursions'},
  )
  return stacked(config, 1)


def score(config: ModelConfig, params: dict, x_BTD: jax.Array, outputs: int) -> jax.Array:
  """Router logits (B, T, outputs), before any activation, of the router that has these parameters."""
  return RouterHead(config, outputs, parent=None).apply({'params': params}, x_BTD)


def random_logits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """What a random router says: logits whose sigmoid is uniform between 0 and 1."""
  return jax.scipy.special.logit(jax.random.uniform(key, shape, minval=1e-6, maxval=1 - 1e-6))


def evaluation_key(tokens_BT: jax.Array) -> jax.Array:
  """The key with which a random router draws for a batch that is evaluated: its own, and the same each time."""
  weights_T = jnp.arange(1, 2 * tokens_BT.shape[1], 2, dtype=jnp.uint32)
  return jax.random.fold_in(
    jax.random.key(0), (tokens_BT.astype(jnp.uint32) * weights_T).sum(dtype=jnp.uint32)
  )


def activate(config: ModelConfig, logits: jax.Array) -> jax.Array:
  """Gate: alpha * activation(logits); softmax acts on the last axis. Routers that only choose have one for all."""
  if config.constant_gate is not None:
    return jnp.full(logits.shape, config.constant_gate, jnp.float32)
  functions = {
    'sigmoid': jax.nn.sigmoid,
    'tanh': jnp.tanh,
    'softmax': jax.nn.softmax,
    'identity': lambda z: z,
  }
  return config.gate_scale * functions[config.squash](logits)


def has_place(wants_BT: jax.Array, starts_BT: jax.Array, places: int | jax.Array) -> jax.Array:
  """Whether fewer than `places` tokens before this one want in; counted anew from every True of starts_BT."""
  count_BT = jnp.cumsum(wants_BT, axis=1)
  before_start_BT = jax.lax.cummax(jnp.where(starts_BT, count_BT - wants_BT, 0), axis=1)
  return count_BT - before_start_BT <= places


@struct.dataclass
class LossTerm:
  """A loss as sum and number of its elements, so that micro-batches add up exactly.

  Shape (R,), one entry a recursion step, or (1,) where there is one router for all.
  """

  sum: jax.Array
  count: jax.Array


@struct.dataclass
class RoutingOutput:
  """What the routers decided, with one leading entry for each of the R recursion steps.

  Attributes:
    logits_RBT: router logits before activation.
    entered_RBT: tokens offered to the step: active so far and not padding.
    selected_RBT: tokens that took the step.
    causal_RBT: the choice that the causal rule makes, whether or not there is a place.
    overflow_RBT: tokens that would have taken the step and found no place.
    indices: where steps gathered their tokens, the sorted indices (B, C_r) of each; else None.
    losses: by name, 'aux' (only under top-k), 'z', 'balancing'; their weights are `loss_weights`.
    extra_counts: sums of this kind of router that `update_state` needs, also in `counts`.
  """

  logits_RBT: jax.Array
  entered_RBT: jax.Array
  selected_RBT: jax.Array
  causal_RBT: jax.Array
  overflow_RBT: jax.Array
  indices: tuple[jax.Array, ...] | None
  losses: Mapping[str, LossTerm]
  extra_counts: Mapping[str, jax.Array]

  @property
  def depth_BT(self) -> jax.Array:
    """Recursions that each token took, 0 to R."""
    return self.selected_RBT.sum(axis=0)

  @property
  def counts(self) -> dict[str, jax.Array]:
    """Numbers of tokens that can be added over batches and then given to `summarize`.

    Suffixes: R a recursion step, R1 a depth from 0 to R, T a position in the row.
    """
    steps = self.selected_RBT.shape[0]
    correct_RBT = self.entered_RBT & (self.causal_RBT == self.selected_RBT)
    depths_R1 = jnp.arange(steps + 1)[:, None, None]
    return {
      'entered_R': self.entered_RBT.sum((1, 2)),
      'selected_R': self.selected_RBT.sum((1, 2)),
      'correct_R': correct_RBT.sum((1, 2)),
      'overflow_R': self.overflow_RBT.sum((1, 2)),
      'depth_R1': ((self.depth_BT == depths_R1) & self.entered_RBT[0]).sum((1, 2)),
      'entered_T': self.entered_RBT[0].sum(0),
      'last_step_selected_T': self.selected_RBT[-1].sum(0),
      **self.extra_counts,
    }


def init_state(config: ModelConfig) -> dict[str, jax.Array]:
  """What routers keep beside their parameters, collection 'routing' of the model's variables.

  * 'bias' (R,) of loss-free balancing; in the balance warm-up it forces the largest depth;
  * 'threshold' (R,), the moving average of `selection=ema_threshold`, and 'updates', how many
    optimiser steps it has seen, per step.
  """
  zeros_R = jnp.zeros((config.recursions,), jnp.float32)
  if config.kind != 'mor':
    return {}
  if config.router == 'token_choice':
    if config.balance_warmup_steps:
      return {'bias': zeros_R.at[-1].set(FORCING_BIAS)}
    return {'bias': zeros_R} if config.balancing == 'loss_free' else {}
  return {'threshold': zeros_R, 'updates': zeros_R} if config.selection == 'ema_threshold' else {}


def update_state(
  config: ModelConfig, state: Mapping, counts: Mapping[str, jax.Array], step: jax.Array
) -> dict[str, jax.Array]:
  """The state after an optimiser step, from the counts of its whole global batch.

  The bias of a depth rises while it is chosen less than the average depth, as in the
  authors' code. The threshold follows the mean border of the top-k choice, and starts at
  the first it sees.

  Args:
    step: optimiser steps done before this one.
  """
  if 'bias' in state:
    return {'bias': _next_bias(config, state['bias'], counts['chosen_R'], step)}
  if 'threshold' in state:
    # A training that grows, or stops short, takes fewer recursions than there are.
    rows_R, border_R = (
      jnp.zeros_like(state['updates']).at[: counts[name].shape[0]].set(counts[name])
      for name in ('border_rows_R', 'border_R')
    )
    seen_R, border_R = rows_R > 0, border_R / jnp.maximum(rows_R, 1)
    decay_R = jnp.where(state['updates'] > 0, config.ema_decay, 0.0)
    moved_R = decay_R * state['threshold'] + (1 - decay_R) * border_R
    return {
      'threshold': jnp.where(seen_R, moved_R, state['threshold']),
      'updates': state['updates'] + seen_R,
    }
  return dict(state)


def _next_bias(config: ModelConfig, bias_R: jax.Array, chosen_R: jax.Array, step: jax.Array) -> jax.Array:
  chosen_R = chosen_R.astype(jnp.float32)
  moved_R = bias_R + config.bias_update_rate * jnp.sign(chosen_R.mean() - chosen_R)
  following_R = moved_R if config.balancing == 'loss_free' else bias_R
  after_warmup_R = jnp.where(step + 1 == config.balance_warmup_steps, jnp.zeros_like(bias_R), following_R)
  return jnp.where(step + 1 < config.balance_warmup_steps, bias_R, after_warmup_R)


def loss_weights(config: ModelConfig) -> dict[str, float]:
  """Weight in the training loss of every term in `RoutingOutput.losses`."""
  return {
    'aux': config.aux_loss_weight,
    'z': config.router_z_loss_weight,
    'balancing': config.balancing_loss_weight,
  }


def entrants(config: ModelConfig, segment_ids_BT: jax.Array, most_B: jax.Array | None = None) -> jax.Array:
  """Tokens (R,) that enter each step under top-k, known before the forward pass.

  Step 0 is offered every token that is not padding, step r those that step r - 1 took.
  What token-choice does later than step 0 is not known in advance, nor needed.

  Args:
    most_B: recursions that the tokens of each row take at most; None: all.
  """
  length = segment_ids_BT.shape[1]
  offered_R = jnp.array((length, *config.selected_tokens(length)[:-1]))
  real_B = (segment_ids_BT > 0).sum(axis=1)
  entered_RB = jnp.minimum(offered_R[:, None], real_B[None, :])
  if most_B is not None:
    entered_RB = jnp.where(jnp.arange(config.recursions)[:, None] < most_B, entered_RB, 0)
  return entered_RB.sum(axis=1).astype(jnp.float32)


def summarize(counts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Router metrics from (sums of) `RoutingOutput.counts` that were fetched, each a scalar, worked out on the host.

  * sampling_accuracy: share of entered tokens for which the causal rule agrees with the
    choice, averaged over the steps (paper section 5.2);
  * dead_token_ratio: share of positions in the row that never took the last recursion;
  * mean_depth; tokens_recursion_r: share of all tokens that took recursion r = 1..R;
    depth_share_n: share that took exactly n; overflow_ratio: share that found no place;
  * depth_entropy in nats and max_violation (largest depth's share over an even share, minus
    1) of the depths 1..R: the load figures of the paper's Table 14.
  """
  tokens = np.maximum(counts['depth_R1'].sum(), 1)
  accuracy_R = counts['correct_R'] / np.maximum(counts['entered_R'], 1)
  seen_T = counts['entered_T'] > 0
  dead_T = seen_T & (counts['last_step_selected_T'] == 0)
  load_R = counts['depth_R1'][1:] / tokens
  result = {
    'sampling_accuracy': accuracy_R.mean(),
    'dead_token_ratio': dead_T.sum() / np.maximum(seen_T.sum(), 1),
    'mean_depth': counts['selected_R'].sum() / tokens,
    'overflow_ratio': counts['overflow_R'].sum() / tokens,
    'depth_entropy': -(load_R * np.log(np.maximum(load_R, 1e-20))).sum(),
    'max_violation': load_R.max() * load_R.shape[0] - 1,
  }
  for step, share in enumerate(counts['selected_R'] / tokens, start=1):
    result[f'tokens_recursion_{step}'] = share
  for depth, share in enumerate(counts['depth_R1'] / tokens):
    result[f'depth_share_{depth}'] = share
  return result
