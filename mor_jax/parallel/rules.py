"""Sharding rules: the mesh axes over which each logical axis (`model/axes.py`) is split."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mor_jax.config import ConfigError
from mor_jax.model import axes, kernels
from mor_jax.parallel.mesh import BATCH_AXES

RULES = {
  'batch': BATCH_AXES,
  'embed': ('fsdp',),
  'rank': ('fsdp',),
  'vocab': ('tensor',),
  'heads': ('tensor',),
  'kv_heads': ('tensor',),
  'mlp': ('tensor',),
}
# Norm scales, routers and the like are left whole on purpose: together they are far below this.
LARGEST_WHOLE_SHARE = 0.02


def on_mesh(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
  """Wraps a function so that it is traced under the rules for this mesh; pass the result to jax.jit."""
  rules = _rules_of(mesh)

  @functools.wraps(function)
  def traced(*arguments):
    with nn.logical_axis_rules(rules), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return function(*arguments)

  return traced


def shardings(mesh: Mesh, tree: Any, names: Mapping[str, axes.Names]) -> Any:
  """NamedSharding of every leaf of parameters, or of a tree with copies of them such as an optimiser's state.

  A leaf belongs to the parameter that the dictionary keys at the end of its path name. Leaves without a parameter
  (scalars, the routers' state, metrics) are whole on every device, and so are parameters along axes that the mesh
  does not divide.

  Args:
    tree: arrays or their shapes.
    names: logical names of the axes of every parameter, by path (`transformer.parameter_axes`).
  """
  with nn.logical_axis_rules(_rules_of(mesh)):
    return jax.tree_util.tree_map_with_path(lambda path, leaf: _sharding(mesh, names, path, leaf), tree)


def laid_out(mesh: Mesh, tree: Any, names: Mapping[str, axes.Names]) -> Any:
  """Constrains the results of a traced function to the layout of `shardings`."""
  return jax.lax.with_sharding_constraint(tree, shardings(mesh, tree, names))


def _rules_of(mesh: Mesh) -> list[tuple[str, tuple[str, ...]]]:
  """RULES, restricted to the mesh axes with more than one device."""
  split = {name: tuple(axis for axis in over if mesh.shape[axis] > 1) for name, over in RULES.items()}
  return [(name, over) for name, over in split.items() if over]


def _sharding(mesh: Mesh, names: Mapping[str, axes.Names], path: tuple, leaf: Any) -> NamedSharding:
  of_leaf = names.get(_parameter_path(path), ())
  if len(of_leaf) != leaf.ndim:  # no parameter, or what an optimiser that keeps nothing has in its place
    return NamedSharding(mesh, PartitionSpec())
  return NamedSharding(mesh, PartitionSpec(*even(mesh, leaf.shape, axes.mesh_axes(of_leaf))))


def even(mesh: Mesh, shape: Sequence[int], parts: Sequence[tuple[str, ...]]) -> list[tuple[str, ...] | None]:
  """The mesh axes that each axis of an array is split over; None where they do not divide it."""
  return [
    over if over and size % math.prod(mesh.shape[axis] for axis in over) == 0 else None
    for size, over in zip(shape, parts, strict=True)
  ]


def _parameter_path(path: tuple) -> str:
  """The dictionary keys at the end of a path, which name a parameter: 'block/mlp/up/kernel'."""
  if path and (getattr(path[-1], 'name', None) or getattr(path[-1], 'key', None)) in kernels.LEAVES:
    path = path[:-1]
  names = [entry.key if isinstance(entry, jax.tree_util.DictKey) else None for entry in path]
  last = len(names) - names[::-1].index(None) if None in names else 0
  return '/'.join(name for name in names[last:] if name != 'params')


def check_split(mesh: Mesh, params: Any, names: Mapping[str, axes.Names]) -> None:
  """Raises ConfigError if fsdp leaves more than LARGEST_WHOLE_SHARE of the parameters' bytes whole on every device.

  Args:
    params: parameters or their shapes.
    names: as in `shardings`.
  """
  parts = mesh.shape['fsdp']
  if parts == 1:
    return
  whole, total = {}, 0
  for (path, leaf), sharding in zip(
    jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings(mesh, params, names)), strict=True
  ):
    size = leaf.size * leaf.dtype.itemsize
    total += size
    if not any('fsdp' in (over or ()) for over in sharding.spec):
      whole[_parameter_path(path)] = size
  share = sum(whole.values()) / total
  if share > LARGEST_WHOLE_SHARE:
    largest = max(whole, key=whole.get)
    raise ConfigError(
      f'parallel.fsdp={parts} would leave {share:.0%} of the parameters whole on every device, most of them '
      f'{largest}, which it does not divide; choose a parallel.fsdp that divides its sizes (model.d_model, '
      f'model.lora_rank)'
    )
