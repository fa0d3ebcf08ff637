"""Next-token loss and the routers' auxiliary losses.

Both are sums divided by numbers that are known for the whole global batch before the
forward pass, so that the gradient does not depend on how the batch is split into
micro-batches and over devices.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from mor_jax.config import ModelConfig
from mor_jax.model import router
from mor_jax.model.recursion import Given
from mor_jax.model.transformer import Transformer
from mor_jax.training import benefit, vocabulary_loss
from mor_jax.training.distillation import Teacher
from mor_jax.training.targets import Batch, predicted, targets


@struct.dataclass
class Normalizers:
  """What the sums of a global batch are divided by.

  Attributes:
    targets: tokens that are predicted, ().
    entrants_R: tokens that enter each recursion step, (R,).
    labelled: tokens of the rows that routers get labels for, ().
  """

  targets: jax.Array
  entrants_R: jax.Array
  labelled: jax.Array


def next_token_nll(
  x_BTD: jax.Array, kernel_DV: jax.Array, batch: Batch, chunk: int | None = None, mesh: Mesh | None = None
) -> jax.Array:
  """Negative log-likelihood in nats, summed over the predicted tokens, in float32.

  Args:
    x_BTD: normed final states.
    kernel_DV: output head.
    batch: arrays (B, T).
    chunk: `train.loss_chunk`.
    mesh: over which rows are split.
  """
  return sum_over_predicted(vocabulary_loss.next_token_nll, x_BTD, kernel_DV, batch, chunk, mesh)


def sum_over_predicted(
  token_loss: vocabulary_loss.TokenLoss,
  x_BTD: jax.Array,
  kernel_DV: jax.Array,
  batch: Batch,
  chunk: int | None,
  mesh: Mesh | None,
  *per_token_and_shared: Any,
) -> Any:
  """Sum of a loss over the predicted tokens: `vocabulary_loss.sum_over_tokens`.

  Args:
    token_loss: its tokens have (targets, mask), or with more per token (targets, mask, more).
    per_token_and_shared: more per token (B, T, ...), and what all tokens share.
  """
  # All T states, the last of which predicts nothing: their number is then one that divides well.
  mask_BT = jnp.pad(predicted(batch), ((0, 0), (0, 1)))
  more, shared = per_token_and_shared or ((), None)
  per_token = (targets(batch), mask_BT, *([more] if per_token_and_shared else []))
  return vocabulary_loss.sum_over_tokens(token_loss, x_BTD, kernel_DV, per_token, chunk, mesh, shared)


def normalizers(config: ModelConfig, batch_ABT: Batch) -> Normalizers:
  """Counts over all A micro-batches of a global batch; never 0, so that they can divide."""
  predictions = predicted(batch_ABT).sum().astype(jnp.float32)
  count_entrants = jax.vmap(
    lambda batch_BT: router.entrants(config, batch_BT['segment_ids'], batch_BT.get('most'))
  )
  entrants_AR = count_entrants(dict(batch_ABT))
  labelled = benefit.labelled_tokens(config, batch_ABT['segment_ids'])
  return Normalizers(*(jnp.maximum(count, 1) for count in (predictions, entrants_AR.sum(axis=0), labelled)))


def make_loss(
  apply: Callable[..., Any],
  config: ModelConfig,
  chunk: int | None = None,
  mesh: Mesh | None = None,
  teacher: Teacher | None = None,
  max_recursions: int | None = None,
) -> Callable[..., tuple[jax.Array, dict[str, Any]]]:
  """The training loss of a model: (params, micro-batch, normalizers, routing, key) -> (loss, parts).

  The loss is the micro-batch's share of `mean NLL + sum over auxiliary losses of weight *
  sum over steps of the mean over entrants`; shares add up to the loss of the global batch.
  The parts add up in the same way: 'loss' (mean NLL) and, for models with a router, 'counts'
  for `router.summarize` and the auxiliary losses before their weights, 'aux_loss' and so on.

  `routing` is the routers' state, {} for most; `key` is what a random router draws from.
  `max_recursions`, all by default, are what tokens take at most; a batch may have 'most' (B,), the same for each row.
  `chunk` and `mesh` are those of `next_token_nll`. With a `teacher`, the loss also takes its parameters as its
  last argument, adds `weight * distillation.divergence`, and has that mean as the part 'distill_loss'.
  """

  weights = router.loss_weights(config)
  routers_loss = None
  if config.learns_benefit and max_recursions != 1:  # of a single exit there is nothing to learn
    routers_loss = benefit.make_loss(apply, config, chunk, mesh, max_recursions)

  def loss(
    params, batch: Batch, whole: Normalizers, routing: Mapping[str, jax.Array], key: jax.Array, *theirs
  ):
    x_BTD, kernel_DV, routed = apply(
      {'params': params, 'routing': routing} if routing else {'params': params},
      batch['tokens'],
      rngs={'routing': key, 'noise': jax.random.fold_in(key, 1)},
      routing='topk',
      segment_ids=batch['segment_ids'],
      positions=batch['positions'],
      max_recursions=max_recursions,
      given=Given(most_B=batch.get('most')),
      method=Transformer.states_and_head,
    )
    if teacher is None:
      total = next_token_nll(x_BTD, kernel_DV, batch, chunk, mesh) / whole.targets
      parts = {'loss': total}
    else:
      shown = teacher.show(*theirs, batch)
      total, sums = sum_over_predicted(teacher.loss, x_BTD, kernel_DV, batch, chunk, mesh, *shown)
      total, parts = total / whole.targets, {name: value / whole.targets for name, value in sums.items()}
    if routed is None:
      return total, parts
    parts |= {'counts': routed.counts}
    if routers_loss is not None:
      sums = routers_loss(params, batch)
      parts['benefit_loss'] = sums['benefit'] / whole.labelled
      parts['depth_prior_loss'] = sums['depth_prior'] / whole.labelled
      total += parts['benefit_loss'] + config.depth_prior_weight * parts['depth_prior_loss']
    for name, term in routed.losses.items():
      # A router that serves all steps has one entry, a mean over the tokens that enter the first.
      value = (term.sum / whole.entrants_R[: term.sum.shape[0]]).sum()
      total += weights[name] * value
      parts[f'{name}_loss'] = value
    return total, parts

  return loss
