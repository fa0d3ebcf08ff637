"""Causal grouped-query attention over tokens that know their positions and segments.

A query sees a key iff both lie in the same segment and the key's position is not later
than its own, nor a window of positions before it or more. Keys are tokens of a row in
their order; queries are the same tokens, or some of them in the same order: that is all
a recursion step needs, whichever tokens it selected.
Outputs of tokens outside the text (padding, segment 0, and below) mean nothing.
Every backend honours all of it, or raises. But for `reference`, the definition, none of them
holds scores or weights of all queries and keys at once when rows are long.
"""

from functools import partial

import jax
import jax.numpy as jnp

from mor_jax.model import attention_xla, axes
from mor_jax.model.attention_xla import MASKED_SCORE, visible
from mor_jax.model.context import TokenContext

PLATFORMS = {'splash': 'tpu', 'cudnn': 'gpu'}  # backends that work on one platform only


def attend(
  q_BTHE: jax.Array,
  k_BSKE: jax.Array,
  v_BSKE: jax.Array,
  queries: TokenContext,
  keys: TokenContext | None = None,
  backend: str = 'auto',
  window: int | None = None,
) -> jax.Array:
  """Scaled dot-product attention (B, T, H, E); query head h reads key/value head h // (H / K).

  Args:
    q_BTHE: queries, rotated.
    k_BSKE: keys, rotated.
    v_BSKE: values.
    queries: positions and segments of the queries.
    keys: those of the keys, of which the queries are a part in the same order; None: the same tokens.
    backend: `model.attention`.
    window: positions that a query sees, its own and those right before it; None: all.

  Raises:
    ValueError: unknown backend, or one that cannot do this on this platform.
  """
  if backend == 'auto':
    backend = fastest(axes.platform(), q_BTHE.dtype, q_BTHE.shape[-1])
  if backend not in BACKENDS:
    raise ValueError(f'unknown attention backend {backend!r}; choose one of {", ".join(BACKENDS)}')
  reason = unfit(backend, axes.platform(), q_BTHE.dtype, q_BTHE.shape[-1])
  if reason:
    raise ValueError(f'attention backend {backend!r} {reason}')
  return BACKENDS[backend](q_BTHE, k_BSKE, v_BSKE, queries, keys, window)


def fastest(platform: str | None, dtype: jnp.dtype, width: int) -> str:
  """The backend that 'auto' stands for on a platform ('cpu', 'gpu', 'tpu'; None: several devices, no mesh)."""
  for backend, only in PLATFORMS.items():
    if platform == only and not unfit(backend, platform, dtype, width):
      return backend
  return 'xla'


def unfit(backend: str, platform: str | None, dtype: jnp.dtype, width: int) -> str:
  """Why a backend cannot be used, and what to use instead; '' if it can."""
  only = PLATFORMS.get(backend, platform)
  if platform != only:
    return (
      f'needs a {only.upper()}, and this is {platform or "no single platform"}; use auto, xla or reference'
    )
  if backend == 'cudnn' and jnp.dtype(dtype) != jnp.bfloat16:
    return f'computes in bfloat16, not {jnp.dtype(dtype)}; set dtype=bfloat16 or use xla'
  if backend == 'cudnn' and (width % 8 or width > 128):
    return f'takes heads whose width is a multiple of 8 up to 128, not {width}; use xla'
  return ''


def _reference(q_BTHE, k_BSKE, v_BSKE, queries, keys, window=None):
  """The definition, head by head in float32."""
  groups = q_BTHE.shape[2] // k_BSKE.shape[2]
  k_BSHE, v_BSHE = (jnp.repeat(a.astype(jnp.float32), groups, axis=2) for a in (k_BSKE, v_BSKE))
  scores_BHTS = jnp.einsum('BTHE,BSHE->BHTS', q_BTHE.astype(jnp.float32), k_BSHE)
  scores_BHTS = scores_BHTS * q_BTHE.shape[-1] ** -0.5
  visible_BTS = visible(queries, queries if keys is None else keys, window)
  scores_BHTS = jnp.where(visible_BTS[:, None], scores_BHTS, MASKED_SCORE)
  out_BTHE = jnp.einsum('BHTS,BSHE->BTHE', jax.nn.softmax(scores_BHTS), v_BSHE)
  return out_BTHE.astype(q_BTHE.dtype)


def _xla(q_BTHE, k_BSKE, v_BSKE, queries, keys, window=None):
  keys = queries if keys is None else keys
  return attention_xla.attend(q_BTHE, k_BSKE, v_BSKE, queries, keys, window)


def _splash(q_BTHE, k_BSKE, v_BSKE, queries, keys, window=None):
  """Splash attention, or our own kernel: where the queries are some tokens and the keys all, and for windows.

  JAX's kernel counts a window in places of a row, where gathered tokens lie closer than in their text.
  """
  # Pallas takes a second to import, which is for those who use it.
  from mor_jax.model import attention_pallas, attention_splash

  if keys is None and window is None:
    return _on_own_device(attention_splash.attend)(q_BTHE, k_BSKE, v_BSKE, queries)
  keys, kernel = queries if keys is None else keys, partial(attention_pallas.attend, window=window)
  return _on_own_device(kernel)(q_BTHE, k_BSKE, v_BSKE, queries, keys)


def _cudnn(q_BTHE, k_BSKE, v_BSKE, queries, keys, window=None):
  """cuDNN's flash attention, which learns of positions and segments through a mask shared by all heads."""
  keys = queries if keys is None else keys

  def run(q_BTHE, k_BSKE, v_BSKE, queries, keys):
    length, odd_T, odd_S = q_BTHE.shape[1], q_BTHE.shape[1] % 2, k_BSKE.shape[1] % 2  # it takes even sizes
    mask_B1TS = jnp.pad(visible(queries, keys, window)[:, None], ((0, 0), (0, 0), (0, odd_T), (0, odd_S)))
    q, k, v = (
      jnp.pad(a, ((0, 0), (0, odd), (0, 0), (0, 0)))
      for a, odd in ((q_BTHE, odd_T), (k_BSKE, odd_S), (v_BSKE, odd_S))
    )
    return jax.nn.dot_product_attention(q, k, v, mask=mask_B1TS, implementation='cudnn')[:, :length]

  return _on_own_device(run)(q_BTHE, k_BSKE, v_BSKE, queries, keys)


def _on_own_device(kernel):
  """The kernel, run on every device for its own rows and heads: the compiler cannot split it."""
  query, key, tokens = ('batch', None, 'heads'), ('batch', None, 'kv_heads'), ('batch',)

  def run(q_BTHE, k_BSKE, v_BSKE, *contexts):
    inputs = [query, key, key, *(tokens,) * len(contexts)]
    return axes.per_shard(kernel, inputs, query, is_kernel=True)(q_BTHE, k_BSKE, v_BSKE, *contexts)

  return run


BACKENDS = {'reference': _reference, 'xla': _xla, 'splash': _splash, 'cudnn': _cudnn}
