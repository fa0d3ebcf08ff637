"""How fast a program can be at best: its work against what the device can do at most."""

import dataclasses

import numpy as np

from mor_jax.planning.chips import Chip
from mor_jax.planning.collectives import Collective


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Least seconds that each part of a device needs for one run of a program.

  Attributes:
    compute: matrix units.
    memory: main memory.
    interconnect: links within a slice.
    network: between slices.
  """

  compute: float
  memory: float
  interconnect: float
  network: float

  @property
  def seconds(self) -> float:
    """Of a run in which all parts work at the same time: the slowest part. No run is faster."""
    return max(dataclasses.astuple(self))

  @property
  def bound(self) -> str:
    """The slowest part."""
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
    flops: executed by the device.
    traffic: bytes between its memory and its cores.
    collectives: of the program.
    slice_of: the slice that each partition of the program lies in.
  """
  wire = np.zeros(2)
  for one in collectives:
    wire += one.times * np.array(_wire_bytes(one, slice_of))
  return Roofline(
    flops / chip.flops, traffic / chip.hbm_bandwidth, wire[0] / chip.interconnect, wire[1] / chip.network
  )


def _wire_bytes(one: Collective, slice_of: np.ndarray) -> tuple[float, float]:
  """Bytes that a device sends within its slice and to other slices.

  Rings: an all-gather passes on every part but its own, a reduce-scatter likewise, an all-reduce is
  both. Over slices the parts are reduced within each slice first, and only a share of each crosses.
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
