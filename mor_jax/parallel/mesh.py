"""The device mesh and how batches and parameters are laid out on it.

Axes: `replica` copies of the parameters, `fsdp` shards of them, `tensor` shards of single
matrices. Rows of a batch are split over replica and fsdp; a row never leaves its device.
At present all devices are on `replica`, that is pure data parallelism.
"""

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mor_jax.config import ConfigError, TrainConfig

AXES = ('replica', 'fsdp', 'tensor')
BATCH_AXES = ('replica', 'fsdp')


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
  """All devices (of all processes), or those given, on the replica axis."""
  devices = jax.devices() if devices is None else devices
  return jax.make_mesh((len(devices), 1, 1), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
  """The same value on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows split over the devices: arrays (B, T)."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def micro_batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows of every micro-batch split over the devices: arrays (micro-batches, B, T)."""
  return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))


def row_shards(mesh: Mesh) -> int:
  """Parts that the rows of a batch are split into."""
  return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


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


def put(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
  """Moves this process's part of a batch to its devices, without waiting for the copy."""
  with jax.transfer_guard_host_to_device('allow'):  # with several processes it does not count as explicit
    return {
      name: jax.make_array_from_process_local_data(sharding, np.asarray(rows)) for name, rows in batch.items()
    }
