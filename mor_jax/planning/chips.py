"""Peak figures of accelerators, by topology name and device kind.

Sources: the tables of key specifications at https://cloud.google.com/tpu/docs/v5e, /v5p, /v6e and /tpu7x,
read in November 2026; for GPUs (SXM) NVIDIA's data sheets, bfloat16 without sparsity. JAX sees a tpu7x chip
as two devices, so its figures are half of the chip's.
"""

import dataclasses

GIGA, TERA = 1e9, 1e12


@dataclasses.dataclass(frozen=True)
class Chip:
  """Peak figures of one device.

  Attributes:
    kind: prefix of `jax.Device.device_kind`.
    flops: bfloat16 FLOPs per second.
    hbm: bytes of memory available to a program, as stated in the TPU compiler's out-of-memory message.
    hbm_bandwidth: bytes per second between memory and cores.
    interconnect: outgoing bytes per second over all links to other chips of the slice (half of the
      published bidirectional figure).
    network: outgoing bytes per second to other slices, the device's share of its host's network cards.
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
  """The chip of a device kind; None if unknown, such as a CPU."""
  fitting = [chip for chip in (*TPUS.values(), *GPUS.values()) if device_kind.startswith(chip.kind)]
  return max(fitting, key=lambda chip: len(chip.kind), default=None)
