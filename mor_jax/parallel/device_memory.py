"""How much memory there is for a program on the devices of this process, and what arrays take of it."""

import contextlib
import math
from pathlib import Path
from typing import Any

import jax

_MEMINFO = Path('/proc/meminfo')
_CGROUP = Path('/sys/fs/cgroup')


def free(devices: list[jax.Device]) -> float | None:
  """Bytes that are free on each of the devices, the least of them; None where nobody says.

  CPU devices share what the machine, or the container that this process is in, has left.
  """
  own = [device for device in devices if device.process_index == jax.process_index()]
  if not own:
    return None
  if own[0].platform == 'cpu':
    host = host_free()
    return None if host is None else host / len(own)
  found = [device.memory_stats() for device in own]
  left = [
    stats['bytes_limit'] - stats.get('bytes_in_use', 0) for stats in found if stats and 'bytes_limit' in stats
  ]
  return min(left, default=None)


def host_free() -> float | None:
  """Bytes that this machine or container has left; None where the system does not say."""
  found = []
  with contextlib.suppress(OSError, ValueError, KeyError):
    fields = dict(line.split(':', 1) for line in _MEMINFO.read_text().splitlines())
    found.append(float(fields['MemAvailable'].split()[0]) * 1024)
  with contextlib.suppress(OSError, ValueError):  # 'max' where there is no limit
    limit = float((_CGROUP / 'memory.max').read_text())
    found.append(limit - float((_CGROUP / 'memory.current').read_text()) + _reclaimable())
  return min(found, default=None)


def bytes_on_a_device(tree: Any) -> int:
  """Bytes of arrays, or of their shapes, on one device; what has no sharding lies on it whole."""
  return sum(
    leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape)
    for leaf in jax.tree.leaves(tree)
  )


def _reclaimable() -> float:
  """Bytes of files that the kernel keeps in memory and gives up when it must."""
  fields = dict(line.split() for line in (_CGROUP / 'memory.stat').read_text().splitlines())
  return float(fields.get('inactive_file', 0)) + float(fields.get('active_file', 0))
