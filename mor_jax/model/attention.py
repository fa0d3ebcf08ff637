"""Causal grouped-query attention over tokens that know their positions and segments.

A query sees a key iff both lie in the same segment and the key's position is not later
than its own. Keys are tokens of a row in their order; queries are the same tokens, or some
of them in the same order: that is all a recursion step needs, whichever tokens it selected.
Of tokens that are no part of the text (segment 0, padding, and below) outputs mean nothing.
Every backend honours both, or raises. But for `reference`, the definition, none of them
holds scores or weights of all queries and keys at once when rows are long.
"""

import jax
import jax.numpy as jnp

from mor_jax.model import attention_xla
from mor_jax.model.attention_xla import MASKED_SCORE, visible
from mor_jax.model.context import TokenContext


def attend(
  q_BTHE: jax.Array,
  k_BSKE: jax.Array,
  v_BSKE: jax.Array,
  queries: TokenContext,
  keys: TokenContext | None = None,
  backend: str = 'auto',
) -> jax.Array:
  """Scaled dot-product attention (B, T, H, E); query head h reads key/value head h // (H / K).

  Args:
    q_BTHE: queries, rotated.
    k_BSKE: keys, rotated.
    v_BSKE: values.
    queries: positions and segments of the queries.
    keys: those of the keys, of which the queries are a part in the same order; None: the same tokens.
    backend: `model.attention`.

  Raises:
    ValueError: unknown backend.
  """
  if backend not in BACKENDS:
    raise ValueError(f'unknown attention backend {backend!r}; choose one of {", ".join(BACKENDS)}')
  return BACKENDS[backend](q_BTHE, k_BSKE, v_BSKE, queries, queries if keys is None else keys)


def _reference(q_BTHE, k_BSKE, v_BSKE, queries, keys):
  """The definition, head by head in float32."""
  groups = q_BTHE.shape[2] // k_BSKE.shape[2]
  k_BSHE, v_BSHE = (jnp.repeat(a.astype(jnp.float32), groups, axis=2) for a in (k_BSKE, v_BSKE))
  scores_BHTS = jnp.einsum('BTHE,BSHE->BHTS', q_BTHE.astype(jnp.float32), k_BSHE)
  scores_BHTS = scores_BHTS * q_BTHE.shape[-1] ** -0.5
  scores_BHTS = jnp.where(visible(queries, keys)[:, None], scores_BHTS, MASKED_SCORE)
  out_BTHE = jnp.einsum('BHTS,BSHE->BTHE', jax.nn.softmax(scores_BHTS), v_BSHE)
  return out_BTHE.astype(q_BTHE.dtype)


BACKENDS = {'auto': attention_xla.attend, 'reference': _reference, 'xla': attention_xla.attend}
