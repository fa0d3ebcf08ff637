"""What a router learns from with `router_target=benefit`: whether a token's loss falls if it goes on.

The gate's gradient asks whether this update lowers the loss now. A token whose first updates do not help, because its
answer needs several, is then never sent on (docs/model.md). Here a pass without gradient lets the tokens of some rows
take all recursions, and reads them out after each. With l_r the loss of a token that leaves after r recursions, it
should take recursion r + 1 if a later exit is better by more than a margin m:

  y_r = [ min over s > r of l_s  <  l_r - m ],

which the router of that recursion learns to say of the stream it sees, by binary cross-entropy. The labels look ahead,
at the target; the decision does not. Halting on whether a further loop lowers the token's loss is also how RecurTrace
(arXiv 2609.03379) trains; a prior on the mean depth of a batch, instead of on every token's, is that of 2610.09013.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from mor_jax.config import ConfigError, ModelConfig
from mor_jax.model.transformer import Transformer
from mor_jax.training import readout, vocabulary_loss
from mor_jax.training.targets import Batch, predicted


def labelled_rows(config: ModelConfig, rows: int) -> int:
  """How many of the rows of a micro-batch labels are made for: at least one."""
  return max(1, round(config.benefit_rows * rows))


def check_rows(config: ModelConfig, rows: int, shards: int) -> None:
  """Raises ConfigError if the labelled rows of a micro-batch cannot be shared by the devices that rows lie on."""
  if config.learns_benefit and labelled_rows(config, rows) % shards:
    raise ConfigError(
      f'model.benefit_rows={config.benefit_rows} makes {labelled_rows(config, rows)} of the {rows} rows of a '
      f'micro-batch labelled, which {shards} devices cannot share; set it to {shards / rows:g} or a multiple'
    )


def labels(nll_RBT: jax.Array, scored_BT: jax.Array, margin: float) -> jax.Array:
  """Whether a token should go on (R - 1, B, T), after 1 to R - 1 recursions.

  Args:
    nll_RBT: its loss if it leaves after 1 to R recursions.
    scored_BT: tokens that have a loss; the others need no further recursion.
    margin: nats by which it must fall.
  """
  best_later_RBT = jax.lax.cummin(nll_RBT, axis=0, reverse=True)[1:]
  return (best_later_RBT < nll_RBT[:-1] - margin) & scored_BT


def expected_depth(logits_RBT: jax.Array) -> jax.Array:
  """Mean recursions (B, T) of tokens that go on with the probability that each router gives: 1 + sum of products."""
  return 1 + jnp.exp(jnp.cumsum(jax.nn.log_sigmoid(logits_RBT), axis=0)).sum(axis=0)


def take_rows(config: ModelConfig, batch_BT: Any) -> Any:
  """The labelled rows of arrays (B, T): at equal distances, whatever devices they lie on."""
  rows = jax.tree.leaves(batch_BT)[0].shape[0]
  count = labelled_rows(config, rows)
  indices = np.arange(count) * rows // count
  return jax.tree.map(lambda array_BT: array_BT[indices], batch_BT)


def labelled_tokens(config: ModelConfig, segment_ids_ABT: jax.Array) -> jax.Array:
  """Tokens of the labelled rows of all A micro-batches."""
  return (jax.vmap(lambda ids_BT: take_rows(config, ids_BT))(segment_ids_ABT) > 0).sum().astype(jnp.float32)


def make_loss(
  apply: Callable[..., Any],
  config: ModelConfig,
  chunk: int | None,
  mesh: Mesh | None,
  max_recursions: int | None = None,
) -> Callable[..., dict[str, jax.Array]]:
  """The routers' loss: (params, micro-batch) -> sums over the labelled rows' tokens, and what divides them.

  'benefit' is the cross-entropy summed over tokens and over recursions 2 to R, 'depth_prior' the squared difference
  of mean depths times the number of tokens, which is 'tokens'. Gradients reach the routers alone.
  """

  def loss(params: Any, batch: Batch) -> dict[str, jax.Array]:
    batch = take_rows(config, dict(batch))
    frozen = {
      name: part if name == 'router' else jax.lax.stop_gradient(part) for name, part in params.items()
    }
    arguments = batch, vocabulary_loss.token_nll, chunk, mesh, max_recursions
    states_EBTD, nll_RBT = apply({'params': frozen}, *arguments, method=readout.after_each)
    seen_RBT = apply({'params': frozen}, states_EBTD[:-1], method=Transformer.router_logits)[1:]
    real_BT = batch['segment_ids'] > 0
    scored_BT = jnp.pad(predicted(batch), ((0, 0), (0, 1)))
    wanted_RBT = labels(nll_RBT, scored_BT, config.benefit_margin)
    errors_RBT = optax.sigmoid_binary_cross_entropy(seen_RBT, wanted_RBT.astype(jnp.float32))
    tokens = real_BT.sum().astype(jnp.float32)
    mean_depth = jnp.where(real_BT, expected_depth(seen_RBT), 0).sum() / jnp.maximum(tokens, 1)
    prior = jnp.square(mean_depth - sum(config.step_capacities[:max_recursions]))
    return {
      'benefit': jnp.where(real_BT, errors_RBT, 0).sum(),
      'depth_prior': prior * tokens,
      'tokens': tokens,
    }

  return loss
