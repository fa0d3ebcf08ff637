"""The device mesh and the sharding of batches; `rules.py` shards the parameters.

Axes: `replica` holds copies of the parameters, `fsdp` shards them, `tensor` shards single
matrices. Batch rows are split over replica and fsdp; a row never leaves its device.
The part of an axis that spans slices (`dcn_*`) is the outer one.
"""

import collections
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mor_jax.config import ConfigError, ModelConfig, ParallelConfig, TrainConfig
from mor_jax.model import attention, axes

AXES = ('replica', 'fsdp', 'tensor')
BATCH_AXES = ('replica', 'fsdp')
SPLIT_SIZES = {'tensor': ('num_heads', 'num_kv_heads', 'mlp_dim', 'vocab_size'), 'fsdp': ('d_model',)}


def make_mesh(parallel: ParallelConfig | None = None, devices: list[jax.Device] | None = None) -> Mesh:
  """Returns the mesh of the given devices, by default all devices of all processes.

  Args:
    parallel: sizes of the axes; None: every device is a replica.

  Raises:
    ConfigError: the product of the sizes is not the number of devices or of slices.
  """
  parallel = parallel or ParallelConfig()
  devices = jax.devices() if devices is None else devices
  slices = len({getattr(device, 'slice_index', 0) for device in devices})
  outer = _fill({'dcn_replica': parallel.dcn_replica, 'dcn_fsdp': parallel.dcn_fsdp}, slices, 'slices')
  sizes = {'replica': parallel.replica, 'fsdp': parallel.fsdp, 'tensor': parallel.tensor}
  inner = _fill(sizes, len(devices) // slices, 'devices' if slices == 1 else 'devices of a slice')
  split = {
    'allow_split_physical_axes': True
  }  # fsdp=16 on 8 x 8 x 8 chips takes one of their axes and a part of another
  if slices == 1:
    grid = mesh_utils.create_device_mesh(inner, devices, **split)
  else:
    grid = mesh_utils.create_hybrid_device_mesh(inner, [*outer, 1], devices, **split)
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def _fill(sizes: dict[str, int], count: int, what: str) -> list[int]:
  """The sizes, with -1 replaced so that their product is `count`."""
  fixed = int(np.prod([size for size in sizes.values() if size != -1]))
  filled = [count // fixed if size == -1 else size for size in sizes.values()]
  if int(np.prod(filled)) != count:
    given = ', '.join(f'parallel.{name}={size}' for name, size in sizes.items())
    raise ConfigError(f'{given} cannot be laid out on {count} {what}; set sizes whose product is {count}')
  return filled


def replicated(mesh: Mesh) -> NamedSharding:
  """The same value on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Splits rows over the devices: for arrays (B, T)."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def micro_batch_sharding(mesh: Mesh) -> NamedSharding:
  """Splits the rows of every micro-batch over the devices: for arrays (micro-batches, B, T)."""
  return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))


def row_shards(mesh: Mesh) -> int:
  """Number of shards of a batch's rows."""
  return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def data_hosts(mesh: Mesh) -> tuple[int, int]:
  """(index, count) of this process among the groups of processes that read different batch rows.

  Processes that differ only in their tensor shards read the same rows.

  Raises:
    ConfigError: the rows of two processes would overlap only in part.
  """
  slices = batch_sharding(mesh).devices_indices_map((row_shards(mesh),))
  rows_of = collections.defaultdict(set)
  for device, (rows,) in slices.items():
    rows_of[device.process_index].add(rows.start or 0)
  hosts = sorted({tuple(sorted(rows)) for rows in rows_of.values()})
  if len({len(rows) for rows in hosts}) > 1 or sum(map(len, hosts)) != row_shards(mesh):
    raise ConfigError(
      f'parallel.tensor={mesh.shape["tensor"]} does not fit the devices of one process: the processes would '
      f'share some of their rows; use a divisor or a multiple of the devices that each has'
    )
  return hosts.index(tuple(sorted(rows_of[jax.process_index()]))), len(hosts)


def make_checked_mesh(parallel: ParallelConfig, model: ModelConfig, train: TrainConfig) -> Mesh:
  """`make_mesh` for a training. Raises ConfigError if its batches or its model cannot be split over it."""
  mesh = make_mesh(parallel)
  check_batch(mesh, train)
  check_model(mesh, model)
  return mesh


def check_batch(mesh: Mesh, train: TrainConfig) -> None:
  """Raises ConfigError unless every micro-batch splits evenly over the devices."""
  rows, shards = train.global_batch // train.accumulation, row_shards(mesh)
  if rows % shards:
    needed = shards * train.accumulation
    below, above = train.global_batch // needed * needed, -(-train.global_batch // needed) * needed
    allowed = f'{below} or {above}' if below else f'{above}'
    raise ConfigError(
      f'train.global_batch={train.global_batch} in train.accumulation={train.accumulation} micro-batches '
      f'gives {rows} rows, which do not divide among {shards} devices; set train.global_batch to {allowed}'
    )


def check_model(mesh: Mesh, model: ModelConfig) -> None:
  """Raises ConfigError unless the model's sizes divide over the mesh and its devices support remat and attention."""
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    platform = axes.platform()
  if model.remat == 'offload' and platform == 'cpu':
    raise ConfigError(
      "model.remat='offload' moves layer inputs from the device's memory to the host's, which on a CPU are the "
      "same; use model.remat='full'"
    )
  reason = attention.unfit(model.attention, platform, model.dtype, model.head_width)
  if reason:
    raise ConfigError(f'model.attention={model.attention} {reason}')
  check_split(mesh, model, tuple(SPLIT_SIZES))


def check_split(mesh: Mesh, model: ModelConfig, over: tuple[str, ...]) -> None:
  """Raises ConfigError unless every size split over the mesh axes `over` divides evenly."""
  for axis in over:
    parts = mesh.shape[axis]
    for name in SPLIT_SIZES[axis]:
      size = getattr(model, name)
      if size is not None and size % parts:
        raise ConfigError(
          f'model.{name}={size} cannot be split into parallel.{axis}={parts} equal parts; '
          f'use a divisor of {size}, or set model.{name}={-(-size // parts) * parts}'
        )


def put(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
  """Copies this process's part of a batch to its devices asynchronously."""
  with jax.transfer_guard_host_to_device('allow'):  # with several processes it does not count as explicit
    return {
      name: jax.make_array_from_process_local_data(sharding, np.asarray(rows)) for name, rows in batch.items()
    }
