"""What the model said of tokens: log-probabilities of those that came, and the likeliest ones beside them."""

import jax
import jax.numpy as jnp
from flax import struct

TOKENS_AT_ONCE = 64  # of a lane, whose logits exist together


@struct.dataclass
class Scores:
  """Of the tokens of N sequences, by place; K of the likeliest are kept.

  They are those of the model itself, before penalties, biases and temperature. Nothing is said of the first token.

  Attributes:
    logprob_NT: natural logarithm of the probability that the token has after those before it.
    top_NTK: ids of the likeliest tokens in its place, beginning with the likeliest.
    top_logprob_NTK: theirs.
  """

  logprob_NT: jax.Array
  top_NTK: jax.Array
  top_logprob_NTK: jax.Array


def empty(sequences: int, length: int, count: int) -> Scores:
  """Nothing said yet."""
  return Scores(
    jnp.zeros((sequences, length)),
    jnp.zeros((sequences, length, count), jnp.int32),
    jnp.zeros((sequences, length, count)),
  )


def put(
  scores: Scores, rows: jax.Array, places: jax.Array, logits_NV: jax.Array, tokens: jax.Array
) -> Scores:
  """The scores with those of some tokens.

  Args:
    rows, places, tokens: (N,) of each token; what lies beyond the last row or place is dropped.
    logits_NV: after the token before it.
  """
  logprobs_NV = jax.nn.log_softmax(logits_NV.astype(jnp.float32))
  top_logprob_NK, top_NK = jax.lax.top_k(logprobs_NV, scores.top_NTK.shape[-1])
  own_N = jnp.take_along_axis(logprobs_NV, tokens[:, None], axis=-1)[:, 0]
  return Scores(
    scores.logprob_NT.at[rows, places].set(own_N, mode='drop'),
    scores.top_NTK.at[rows, places].set(top_NK, mode='drop'),
    scores.top_logprob_NTK.at[rows, places].set(top_logprob_NK, mode='drop'),
  )


def put_chunk(scores: Scores, places_BC: jax.Array, tokens_BC: jax.Array, x_BCD: jax.Array, head) -> Scores:
  """The scores with those of a chunk of every lane; the logits of a part of it exist at a time.

  Args:
    places_BC: of the tokens that are scored; those beyond the last are dropped.
    x_BCD: the stream after the token before each.
    head: (N, D) -> logits (N, V).
  """
  batch, length = tokens_BC.shape
  part = min(length, TOKENS_AT_ONCE)
  while length % part:
    part += 1
  rows_BP = jnp.broadcast_to(jnp.arange(batch)[:, None], (batch, part)).ravel()

  def some(index, scores):
    def cut(leaf):
      return jax.lax.dynamic_slice_in_dim(leaf, index * part, part, axis=1)

    x_ND = cut(x_BCD).reshape(batch * part, -1)
    return put(scores, rows_BP, cut(places_BC).ravel(), head(x_ND), cut(tokens_BC).ravel())

  return jax.lax.fori_loop(0, length // part, some, scores)
