"""Matrices as small integers: scales and rounding by qwix, and errors made good where the inputs of a kernel are known.

With the second moments of its inputs a kernel is rounded row by row, and what rounding a row cost is taken back by the rows
that follow, as far as inputs go together (GPTQ, Frantar et al. 2023, arXiv 2210.17323). Scales are then those that cost
least of several. qwix has GPTQ too, as a loop in Python: it takes minutes to compile for each shape, and seconds a kernel.
"""

import functools

import jax
import jax.numpy as jnp

from mor_jax.config import ConfigError
from mor_jax.model.kernels import Quantised, pack

GROUP = 32  # rows of a kernel of 4 bits with a scale of their own, in each column
# The largest integer stands for so much of the largest value; below 1, larger ones are cut off.
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
DAMPING = 0.01  # of the mean second moment, added to each (GPTQ)


def group_rows(inputs: int) -> int:
  """Rows of a group of 4 bits: the largest even divisor of the inputs up to GROUP. Raises ConfigError."""
  sizes = [size for size in range(2, GROUP + 1, 2) if inputs % size == 0]
  if not sizes:
    raise ConfigError(
      f'--weights=int4 keeps two rows of a kernel in a byte, and one of {inputs} rows has one left over; use '
      f'--weights=int8'
    )
  return sizes[-1]


def by_row(table_VD: jax.Array) -> Quantised:
  """A table of 8 bits with a scale for each row."""
  by_column = quantise(table_VD.T, 8)
  return by_column.T


def quantise(kernel: jax.Array, bits: int, moments: jax.Array | None = None) -> Quantised:
  """A kernel (..., I, O) of 8 bits with a scale for each column, or of 4 bits with one for `group_rows` of it.

  Args:
    moments: second moments (..., I, I) of the inputs, each token weighted by what errors cost there (`sensitivity`);
      None: every value is rounded by itself.

  Raises:
    ConfigError: 4 bits, and a number of rows that is odd.
  """
  inputs = kernel.shape[-2]
  size = group_rows(inputs) if bits == 4 else inputs
  kernel = jnp.asarray(kernel, jnp.float32)
  if moments is None:
    values, scales = _plain(kernel, bits, size)
  else:
    layers = kernel.reshape(-1, *kernel.shape[-2:]), jnp.asarray(moments).reshape(-1, inputs, inputs)
    made = [_made_good(*layer, bits, size) for layer in zip(*layers, strict=True)]
    values, scales = (
      jnp.stack(found).reshape(*kernel.shape[:-2], *found[0].shape) for found in zip(*made, strict=True)
    )
  # float16 has enough digits for 4 bits, and half of the bytes.
  return Quantised(pack(values), scales.astype(jnp.float16)) if bits == 4 else Quantised(values, scales)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _plain(kernel, bits, size):
  """Integers (..., I, O) and scales (..., I / size, O), by which the largest integer is the largest value."""
  import qwix  # an optional extra, for those who quantise

  last = kernel.ndim - 1
  kind = jnp.int4 if bits == 4 else jnp.int8
  groups = {'channelwise_axes': [*range(last - 1), last], 'tiled_axes': {last - 1: size}}
  scales = qwix.quantize(kernel, kind, **groups).scale
  # Rounded here: compiled together with what reads them, XLA does not keep qwix's integers to their range.
  return _number(kernel, jnp.repeat(scales, size, axis=-2), bits), scales


def _number(values, scales, bits):
  largest = 2 ** (bits - 1) - 1
  return jnp.clip(jnp.round(values / scales), -largest - 1.0, float(largest)).astype(jnp.int8)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _made_good(kernel_IO, moments_II, bits, size):
  """Rounds a kernel in blocks of rows; every row hands its error to those after it."""
  inputs = len(kernel_IO)
  cost_I = jnp.diagonal(moments_II)
  damped_II = moments_II + jnp.eye(inputs) * (DAMPING * cost_I.mean() + jnp.finfo(jnp.float32).tiny)
  # Row i of it, over its diagonal, is how row i hands its error on.
  factor_II = jnp.linalg.cholesky(jnp.linalg.inv(damped_II), upper=True)
  # In float32 inputs that all but repeat one another may have no inverse; then every row keeps its error.
  factor_II = jnp.where(jnp.isfinite(factor_II).all(), factor_II, jnp.eye(inputs))
  scale_1O = _cheapest_scales(kernel_IO, cost_I, bits, size) if size == inputs else None
  block = size if scale_1O is None else _block_rows(inputs)

  def round_block(kernel_IO, first):
    rows = jax.lax.dynamic_slice_in_dim(kernel_IO, first, block)
    square = jax.lax.dynamic_slice(factor_II, (first, first), (block, block))
    cost = jax.lax.dynamic_slice_in_dim(cost_I, first, block)
    scale_O = (_cheapest_scales(rows, cost, bits, block) if scale_1O is None else scale_1O)[0]

    def round_row(rows, row):
      number = _number(rows[row], scale_O, bits)
      error_O = (rows[row] - number * scale_O) / square[row, row]
      after = jnp.arange(block) > row
      rows = rows - jnp.where(after, square[row], 0.0)[:, None] * error_O
      return rows, (number, error_O)

    _, (values, errors) = jax.lax.scan(round_row, rows, jnp.arange(block))
    handed_on = jax.lax.dynamic_slice_in_dim(factor_II, first, block).T @ errors
    later = (jnp.arange(inputs) >= first + block)[:, None]
    return kernel_IO - jnp.where(later, handed_on, 0.0), (values, scale_O)

  _, (values, scales) = jax.lax.scan(round_block, kernel_IO, jnp.arange(0, inputs, block))
  return values.reshape(kernel_IO.shape), scales if scale_1O is None else scale_1O


def _block_rows(inputs):
  """Rows that are rounded before the others learn of it, where all have the same scales; for speed only."""
  return next(size for size in range(min(64, inputs), 0, -1) if inputs % size == 0)


def _cheapest_scales(rows, cost_I, bits, size):
  """Of the scales that SHARES give a group of rows, those (1, O) whose rounding costs the least."""
  scales_SO = jnp.array(SHARES)[:, None] * _plain(rows, bits, size)[1]

  def cost_of(scale_O):
    return (cost_I[:, None] * jnp.square(_number(rows, scale_O, bits) * scale_O - rows)).sum(axis=0)

  best_O = jax.lax.map(cost_of, scales_SO).argmin(axis=0)
  return jnp.take_along_axis(scales_SO, best_O[None], axis=0)
