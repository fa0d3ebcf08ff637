"""Roofline model: a lower bound on a program's run time, from its work and the device's peak figures."""

import dataclasses

import numpy as np

from mor_jax.planning.chips import Chip
from mor_jax.planning.collectives import Collective


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Minimum seconds that each resource of a device needs for one run of a program.

  Attributes:
    compute: the matrix units.
    memory: main memory.
    interconnect: links within a slice.
    network: links between slices.
  """

  compute: float
  memory: float
  interconnect: float
  network: float

  @property
  def seconds(self) -> float:
    """Seconds of a run with perfect overlap: those of the slowest resource. No run is faster."""
    return max(dataclasses.astuple(self))

  @property
  def bound(self) -> str:
    """Name of the slowest resource."""
    return max(dataclasses.asdict(self).items(), key=lambda part: part[1])[0]

  @property
  def one_after_the_other(self) -> float:
    """Seconds of a run in which no part works while another does."""
    return sum(dataclasses.astuple(self))


def estimate(
  chip: Chip, flops: float, traffic: int, collectives: list[Collective], slice_of: np.ndarray
) -> Roofline:
  """The roofline of a program on one device.

  Args:
    flops: FLOPs executed by the device.
    traffic: bytes moved between its memory and its cores.
    collectives: the collectives of the program.
    slice_of: slice index of each partition of the program.
  """
  wire = np.zeros(2)
  for one in collectives:
    wire += one.times * np.array(_wire_bytes(one, slice_of))
  return Roofline(
    flops / chip.flops, traffic / chip.hbm_bandwidth, wire[0] / chip.interconnect, wire[1] / chip.network
  )


def _wire_bytes(one: Collective, slice_of: np.ndarray) -> tuple[float, float]:
  """Bytes that a device sends (within its slice, to other slices).

  Assumes ring algorithms: an all-gather or a reduce-scatter sends every shard but one, and an all-reduce
  is both in sequence. Across slices the shards are first reduced within each slice, so a device sends
  only its share to other slices.
  """
  members = np.arange(len(slice_of)) if one.groups is None else one.groups[0]
  slices = len(np.unique(slice_of[members]))
  near = len(members) // slices
  if one.kind == 'collective-permute':
    return (0.0, one.bytes) if slices > 1 else (one.bytes, 0.0)
  passes = 2 if one.kind == 'all-reduce' else 1
  whole = one.bytes * len(members) if one.kind == 'reduce-scatter' else one.bytes
  return (
    passes * whole * (near - 1) / near,
    passes * whole / near * (slices - 1) / slices,
  )
