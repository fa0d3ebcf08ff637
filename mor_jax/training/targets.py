"""What is predicted: segments as the model shall see them, targets, and which of them count."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

Batch = Mapping[str, jax.Array]
"""Arrays (B, T): 'tokens', 'segment_ids', 'positions'; of some data also 'targets', what is to be predicted in place of
the token itself, and 'loss_mask', above 0 for tokens whose prediction counts."""


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
  return {**batch, 'segment_ids': segment_ids, 'positions': positions}


def predicted(batch: Batch) -> jax.Array:
  """Mask (..., T - 1): token t + 1 is predicted from t iff both are of one document and its loss counts.

  Args:
    batch: 'segment_ids' and, where not all tokens are scored, 'loss_mask', above 0 for those that are.
  """
  segment_ids = batch['segment_ids']
  same = (segment_ids[..., 1:] == segment_ids[..., :-1]) & (segment_ids[..., 1:] > 0)
  return same & (batch['loss_mask'][..., 1:] > 0) if 'loss_mask' in batch else same


def targets(batch: Batch) -> jax.Array:
  """What each token (B, T) is to predict: the next one; the last of a row wraps round, and never counts."""
  return jnp.roll(batch.get('targets', batch['tokens']), -1, axis=1)
