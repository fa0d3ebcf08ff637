"""The engine over a mesh: every part of its batch axes has slots of its own, and runs its own ticks.

Nothing of a sequence leaves the devices that hold its slot: what runs on a part is the program of one device, in
shard_map over `replica` and `fsdp`, with as many ticks as its own sequences need. Along `tensor` the compiler splits
heads, key/value heads of caches, MLP and vocabulary by the table of `parallel/rules.py`. Parameters are gathered
once, when the engine is made: a tick reads all of them, so that parts along fsdp would have to travel every time.
"""

import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mor_jax.config import ConfigError
from mor_jax.model import axes, cache, kernels
from mor_jax.parallel import mesh as mesh_lib
from mor_jax.parallel import rules

WHOLE = ('embed', 'rank')  # logical axes that are split in training, not here
_FIELDS = {'embed': 'embed/embedding', 'head': 'head/kernel', 'own': 'steps'}  # of decode.DecodeParams


def count(mesh: Mesh | None) -> int:
  """Parts that have slots of their own; 1 without a mesh."""
  return 1 if mesh is None else mesh_lib.row_shards(mesh)


def share(mesh: Mesh | None, name: str, size: int) -> int:
  """Part of `size` slots or lanes that each shard gets. Raises ConfigError if they do not divide."""
  parts = count(mesh)
  if size % parts:
    below, above = size // parts * parts, -(-size // parts) * parts
    allowed = f'{below} or {above}' if below else f'{above}'
    raise ConfigError(
      f'{name}={size} cannot be divided among the {parts} parts of parallel.replica={mesh.shape["replica"]} x '
      f'parallel.fsdp={mesh.shape["fsdp"]}, each of which has {name} of its own; use {allowed}'
    )
  return size // parts


def run(mesh: Mesh | None, function: Callable[..., tuple], whole: Any, *split: Any) -> tuple[Any, Any]:
  """`function(whole, *split)` on every part of the mesh, to be called under jit.

  Args:
    function: gives the first of `split` updated, and a tree of arrays, each with an axis for the parts first.
    whole: what every part reads.
    split: trees of arrays with slots or lanes, or one entry for each part, along the axis that `_names` tells.
  """
  if mesh is None:
    return function(whole, *split)
  manual = mesh_lib.BATCH_AXES if mesh.shape['tensor'] > 1 else mesh_lib.AXES
  batch = PartitionSpec(mesh_lib.BATCH_AXES)

  def specs(tree):
    return jax.tree_util.tree_map_with_path(lambda path, _: _over_batch(_names(path)), tree)

  inputs = (PartitionSpec(), *map(specs, split))
  options = {'axis_names': set(manual), 'check_vma': False}
  local = jax.shard_map(function, in_specs=inputs, out_specs=(inputs[1], batch), **options)
  first, more = rules.on_mesh(mesh, local)(whole, *split)
  return jax.lax.with_sharding_constraint(first, shardings(mesh, first)), more


def shardings(mesh: Mesh, tree: Any) -> Any:
  """Where slots, caches and whatever else has the slots' axis lie between calls."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: NamedSharding(mesh, _spec(mesh, _names(path))), tree
  )


def placed(mesh: Mesh | None, shapes: Any) -> Any:
  """Shapes of a state, each with where it lies between calls."""
  if mesh is None:
    return shapes
  return jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
    shapes,
    shardings(mesh, shapes),
  )


def make(mesh: Mesh | None, function: Callable[..., Any], *arguments: Hashable) -> Any:
  """What the function makes of constants, each part on its devices from the beginning; compiled once for equal ones."""
  return _made(mesh, function, arguments)


def device_of(variables: Any) -> jax.Device | None:
  """The only device that variables lie on; None: they lie on several, or on none."""
  devices = {
    device for leaf in jax.tree.leaves(variables) if isinstance(leaf, jax.Array) for device in leaf.devices()
  }
  return devices.pop() if len(devices) == 1 else None


def bound(tree: Any, device: jax.Device | None) -> Any:
  """The tree bound to a device, as is all that is computed from variables there; None: as it is.

  A program is compiled once for what is bound to a device, once for what is not, and once for a mesh of one device.
  """
  return tree if device is None else jax.device_put(tree, device)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _made(mesh, function, arguments):
  made = function(*arguments)
  return made if mesh is None else jax.lax.with_sharding_constraint(made, shardings(mesh, made))


def prepare(
  mesh: Mesh | None, names: Mapping[str, axes.Names], function: Callable[[Any], Any], variables: Any
) -> Any:
  """`decode.prepare` onto the devices of the mesh: heads, MLP and vocabulary split over `tensor`.

  Args:
    names: logical names of the axes of every parameter, by path (`transformer.parameter_axes`).
  """
  if mesh is None:
    return function(bound(variables, device_of(variables)))

  def place(path, leaf):
    field, *rest = (getattr(entry, 'name', getattr(entry, 'key', None)) for entry in path)
    is_part = bool(rest) and rest[-1] in kernels.LEAVES
    rest = rest[:-1] if is_part else rest
    parameter = '/'.join((_FIELDS.get(field, field), *(name for name in rest if name is not None)))
    whole = names.get(parameter, ())
    of_leaf = whole[len(whole) - leaf.ndim :]  # a layer that was cut out of its stack has no axis of layers
    split = _split(mesh, of_leaf)
    # The scales of a quantised kernel are fewer than its values along one axis.
    return NamedSharding(mesh, PartitionSpec(*(rules.even(mesh, leaf.shape, split) if is_part else split)))

  placed = jax.tree_util.tree_map_with_path(place, jax.eval_shape(function, variables))
  return jax.jit(function, out_shardings=placed)(variables)


def _names(path: tuple) -> axes.Names:
  """Logical names of the first axes of a leaf of the state or of a prefix."""
  is_pool = path and getattr(path[-1], 'name', None) in cache.POOL_LEAVES
  return cache.POOL_AXES if is_pool else ('batch',)


def _over_batch(names: axes.Names) -> PartitionSpec:
  return PartitionSpec(*(mesh_lib.BATCH_AXES if name == 'batch' else None for name in names))


def _spec(mesh: Mesh, names: axes.Names) -> PartitionSpec:
  return PartitionSpec(*_split(mesh, names))


def _split(mesh: Mesh, names: axes.Names) -> list[tuple[str, ...] | None]:
  table = {name: over for name, over in rules.RULES.items() if name not in WHOLE}
  parts = [tuple(axis for axis in table.get(name, ()) if mesh.shape[axis] > 1) for name in names]
  return [over or None for over in parts]
