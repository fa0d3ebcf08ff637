"""Causal grouped-query attention over tokens that know their positions and segments.

A query sees a key iff both lie in the same segment and the key's position is not later
than its own. Queries and keys may be any subset of a row, as long as positions say where
they come from: that is all a recursion step needs, whichever tokens it selected. Every
backend honours both, or must raise.
"""

import jax
import jax.numpy as jnp

# Finite, so that a query which sees no key (padding) gives a finite, unused result.
MASKED_SCORE = -1e30


def attend(
  q_BTHE: jax.Array,
  k_BSKE: jax.Array,
  v_BSKE: jax.Array,
  visible_BTS: jax.Array,
  backend: str = 'auto',
) -> jax.Array:
  """Scaled dot-product attention (B, T, H, E); query head h reads key/value head h // (H / K).

  Args:
    q_BTHE: queries, rotated.
    k_BSKE: keys, rotated.
    v_BSKE: values.
    visible_BTS: which key each query sees (`visible`).
    backend: 'reference', 'xla' or 'auto'.

  Raises:
    ValueError: unknown backend.
  """
  if backend not in BACKENDS:
    raise ValueError(f'unknown attention backend {backend!r}; choose one of {", ".join(BACKENDS)}')
  return BACKENDS[backend](q_BTHE, k_BSKE, v_BSKE, visible_BTS)


def visible(
  query_positions_BT: jax.Array,
  key_positions_BS: jax.Array,
  query_segments_BT: jax.Array,
  key_segments_BS: jax.Array,
) -> jax.Array:
  """Mask (B, T, S): same segment, and the key not later than the query."""
  not_later_BTS = key_positions_BS[:, None, :] <= query_positions_BT[:, :, None]
  same_segment_BTS = key_segments_BS[:, None, :] == query_segments_BT[:, :, None]
  return not_later_BTS & same_segment_BTS


def _reference(q_BTHE, k_BSKE, v_BSKE, visible_BTS):
  """The definition, head by head in float32."""
  groups = q_BTHE.shape[2] // k_BSKE.shape[2]
  k_BSHE, v_BSHE = (jnp.repeat(a.astype(jnp.float32), groups, axis=2) for a in (k_BSKE, v_BSKE))
  scores_BHTS = jnp.einsum('BTHE,BSHE->BHTS', q_BTHE.astype(jnp.float32), k_BSHE)
  scores_BHTS = scores_BHTS * q_BTHE.shape[-1] ** -0.5
  scores_BHTS = jnp.where(visible_BTS[:, None], scores_BHTS, MASKED_SCORE)
  out_BTHE = jnp.einsum('BHTS,BSHE->BTHE', jax.nn.softmax(scores_BHTS), v_BSHE)
  return out_BTHE.astype(q_BTHE.dtype)


def _xla(q_BTHE, k_BSKE, v_BSKE, visible_BTS):
  """Two batched products per key/value head, the queries of a group flattened into one matrix."""
  batch, length, heads, width = q_BTHE.shape
  kv_heads = k_BSKE.shape[2]
  groups = heads // kv_heads
  q_BTKGE = (q_BTHE * width**-0.5).reshape(batch, length, kv_heads, groups, width)
  q_BKME = q_BTKGE.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, groups * length, width)
  k_BKES = k_BSKE.transpose(0, 2, 3, 1)
  v_BKSE = v_BSKE.transpose(0, 2, 1, 3)
  scores_BKMS = jnp.matmul(q_BKME, k_BKES, preferred_element_type=jnp.float32)
  scores_BKGTS = scores_BKMS.reshape(batch, kv_heads, groups, length, -1)
  scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS, MASKED_SCORE)
  weights_BKGTS = jax.nn.softmax(scores_BKGTS).astype(v_BSKE.dtype)
  out_BKME = jnp.matmul(weights_BKGTS.reshape(scores_BKMS.shape), v_BKSE)
  out_BKGTE = out_BKME.reshape(batch, kv_heads, groups, length, width)
  return out_BKGTE.transpose(0, 3, 1, 2, 4).reshape(q_BTHE.shape)


BACKENDS = {'auto': _xla, 'reference': _reference, 'xla': _xla}
