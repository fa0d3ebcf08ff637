"""What accelerators can do at most, by the names that topologies and devices go by.

Sources: https://cloud.google.com/tpu/docs/v5e, /v5p, /v6e and /tpu7x, their tables of key specifications,
read in November 2026; for GPUs (SXM) NVIDIA's data sheets, bfloat16 without sparsity. A chip of tpu7x is
two devices to JAX, so its figures are halves of the chip's.
"""

import dataclasses

GIGA, TERA = 1e9, 1e12


@dataclasses.dataclass(frozen=True)
class Chip:
  """Peak figures of one device.

  Attributes:
    kind: how `jax.Device.device_kind` begins.
    flops: bfloat16 FLOPs per second.
    hbm: bytes of memory that a program may use, as the TPU compiler states it when one does not fit.
    hbm_bandwidth: bytes per second between it and the cores.
    interconnect: bytes per second that leave over all links to other chips of the slice (half of the
      bidirectional figure that is published).
    network: bytes per second that leave for other slices, the device's share of its host's network cards.
  """

  kind: str
  flops: float
  hbm: float
  hbm_bandwidth: float
  interconnect: float
  network: float


TPUS = {
  'v5e': Chip('TPU v5 lite', 197 * TERA, 15.75 * 2**30, 819 * GIGA, 200 * GIGA, 3.125 * GIGA),
  'v5p': Chip('TPU v5', 459 * TERA, 95.74 * 2**30, 2765 * GIGA, 600 * GIGA, 6.25 * GIGA),
  'v6e': Chip('TPU v6 lite', 918 * TERA, 31.25 * 2**30, 1638 * GIGA, 400 * GIGA, 12.5 * GIGA),
  'tpu7x': Chip('TPU7x', 1153.5 * TERA, 94.75 * 2**30, 3690 * GIGA, 300 * GIGA, 6.25 * GIGA),
}
GPUS = {
  'h100': Chip('NVIDIA H100 80GB HBM3', 989 * TERA, 79.6 * 2**30, 3350 * GIGA, 450 * GIGA, 50 * GIGA),
  'h200': Chip('NVIDIA H200', 989 * TERA, 140.4 * 2**30, 4800 * GIGA, 450 * GIGA, 50 * GIGA),
}


def of_kind(device_kind: str) -> Chip | None:
  """The chip of a device; None if nothing is known about it, as about a CPU."""
  fitting = [chip for chip in (*TPUS.values(), *GPUS.values()) if device_kind.startswith(chip.kind)]
  return max(fitting, key=lambda chip: len(chip.kind), default=None)
