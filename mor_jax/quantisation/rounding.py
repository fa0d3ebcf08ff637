"""Matrices as small integers: qwix rounds them, and of several scales the one is taken that costs the loss least."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mor_jax.config import ConfigError
from mor_jax.model.kernels import Quantised, pack

GROUP = 32  # rows of a kernel of 4 bits with a scale of their own, in each column
# Largest integers stand for so much of the largest value; below 1 larger ones are cut off.
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)


def group_rows(inputs: int) -> int:
  """Rows of a group of 4 bits: the largest even divisor of the inputs up to GROUP. Raises ConfigError."""
  sizes = [size for size in range(2, GROUP + 1, 2) if inputs % size == 0]
  if not sizes:
    raise ConfigError(
      f'--weights=int4 keeps two rows of a kernel in a byte, and one of {inputs} rows has none over; use --weights=int8'
    )
  return sizes[-1]


def by_row(table_VD: jax.Array) -> Quantised:
  """A table of 8 bits with a scale for each row."""
  by_column = quantise(table_VD.T, 8)
  return by_column.T


def quantise(
  kernel: jax.Array, bits: int, sensitivity: jax.Array | None = None, shares: Sequence[float] = SHARES
) -> Quantised:
  """A kernel (..., I, O) of 8 bits with a scale for each column, or of 4 bits with one for `group_rows` of it.

  Args:
    sensitivity: of the loss to each value (`sensitivity.measure`), which the squares of errors are weighted with to
      choose among the shares; None: the first.

  Raises:
    ConfigError: 4 bits, and a number of rows that is odd.
  """
  size = group_rows(kernel.shape[-2]) if bits == 4 else kernel.shape[-2]
  return _rounded(kernel, sensitivity, bits, size, tuple(shares if sensitivity is not None else shares[:1]))


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _rounded(kernel, sensitivity, bits, size, shares):
  import qwix  # an optional extra, and only for those who quantise

  last = kernel.ndim - 1
  how = {'channelwise_axes': [*range(last - 1), last], 'tiled_axes': {last - 1: size}}
  kind = jnp.int4 if bits == 4 else jnp.int8
  best = None
  for share in shares:
    found = qwix.quantize(kernel.astype(jnp.float32), kind, calibration_method=f'absmax,{share}', **how)
    cost = jnp.zeros(())
    if sensitivity is not None:
      squares = sensitivity * jnp.square(qwix.dequantize(found) - kernel)
      cost = squares.reshape(*found.scale.shape[:-1], size, -1).sum(axis=-2)
    new = cost, found.qvalue.astype(jnp.int8), found.scale
    best = new if best is None else _better(best, new, size)
  _, values, scales = best
  return Quantised(pack(values), scales.astype(jnp.float16)) if bits == 4 else Quantised(values, scales)


def _better(one, other, size):
  """Of two candidates (cost, values, scales) the cheaper in each group."""
  wins = other[0] < one[0]
  each = jnp.repeat(wins, size, axis=-2)
  return (
    jnp.where(wins, other[0], one[0]),
    jnp.where(each, other[1], one[1]),
    jnp.where(wins, other[2], one[2]),
  )
