"""What a matrix of the parameters may be: an array, or small integers with their scales.

A quantised matrix stands in the tree of parameters where the array stood, `.../kernel/values` and `.../kernel/scales`.
Whoever multiplies with it asks `product`, whoever needs it as it is `whole`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from mor_jax.model import axes

# Rows, if there are several, up to which a CPU multiplies integers with integers where each row of a matrix has its scale.
FEW_ROWS = 32
PACKED = jnp.uint8  # two rows in a byte
LEAVES = ('values', 'scales')


@struct.dataclass
class Quantised:
  """A matrix (..., I, O) of integers and scales; a value is an integer times the scale of its part of the matrix.

  Attributes:
    values: int8 (..., I, O); or uint8 (..., I / 2, O) of 4 bits, where a byte has row 2i in its lower half and row
      2i + 1 in the upper.
    scales: (..., G, C): G divides I, C divides O, so that each is that of I/G x O/C values.
  """

  values: jax.Array
  scales: jax.Array

  @property
  def is_packed(self) -> bool:
    """Whether the integers have 4 bits."""
    return self.values.dtype == PACKED

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the matrix that it stands for."""
    *stacked, rows, columns = self.values.shape
    return (*stacked, rows * 2 if self.is_packed else rows, columns)

  @property
  def ndim(self) -> int:
    """Number of its axes."""
    return self.values.ndim

  @property
  def T(self) -> 'Quantised':
    """The transposed matrix, of 8 bits."""
    return Quantised(self.values.T, self.scales.T)

  def integers(self) -> jax.Array:
    """The values (..., I, O) one by one, int8."""
    return unpack(self.values) if self.is_packed else self.values

  def whole(self) -> jax.Array:
    """The matrix in float32."""
    *stacked, rows, columns = self.shape
    groups, parts = self.scales.shape[-2:]
    cut = self.integers().reshape(*stacked, groups, rows // groups, parts, columns // parts)
    scaled = cut.astype(jnp.float32) * self.scales.astype(jnp.float32)[..., :, None, :, None]
    return scaled.reshape(self.shape)

  def product(self, x_NI: jax.Array) -> jax.Array:
    """x @ the matrix, in the dtype of x."""
    kernel = self._after(x_NI)
    if self.scales.shape[-2] > 1:
      return x_NI @ kernel.whole().astype(x_NI.dtype)
    y_NO = jnp.dot(x_NI, kernel.integers().astype(x_NI.dtype), preferred_element_type=jnp.float32)
    return (y_NO * self.scales).astype(x_NI.dtype)

  def product_with_rows(self, x_NO: jax.Array) -> jax.Array:
    """x @ the transposed matrix, of 8 bits with a scale for each row, in the dtype of x."""
    if axes.platform() == 'cpu' and 1 < len(x_NO) <= FEW_ROWS:
      return _in_integers(x_NO, self)
    return self.T.product(x_NO)

  def _after(self, x: jax.Array) -> 'Quantised':
    """The same, that can be had only when x is there.

    Else a compiler makes floats of all kernels at the beginning of a call and holds them until it ends. That of a CPU
    takes an optimization barrier away before it decides when; that integers grow by one where x is no number it must
    compute. On meshes this would bring a number of x to all devices.
    """
    if axes.platform() != 'cpu' or jax.sharding.get_abstract_mesh().size > 1:
      return self.replace(values=jax.lax.optimization_barrier((self.values, x))[0])
    return self.replace(values=self.values + jnp.isnan(x.ravel()[0]).astype(self.values.dtype))

  def plus(self, change: jax.Array) -> jax.Array:
    """The sum, which has no few integers any more."""
    return self.whole() + change


Kernel = Any
"""An array, a `Quantised`, or what else has `whole`, `product`, `plus` and `shape`."""


class Matrix(nn.Module):
  """One kernel under the module's name, for those who compute with it themselves.

  Attributes:
    shape: its shape.
    names: logical names of its axes.
    init: its initialiser.
  """

  shape: tuple[int, int]
  names: axes.Names
  init: Callable[..., jax.Array]

  @nn.compact
  def __call__(self) -> Kernel:
    return parameter(self, 'kernel', nn.with_logical_partitioning(self.init, tuple(self.names)), self.shape)


def product(x_NI: jax.Array, kernel: Kernel) -> jax.Array:
  """x @ kernel (N, O)."""
  return kernel.product(x_NI) if is_kernel(kernel) else x_NI @ kernel


def whole(kernel: Kernel) -> jax.Array:
  """The matrix as an array."""
  return kernel.whole() if is_kernel(kernel) else kernel


def plus(kernel: Kernel, change: jax.Array) -> Kernel:
  """The matrix with a change added."""
  return kernel.plus(change) if is_kernel(kernel) else kernel + change


def cast(kernel: Kernel, dtype: jnp.dtype) -> Kernel:
  """An array in a dtype; others have their own."""
  return kernel if is_kernel(kernel) else kernel.astype(dtype)


def rows(table_VD: Kernel, index: jax.Array) -> jax.Array:
  """Rows (..., D) of a matrix with a scale for each row, or of an array."""
  if not isinstance(table_VD, Quantised):
    return table_VD[index]
  return table_VD.values[index] * table_VD.scales[index]


def parameter(module: nn.Module, name: str, init: Callable[..., Any], shape: tuple[int, ...]) -> Kernel:
  """The parameter of a module: float32 as `init` makes it, or what stands in its place. Raises ValueError for its shape."""
  if module.has_variable('params', name) and is_kernel(found := module.get_variable('params', name)):
    if found.shape != shape:
      raise ValueError(f'{"/".join(module.path)}/{name} is of shape {found.shape}, not {shape}')
    return found
  return module.param(name, init, shape, jnp.float32)


def gather(kernel: Kernel, names: axes.Names) -> Kernel:
  """`axes.gather_parameter` of the kernel, which travels between devices as it is stored."""
  return jax.tree.map(lambda leaf: axes.gather_parameter(leaf, names), kernel)


def is_kernel(leaf: Any) -> bool:
  """Whether this is a matrix that is no array; for `jax.tree.map(..., is_leaf=is_kernel)`."""
  return hasattr(leaf, 'whole')


def map_paths(function: Callable[[str, Any], Any], params: dict) -> dict:
  """Every matrix and other leaf changed by `function(path, leaf)`; paths are like 'block/mlp/up/kernel'."""

  def call(path, leaf):
    return function(jax.tree_util.keystr(path, simple=True, separator='/'), leaf)

  return jax.tree_util.tree_map_with_path(call, params, is_leaf=is_kernel)


def joined(tree: Any) -> Any:
  """Nested dicts as checkpoints have them, where {'values': ..., 'scales': ...} becomes `Quantised`."""
  if not isinstance(tree, dict):
    return tree
  if tree.keys() == set(LEAVES):
    return Quantised(**tree)
  return {name: joined(part) for name, part in tree.items()}


# ---- integers of 4 bits ----


def pack(values: jax.Array) -> jax.Array:
  """Whole numbers (..., I, O) from -8 to 7, of any dtype, as bytes (..., I / 2, O)."""
  low, high = (values[..., start::2, :].astype(jnp.int32) & 15 for start in range(2))
  return (low | (high << 4)).astype(PACKED)


def unpack(packed: jax.Array) -> jax.Array:
  """The integers (..., I, O) of bytes, int8."""
  *stacked, half, columns = packed.shape
  return jnp.stack(_halves(packed), axis=-2).reshape(*stacked, half * 2, columns)


def _halves(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The lower and the upper integers of bytes, int8 of the same shape."""
  signed = packed.astype(jnp.int8)
  return jnp.right_shift(jnp.left_shift(signed, 4), 4), jnp.right_shift(signed, 4)


def _in_integers(x_NO: jax.Array, kernel: Quantised) -> jax.Array:
  """x @ the transposed kernel with products of integers: x becomes two of 8 bits, the second for what the first leaves.

  So x has 15 bits, and every row is read once, from its beginning to its end.
  """
  x = x_NO.astype(jnp.float32)
  step_N1 = jnp.maximum(jnp.abs(x).max(axis=1, keepdims=True), jnp.finfo(jnp.float32).tiny) / 127
  first = jnp.round(x / step_N1)
  second = jnp.round((x / step_N1 - first) * 254)  # what is left is at most half a step
  both = jnp.concatenate([first, second]).astype(jnp.int8)
  sums = jax.lax.dot_general(both, kernel.values, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
  first, second = jnp.split(sums.astype(jnp.float32), 2)
  return ((first + second / 254) * step_N1 * kernel.scales.T).astype(x_NO.dtype)
