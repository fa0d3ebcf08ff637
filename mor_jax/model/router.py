"""Expert-choice routing: scores, selection, gate, auxiliary loss and router metrics (FACTS 1.2).

At every recursion step a router scores each token that is still active; the step takes
the best C_r of the row (`top_k`), or, where the future is unknown, every token whose
score passes a threshold while places last (`admit`). A token that is left out stays out.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from mor_jax.config import ModelConfig


class RouterHead(nn.Module):
  """Linear scores of the residual stream, in float32 whatever the model's dtype."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    init = nn.initializers.normal(self.config.init_std)
    kernel_D = self.param('kernel', init, (x_BTD.shape[-1],), jnp.float32)
    scaled_BTD = x_BTD.astype(jnp.float32) / self.config.router_temperature
    return jnp.einsum('BTD,D->BT', scaled_BTD, kernel_D)


def init_routers(config: ModelConfig, key: jax.Array) -> dict:
  """Parameters of the R routers, one a recursion step, every leaf with a leading R axis."""
  x_BTD = jnp.zeros((1, 1, config.d_model))
  head = RouterHead(config, parent=None)
  keys_R = jax.random.split(key, config.recursions)
  return jax.vmap(lambda step_key: head.init(step_key, x_BTD)['params'])(keys_R)


def score(config: ModelConfig, params: dict, x_BTD: jax.Array) -> jax.Array:
  """Router logits (B, T) of one recursion step, before any activation."""
  return RouterHead(config, parent=None).apply({'params': params}, x_BTD)


def gate(config: ModelConfig, logits: jax.Array) -> jax.Array:
  """Weight of the block's output: alpha * sigmoid(logit)."""
  return config.router_alpha * jax.nn.sigmoid(logits)


def top_k(logits_BT: jax.Array, active_BT: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
  """The `count` best active tokens of every row: (indices_BC in ascending order, chosen_BC).

  Rows with fewer active tokens fill up with tokens that are not chosen.
  """
  scores_BT = jnp.where(active_BT, logits_BT, -jnp.inf)
  _, best_BC = jax.lax.top_k(jax.lax.stop_gradient(scores_BT), count)
  indices_BC = jnp.sort(best_BC, axis=-1)
  return indices_BC, jnp.take_along_axis(active_BT, indices_BC, axis=1)


def top_k_mask(logits_BT: jax.Array, active_BT: jax.Array, count: int | jax.Array) -> jax.Array:
  """The same choice as a mask (B, T), found by sorting; `count` may be traced."""
  scores_BT = jnp.where(active_BT, jax.lax.stop_gradient(logits_BT), -jnp.inf)
  order_BT = jnp.argsort(-scores_BT, axis=-1, stable=True)
  rank_BT = jnp.argsort(order_BT, axis=-1)
  return active_BT & (rank_BT < count)


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
  count_BT = jnp.cumsum(wants_BT, axis=1)
  before_segment_BT = jax.lax.cummax(jnp.where(starts_BT, count_BT - wants_BT, 0), axis=1)
  has_place_BT = always | (count_BT - before_segment_BT <= places)
  return wants_BT & has_place_BT, wants_BT & ~has_place_BT


@struct.dataclass
class LossTerm:
  """A loss as sum and number of its elements, so that micro-batches add up exactly."""

  sum: jax.Array
  count: jax.Array


@struct.dataclass
class RoutingOutput:
  """What the routers decided, with one leading entry for each of the R recursion steps.

  Attributes:
    logits_RBT: router logits before activation.
    entered_RBT: tokens offered to the step's router: active so far and not padding.
    selected_RBT: tokens that took the step.
    overflow_RBT: tokens that passed the threshold and found no place; never under top-k.
    indices: under gather dispatch, the sorted indices (B, C_r) that each step gathered.
    losses: 'aux': binary cross entropy of each router against its own top-k choice, summed
      over the tokens that entered, (R,); empty under threshold routing.
  """

  logits_RBT: jax.Array
  entered_RBT: jax.Array
  selected_RBT: jax.Array
  overflow_RBT: jax.Array
  indices: tuple[jax.Array, ...] | None
  losses: Mapping[str, LossTerm]

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
    correct_RBT = self.entered_RBT & ((self.logits_RBT > 0) == self.selected_RBT)
    depths_R1 = jnp.arange(steps + 1)[:, None, None]
    return {
      'entered_R': self.entered_RBT.sum((1, 2)),
      'selected_R': self.selected_RBT.sum((1, 2)),
      'correct_R': correct_RBT.sum((1, 2)),
      'overflow_R': self.overflow_RBT.sum((1, 2)),
      'depth_R1': ((self.depth_BT == depths_R1) & self.entered_RBT[0]).sum((1, 2)),
      'entered_T': self.entered_RBT[0].sum(0),
      'last_step_selected_T': self.selected_RBT[-1].sum(0),
    }


def auxiliary_loss(logits_RBT: jax.Array, entered_RBT: jax.Array, selected_RBT: jax.Array) -> LossTerm:
  """Binary cross entropy of the routers against the top-k choice, over tokens that entered (FACTS 1.2)."""
  targets_RBT = selected_RBT.astype(jnp.float32)
  loss_RBT = optax.sigmoid_binary_cross_entropy(logits_RBT, targets_RBT)
  return LossTerm(jnp.where(entered_RBT, loss_RBT, 0).sum((1, 2)), entered_RBT.sum((1, 2)))


def entrants(config: ModelConfig, segment_ids_BT: jax.Array) -> jax.Array:
  """Tokens (R,) that enter each step under top-k, known before the forward pass.

  Step 0 is offered every token that is not padding, step r those that step r - 1 took.
  """
  length = segment_ids_BT.shape[1]
  offered_R = jnp.array((length, *config.selected_tokens(length)[:-1]))
  real_B = (segment_ids_BT > 0).sum(axis=1)
  return jnp.minimum(offered_R[:, None], real_B[None, :]).sum(axis=1).astype(jnp.float32)


def summarize(counts: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """Router metrics from (sums of) `RoutingOutput.counts`, each a scalar.

  * sampling_accuracy: share of entered tokens for which logit > 0 agrees with the choice,
    averaged over the steps (paper section 5.2);
  * dead_token_ratio: share of positions in the row that never took the last recursion;
  * mean_depth; tokens_recursion_r: share of all tokens that took recursion r = 1..R;
    depth_share_n: share that took exactly n; overflow_ratio under threshold routing.
  """
  tokens = jnp.maximum(counts['depth_R1'].sum(), 1)
  accuracy_R = counts['correct_R'] / jnp.maximum(counts['entered_R'], 1)
  seen_T = counts['entered_T'] > 0
  dead_T = seen_T & (counts['last_step_selected_T'] == 0)
  result = {
    'sampling_accuracy': accuracy_R.mean(),
    'dead_token_ratio': dead_T.sum() / jnp.maximum(seen_T.sum(), 1),
    'mean_depth': counts['selected_R'].sum() / tokens,
    'overflow_ratio': counts['overflow_R'].sum() / tokens,
  }
  for step, share in enumerate(counts['selected_R'] / tokens, start=1):
    result[f'tokens_recursion_{step}'] = share
  for depth, share in enumerate(counts['depth_R1'] / tokens):
    result[f'depth_share_{depth}'] = share
  return result
