"""Keeps freed memory in the process on CPU, instead of returning it to the kernel after every step.

XLA allocates the temporaries of a step at its start and frees them at its end. The C library returns blocks
of that size to the kernel immediately, and the kernel zeroes every page again on its next use. On two cores
this takes a quarter of the time of a small training step.
"""

import ctypes
import glob
import os
import platform

# mallopt(3): parameters of the GNU C library's allocator.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_NEVER = -1  # nothing is returned from the end of the heap; a limit would be an int, 2 GB at most

_ACCELERATORS = ('/dev/nvidia[0-9]*', '/dev/kfd', '/dev/accel*', '/dev/vfio/[0-9]*')


def keep_freed() -> bool:
  """Makes the allocator keep freed memory when JAX runs on the CPU. Call before JAX initialises its devices.

  Does nothing if there is an accelerator, if the C library is not glibc, or if the user has tuned the
  allocator through MALLOC_* or GLIBC_TUNABLES.

  Returns:
    Whether the allocator accepted the settings.
  """
  tuned = any(name == 'GLIBC_TUNABLES' or name.startswith('MALLOC_') for name in os.environ)
  if tuned or platform.libc_ver()[0] != 'glibc' or not _on_cpu():
    return False
  mallopt = ctypes.CDLL(None).mallopt
  # One arena, since only the first one can hold blocks of more than 64 MB without asking the kernel for each.
  settings = {_ARENA_MAX: 1, _MMAP_MAX: 0, _TRIM_THRESHOLD: _NEVER}
  return all(mallopt(parameter, value) for parameter, value in settings.items())


def _on_cpu() -> bool:
  wanted = os.environ.get('JAX_PLATFORMS')
  return wanted == 'cpu' if wanted else not any(glob.glob(pattern) for pattern in _ACCELERATORS)
