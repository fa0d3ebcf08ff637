"""A loss over the vocabulary that never materialises the logits of all tokens.

The head and the loss are applied to one chunk of tokens at a time. Under differentiation the
gradients of a chunk are computed together with its loss, while its logits are in memory. This
takes the same three matrix products as an unchunked loss, without recomputation. The memory kept
is that of the hidden states and the head; it does not grow with tokens times V.
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


TokenLoss = Callable[..., Any]
"""(logits (N, V) in float32, what else is known of the N tokens[, what all share]) -> the sum of their losses.

It may return a pair: the sum, and other sums to look at, through which no gradient flows.
"""


def sum_over_tokens(
  token_loss: TokenLoss,
  x_BTD: jax.Array,
  kernel_DV: jax.Array,
  per_token: Any,
  chunk: int | None = None,
  mesh: Mesh | None = None,
  shared: Any = None,
) -> Any:
  """Sums `token_loss` over all tokens, given the hidden states and the kernel of the output head.

  Args:
    token_loss: hashable; additive over tokens.
    x_BTD: final hidden states after the norm, in the dtype of matrix products.
    kernel_DV: output head, float32.
    per_token: arrays (B, T, ...) with the inputs of each token's loss; no gradient flows to them. A
      token whose entries are all 0 (False) must have loss 0, because chunks are padded with such tokens.
    chunk: tokens per chunk and device; 0: all tokens; None: the platform's default.
    mesh: rows are split over its replica and fsdp axes. Each device then processes its own rows,
      and the gradient of the head is reduced once.
    shared: arrays used by the loss of every token, passed to `token_loss` last unless None; no gradient
      flows to them.

  Returns:
    The result of `token_loss`, summed over all tokens.
  """
  chunk = _chunk_size(chunk, mesh)
  if mesh is None or mesh_lib.row_shards(mesh) == 1:
    return _own_rows(token_loss, chunk, (), x_BTD, kernel_DV, per_token, shared)
  axes, rows = mesh_lib.BATCH_AXES, PartitionSpec(mesh_lib.BATCH_AXES)

  def shard(x_BTD, kernel_DV, per_token, shared):
    # Explicit, so that the one sum over devices is that of the finished gradient.
    own_kernel_DV, own_shared = _varying(kernel_DV, axes), _varying(shared, axes)
    return jax.lax.psum(_own_rows(token_loss, chunk, axes, x_BTD, own_kernel_DV, per_token, own_shared), axes)

  sharded = jax.shard_map(
    shard,
    mesh=mesh,
    in_specs=(rows, PartitionSpec(), rows, PartitionSpec()),
    out_specs=PartitionSpec(),
    axis_names=set(axes),
  )
  return sharded(x_BTD, kernel_DV, per_token, shared)


def map_tokens(
  function: Callable[..., Any],
  x_BTD: Any,
  kernel_DV: jax.Array,
  per_token: Any,
  chunk: int | None = None,
  mesh: Mesh | None = None,
) -> Any:
  """What a function makes of the logits of every token: a tree of arrays (B, T, ...), without gradient.

  Args:
    function: (logits (N, V) in float32, what else is known of the N tokens) -> a tree of arrays (N, ...).
    x_BTD: final hidden states, or a tree of them, of which the function then gets the logits.

  The others as in `sum_over_tokens`.
  """
  size = _chunk_size(chunk, mesh)

  def own_rows(x_BTD, kernel_DV, per_token):
    batch, length, _ = jax.tree.leaves(x_BTD)[0].shape
    x_ND, per_token_N = jax.tree.map(lambda a_BT: a_BT.reshape(-1, *a_BT.shape[2:]), (x_BTD, per_token))
    chunks, _ = _split((x_ND, per_token_N), size)

    def of_chunk(x_and_per_token):
      x_ND, per_token_N = x_and_per_token
      return function(jax.tree.map(lambda one_ND: _head(one_ND, kernel_DV), x_ND), per_token_N)

    found = jax.lax.map(of_chunk, chunks)

    def whole(a_CN):
      return a_CN.reshape(-1, *a_CN.shape[2:])[: batch * length].reshape(batch, length, *a_CN.shape[2:])

    return jax.tree.map(whole, found)

  arguments = jax.lax.stop_gradient((x_BTD, kernel_DV, per_token))
  if mesh is None or mesh_lib.row_shards(mesh) == 1:
    return own_rows(*arguments)
  rows = PartitionSpec(mesh_lib.BATCH_AXES)
  sharded = jax.shard_map(
    own_rows,
    mesh=mesh,
    in_specs=(rows, PartitionSpec(), rows),
    out_specs=rows,
    axis_names=set(mesh_lib.BATCH_AXES),
    check_vma=False,
  )
  return sharded(*arguments)


def next_token_nll(logits_NV: jax.Array, targets_and_mask_N: tuple[jax.Array, jax.Array]) -> jax.Array:
  """A `TokenLoss`: negative log-likelihood in nats, summed over the tokens in the mask."""
  targets_N, mask_N = targets_and_mask_N
  return jnp.where(mask_N, token_nll(logits_NV, targets_N), 0).sum()


def token_nll(logits_NV: jax.Array, targets_N: jax.Array) -> jax.Array:
  """Negative log-likelihood (N,) of each target, in nats."""
  largest_N1 = jax.lax.stop_gradient(logits_NV.max(axis=-1, keepdims=True))
  normalizer_N = jnp.log(jnp.exp(logits_NV - largest_N1).sum(axis=-1)) + largest_N1[:, 0]
  # Compared, not gathered: a vocabulary that is split over devices then needs no logits of other devices.
  vocabulary_NV = jax.lax.broadcasted_iota(jnp.int32, logits_NV.shape, 1)
  target_logit_N = jnp.where(vocabulary_NV == targets_N[:, None], logits_NV, 0).sum(axis=-1)
  return normalizer_N - target_logit_N


def _chunk_size(chunk: int | None, mesh: Mesh | None) -> int:
  if chunk is not None:
    return chunk
  platform = mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()
  return CHUNK.get(platform, ACCELERATOR_CHUNK)


def _split(arrays_N: Any, chunk: int) -> tuple[Any, int]:
  """Arrays (N, ...) as equal chunks (C, N / C, ...), filled up with zeros; and C."""
  tokens = jax.tree.leaves(arrays_N)[0].shape[0]
  count = -(-tokens // chunk) if 0 < chunk < tokens else 1
  size = -(-tokens // count)

  def split(a_N):
    filled_N = jnp.pad(a_N, ((0, count * size - tokens), *((0, 0),) * (a_N.ndim - 1)))
    return filled_N.reshape(count, size, *a_N.shape[1:])

  return jax.tree.map(split, arrays_N), count


def _own_rows(token_loss, chunk, axes, x_BTD, kernel_DV, per_token, shared):
  x_ND, per_token_N = jax.tree.map(lambda a_BT: a_BT.reshape(-1, *a_BT.shape[2:]), (x_BTD, per_token))
  chunks, count = _split((x_ND, per_token_N), chunk)
  if count == 1:
    total, sums = _with_sums(token_loss, _head(x_ND, kernel_DV), per_token_N, shared)
    return total if sums is None else (total, sums)
  total, sums = _chunked(token_loss, axes, kernel_DV, *chunks, shared)
  return total if sums is None else (total, sums)


def _with_sums(token_loss, logits_NV, per_token_N, shared):
  """(sum of the loss, other sums or None)."""
  loss = token_loss(logits_NV, per_token_N) if shared is None else token_loss(logits_NV, per_token_N, shared)
  return (loss[0], jax.lax.stop_gradient(loss[1])) if isinstance(loss, tuple) else (loss, None)


def _zero_sums(token_loss, axes, cast_kernel_DV, x_CND, per_token_CN, shared):
  """Zeros in the structure of `_with_sums`: the initial totals."""
  first = jax.tree.map(lambda a_CN: a_CN[0], (x_CND, per_token_CN))
  shapes = jax.eval_shape(
    lambda x_ND, per_token_N: _with_sums(token_loss, _head(x_ND, cast_kernel_DV), per_token_N, shared), *first
  )
  return jax.tree.map(lambda leaf: _varying(jnp.zeros(leaf.shape, leaf.dtype), axes), shapes)


def _head(x_ND, kernel_DV):
  return jnp.dot(x_ND, kernel_DV.astype(x_ND.dtype), preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(token_loss, axes, kernel_DV, x_CND, per_token_CN, shared):
  """(sum of the loss, other sums or None) over C chunks of N tokens, processed sequentially."""
  cast_kernel_DV = kernel_DV.astype(x_CND.dtype)

  def add(totals, chunk):
    x_ND, per_token_N = chunk
    sums = _with_sums(token_loss, _head(x_ND, cast_kernel_DV), per_token_N, shared)
    return jax.tree.map(jnp.add, totals, sums), None

  start = _zero_sums(token_loss, axes, cast_kernel_DV, x_CND, per_token_CN, shared)
  return jax.lax.scan(add, start, (x_CND, per_token_CN))[0]


def _chunked_forward(token_loss, axes, kernel_DV, x_CND, per_token_CN, shared):
  cast_kernel_DV = kernel_DV.astype(x_CND.dtype)
  gradient = jax.value_and_grad(partial(_with_sums, token_loss), has_aux=True)

  def add(carry, chunk):
    totals, grad_DV = carry
    x_ND, per_token_N = chunk
    sums, grad_NV = gradient(_head(x_ND, cast_kernel_DV), per_token_N, shared)
    grad_NV = grad_NV.astype(x_ND.dtype)
    grad_DV = grad_DV + jnp.dot(x_ND.T, grad_NV, preferred_element_type=jnp.float32)
    return (jax.tree.map(jnp.add, totals, sums), grad_DV), jnp.dot(grad_NV, cast_kernel_DV.T)

  zeros = _zero_sums(token_loss, axes, cast_kernel_DV, x_CND, per_token_CN, shared)
  start = zeros, _varying(jnp.zeros(kernel_DV.shape), axes)
  (totals, grad_DV), grad_CND = jax.lax.scan(add, start, (x_CND, per_token_CN))
  return totals, (grad_DV, grad_CND)


def _chunked_backward(token_loss, axes, gradients, scales):
  del token_loss, axes
  return *((gradient * scales[0]).astype(gradient.dtype) for gradient in gradients), None, None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _varying(arrays, axes):
  """Marks the arrays as varying over the mesh axes, as JAX requires of a loop carry."""
  return jax.lax.pcast(arrays, axes, to='varying') if axes else arrays
