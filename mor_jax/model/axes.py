"""Logical names of the axes of every parameter and activation, and what the model does with them.

Modules name the axes of their parameters where they make them (`nn.with_logical_partitioning`); which mesh
axes a name is split over is decided by the rules that `parallel/rules.py` sets around a traced function.
Without rules, on one device, all of this does nothing.

Activations: 'batch' rows, 'length' tokens of a row, 'width' the residual stream; 'heads', 'kv_heads', 'mlp'
and 'vocab' as in the parameters. Parameters: those four, 'embed' the side of a matrix that meets the residual
stream, 'layers' and 'recursions' the axes they are stacked on, 'rank' of LoRA; others are small.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from jax.sharding import AxisType, PartitionSpec

Names = Sequence[str | None]


class Leaf(nn.Module):
  """One parameter under the module's name, for those who compute with it themselves: {leaf: array}.

  Attributes:
    leaf: name of the parameter.
    shape: its shape; float32.
    names: logical names of its axes.
    init: its initialiser.
  """

  leaf: str
  shape: tuple[int, ...]
  names: Names
  init: Callable[..., jax.Array]

  @nn.compact
  def __call__(self) -> dict[str, jax.Array]:
    init = nn.with_logical_partitioning(self.init, tuple(self.names))
    return {self.leaf: self.param(self.leaf, init, self.shape, jnp.float32)}


def parameter_names(boxed: Any) -> dict[str, Names]:
  """Logical names of the axes of every parameter by its path, 'block/mlp/up/kernel', from Linen's metadata.

  Args:
    boxed: parameters as `init` makes them, arrays or shapes in boxes with their names.
  """
  specs = traverse_util.flatten_dict(nn.get_partition_spec(boxed), sep='/')
  return {path: tuple(spec) for path, spec in specs.items()}


def mesh_axes(names: Names) -> list[tuple[str, ...]]:
  """Mesh axes that the current rules split each axis over; those of an enclosing shard_map are left out.

  Raises:
    ValueError: the rules would split two of the axes over the same mesh axis.
  """
  rules, manual = dict(nn.get_logical_axis_rules()), _manual_axes()
  parts, used = [], set()
  for name in names:
    axes = tuple(axis for axis in rules.get(name, ()) if axis not in manual)
    if used & set(axes):
      raise ValueError(f'the axes {tuple(names)} use the mesh axis {(used & set(axes)).pop()!r} twice')
    used |= set(axes)
    parts.append(axes)
  return parts


def spec(names: Names) -> PartitionSpec:
  """How the current rules split an array with these axes, see `mesh_axes`."""
  return PartitionSpec(*(axes or None for axes in mesh_axes(names)))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """Tells the compiler how an activation is split over devices."""
  return jax.lax.with_sharding_constraint(x, spec(names)) if any(mesh_axes(names)) else x


def gather_parameter(kernel: jax.Array, names: Names, dtype: jnp.dtype | None = None) -> jax.Array:
  """A parameter whole along 'embed', as products with activations need it; its gradient is split again at once.

  Args:
    dtype: in which it travels between devices, if it has to; none: its own.
  """
  if mesh_axes(names) == mesh_axes(_whole(names)):
    return kernel
  return _gather(tuple(names), kernel.astype(dtype or kernel.dtype)).astype(kernel.dtype)


def _whole(names: Names) -> tuple[str | None, ...]:
  return tuple(None if name == 'embed' else name for name in names)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather(names: tuple[str | None, ...], kernel: jax.Array) -> jax.Array:
  return constrain(kernel, *_whole(names))


_gather.defvjp(
  lambda names, kernel: (_gather(names, kernel), None),
  lambda names, _, gradient: (constrain(gradient, *names),),
)


def rowwise(function: Callable[..., Any]) -> Callable[..., Any]:
  """The function, run on each device for the rows that lie there.

  For what treats every row of a batch by itself: sorting, gathering and scattering of tokens, which the
  compiler would not recognise as local. Arguments and results are (trees of) arrays with the axis 'batch' first.
  """
  return per_shard(function, ('batch',), ('batch',))


def per_shard(
  function: Callable[..., Any], inputs: Any, outputs: Any, is_kernel: bool = False
) -> Callable[..., Any]:
  """The function, run on each device for its part of the arrays.

  Args:
    inputs: names of the leading axes of the arguments: one tuple for all, or a list with one for each.
    outputs: the same for the results.
    is_kernel: nothing in the function is for the compiler to split, along no mesh axis.
  """

  @functools.wraps(function)
  def wrapped(*arrays):
    every = inputs if isinstance(inputs, list) else [inputs]
    manual = {axis for names in every for over in mesh_axes(names) for axis in over}
    if is_kernel:
      mesh = jax.sharding.get_abstract_mesh()
      manual = set(mesh.axis_names) - _manual_axes() if mesh.size > 1 else manual
    if not manual:
      return function(*arrays)
    specs = [
      tuple(map(spec, names)) if isinstance(names, list) else spec(names) for names in (inputs, outputs)
    ]
    run = jax.shard_map(function, in_specs=specs[0], out_specs=specs[1], axis_names=manual, check_vma=False)
    return run(*arrays)

  return wrapped


def platform() -> str | None:
  """'cpu', 'gpu' or 'tpu': what a function is traced for, if its mesh is set or there is one device; else None."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  if device is None and jax.device_count() > 1:
    return 'cpu' if jax.default_backend() == 'cpu' else None
  name = jax.default_backend() if device is None else device.platform
  return 'gpu' if name in ('cuda', 'rocm') else name


def _manual_axes() -> set[str]:
  mesh = jax.sharding.get_abstract_mesh()
  kinds = zip(mesh.axis_names, mesh.axis_types, strict=True) if mesh.axis_names else ()
  return {name for name, kind in kinds if kind == AxisType.Manual}
