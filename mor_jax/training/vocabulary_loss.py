"""A loss over the vocabulary that never holds the logits of all tokens.

The head and the loss are applied to a chunk of tokens at a time. When the loss is
differentiated, the gradients of a chunk are computed along with its loss, while its logits
exist: three matrix products as without chunks, nothing is recomputed, and what is kept is
as large as the hidden states and the head, whatever the number of tokens times V is.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from mor_jax.parallel import mesh as mesh_lib

# Tokens whose logits exist at once. A CPU's caches want few; an accelerator's matrix units want many, and a
# gradient of the head that is not read and written too often.
CHUNK = {'cpu': 512}
ACCELERATOR_CHUNK = 2048


TokenLoss = Callable[[jax.Array, Any], jax.Array]
"""(logits (N, V) in float32, what else is known of the N tokens) -> the sum of their losses."""


def sum_over_tokens(
  token_loss: TokenLoss,
  x_BTD: jax.Array,
  kernel_DV: jax.Array,
  per_token: Any,
  chunk: int | None = None,
  mesh: Mesh | None = None,
) -> jax.Array:
  """Sum of `token_loss` over all tokens, for hidden states and the kernel of the output head.

  Args:
    token_loss: hashable; adds up over tokens.
    x_BTD: normed final states, in the dtype of matrix products.
    kernel_DV: output head, float32.
    per_token: arrays (B, T, ...) that the loss of a token depends on; no gradient flows to them. A
      token for which they are all 0 (False) must cost nothing: chunks are filled up with such.
    chunk: tokens of a device whose logits exist at once; 0: all; None: what suits the platform.
    mesh: over whose replica and fsdp axes rows are split; every device then works through its
      own rows, and the gradient of the head is added up once.
  """
  if chunk is None:
    platform = mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()
    chunk = CHUNK.get(platform, ACCELERATOR_CHUNK)
  if mesh is None or mesh_lib.row_shards(mesh) == 1:
    return _own_rows(token_loss, chunk, (), x_BTD, kernel_DV, per_token)
  axes, rows = mesh_lib.BATCH_AXES, PartitionSpec(mesh_lib.BATCH_AXES)

  def shard(x_BTD, kernel_DV, per_token):
    # Explicit, so that the one sum over devices is that of the finished gradient.
    own_kernel_DV = _varying(kernel_DV, axes)
    return jax.lax.psum(_own_rows(token_loss, chunk, axes, x_BTD, own_kernel_DV, per_token), axes)

  sharded = jax.shard_map(
    shard,
    mesh=mesh,
    in_specs=(rows, PartitionSpec(), rows),
    out_specs=PartitionSpec(),
    axis_names=set(axes),
  )
  return sharded(x_BTD, kernel_DV, per_token)


def next_token_nll(logits_NV: jax.Array, targets_and_mask_N: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Negative log-likelihood in nats, summed over the tokens of the mask: a `TokenLoss`."""
  targets_N, mask_N = targets_and_mask_N
  largest_N1 = jax.lax.stop_gradient(logits_NV.max(axis=-1, keepdims=True))
  normalizer_N = jnp.log(jnp.exp(logits_NV - largest_N1).sum(axis=-1)) + largest_N1[:, 0]
  # Compared, not gathered: a vocabulary that is split over devices then needs no logits of other devices.
  vocabulary_NV = jax.lax.broadcasted_iota(jnp.int32, logits_NV.shape, 1)
  target_logit_N = jnp.where(vocabulary_NV == targets_N[:, None], logits_NV, 0).sum(axis=-1)
  return jnp.where(mask_N, normalizer_N - target_logit_N, 0).sum()


def _own_rows(token_loss, chunk, axes, x_BTD, kernel_DV, per_token):
  x_ND, per_token_N = jax.tree.map(lambda a_BT: a_BT.reshape(-1, *a_BT.shape[2:]), (x_BTD, per_token))
  tokens = x_ND.shape[0]
  if not 0 < chunk < tokens:
    return token_loss(_head(x_ND, kernel_DV), per_token_N)
  count = -(-tokens // chunk)
  size = -(-tokens // count)

  def split(a_N):
    filled_N = jnp.pad(a_N, ((0, count * size - tokens), *((0, 0),) * (a_N.ndim - 1)))
    return filled_N.reshape(count, size, *a_N.shape[1:])

  return _chunked(token_loss, axes, kernel_DV, *jax.tree.map(split, (x_ND, per_token_N)))


def _head(x_ND, kernel_DV):
  return jnp.dot(x_ND, kernel_DV.astype(x_ND.dtype), preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(token_loss, axes, kernel_DV, x_CND, per_token_CN):
  """The sum over C chunks of N tokens, one after the other."""
  cast_kernel_DV = kernel_DV.astype(x_CND.dtype)

  def add(total, chunk):
    x_ND, per_token_N = chunk
    return total + token_loss(_head(x_ND, cast_kernel_DV), per_token_N), None

  return jax.lax.scan(add, _varying(jnp.float32(0), axes), (x_CND, per_token_CN))[0]


def _chunked_forward(token_loss, axes, kernel_DV, x_CND, per_token_CN):
  cast_kernel_DV = kernel_DV.astype(x_CND.dtype)

  def add(carry, chunk):
    total, grad_DV = carry
    x_ND, per_token_N = chunk
    loss, grad_NV = jax.value_and_grad(token_loss)(_head(x_ND, cast_kernel_DV), per_token_N)
    grad_NV = grad_NV.astype(x_ND.dtype)
    grad_DV = grad_DV + jnp.dot(x_ND.T, grad_NV, preferred_element_type=jnp.float32)
    return (total + loss, grad_DV), jnp.dot(grad_NV, cast_kernel_DV.T)

  start = _varying((jnp.float32(0), jnp.zeros(kernel_DV.shape)), axes)
  (total, grad_DV), grad_CND = jax.lax.scan(add, start, (x_CND, per_token_CN))
  return total, (grad_DV, grad_CND)


def _chunked_backward(token_loss, axes, gradients, scale):
  del token_loss, axes
  return *((gradient * scale).astype(gradient.dtype) for gradient in gradients), None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _varying(arrays, axes):
  """The same values, allowed to differ over the mesh axes from here on, as the carry of a loop must be."""
  return jax.lax.pcast(arrays, axes, to='varying') if axes else arrays
