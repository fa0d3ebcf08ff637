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
from mor_jax.model.transformer import Transformer
from mor_jax.training import vocabulary_loss
from mor_jax.training.distillation import Teacher

Batch = Mapping[str, jax.Array]


@struct.dataclass
class Normalizers:
  """What the sums of a global batch are divided by.

  Attributes:
    targets: tokens that are predicted, ().
    entrants_R: tokens that enter each recursion step, (R,).
  """

  targets: jax.Array
  entrants_R: jax.Array


def visible_segments(segment_ids: jax.Array, segment_mask: bool) -> jax.Array:
  """Segment ids as the model shall see them: documents apart, or every row as one document.

  Without `segment_mask` tokens attend to, and are predicted from, the document before
  theirs, as in the paper; padding (segment 0) stays invisible. Takes numpy and jax arrays.
  """
  return segment_ids if segment_mask else (segment_ids > 0).astype(segment_ids.dtype)


def visible_batch(batch: Batch, segment_mask: bool) -> dict[str, jax.Array]:
  """The batch with `visible_segments`, and with positions that fit them."""
  if segment_mask:
    return dict(batch)
  segment_ids = visible_segments(batch['segment_ids'], segment_mask)
  positions_T = jnp.arange(segment_ids.shape[-1], dtype=jnp.int32)
  positions = jnp.broadcast_to(positions_T, segment_ids.shape)
  return {'tokens': batch['tokens'], 'segment_ids': segment_ids, 'positions': positions}


def predicted(segment_ids: jax.Array) -> jax.Array:
  """Mask (..., T - 1): token t + 1 is predicted from t iff both are of the same document."""
  return (segment_ids[..., 1:] == segment_ids[..., :-1]) & (segment_ids[..., 1:] > 0)


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
  targets_BT = jnp.roll(batch['tokens'], -1, axis=1)
  mask_BT = jnp.pad(predicted(batch['segment_ids']), ((0, 0), (0, 1)))
  more, shared = per_token_and_shared or ((), None)
  per_token = (targets_BT, mask_BT, *([more] if per_token_and_shared else []))
  return vocabulary_loss.sum_over_tokens(token_loss, x_BTD, kernel_DV, per_token, chunk, mesh, shared)


def normalizers(config: ModelConfig, segment_ids_ABT: jax.Array) -> Normalizers:
  """Counts over all A micro-batches of a global batch; never 0, so that they can divide."""
  targets = predicted(segment_ids_ABT).sum().astype(jnp.float32)
  entrants_AR = jax.vmap(lambda ids_BT: router.entrants(config, ids_BT))(segment_ids_ABT)
  return Normalizers(jnp.maximum(targets, 1), jnp.maximum(entrants_AR.sum(axis=0), 1))


def make_loss(
  apply: Callable[..., Any],
  config: ModelConfig,
  chunk: int | None = None,
  mesh: Mesh | None = None,
  teacher: Teacher | None = None,
) -> Callable[..., tuple[jax.Array, dict[str, Any]]]:
  """The training loss of a model: (params, micro-batch, normalizers, routing, key) -> (loss, parts).

  The loss is the micro-batch's share of `mean NLL + sum over auxiliary losses of weight *
  sum over steps of the mean over entrants`; shares add up to the loss of the global batch.
  The parts add up in the same way: 'loss' (mean NLL) and, for models with a router, 'counts'
  for `router.summarize` and the auxiliary losses before their weights, 'aux_loss' and so on.

  `routing` is the routers' state, {} for most; `key` is what a random router draws from.
  `chunk` and `mesh` are those of `next_token_nll`. With a `teacher`, the loss also takes its parameters as its
  last argument, adds `weight * distillation.divergence`, and has that mean as the part 'distill_loss'.
  """

  weights = router.loss_weights(config)

  def loss(
    params, batch: Batch, whole: Normalizers, routing: Mapping[str, jax.Array], key: jax.Array, *theirs
  ):
    x_BTD, kernel_DV, routed = apply(
      {'params': params, 'routing': routing} if routing else {'params': params},
      batch['tokens'],
      rngs={'routing': key},
      routing='topk',
      segment_ids=batch['segment_ids'],
      positions=batch['positions'],
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
    for name, term in routed.losses.items():
      # A router that serves all steps has one entry, a mean over the tokens that enter the first.
      value = (term.sum / whole.entrants_R[: term.sum.shape[0]]).sum()
      total += weights[name] * value
      parts[f'{name}_loss'] = value
    return total, parts

  return loss
