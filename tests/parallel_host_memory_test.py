"""Freed memory stays with the process, and nothing is touched where that would be wrong."""

import os
import resource
import subprocess
import sys

import pytest

from mor_jax.parallel import host_memory

# A temporary of 64 MB at every call, a block larger than the C library keeps by itself.
PROGRAM = """
import resource, sys
from mor_jax.parallel import host_memory
assert host_memory.keep_freed() == (sys.argv[1] == 'True')
import jax, jax.numpy as jnp
step = jax.jit(lambda x: (x @ x.T) @ x)
x = jnp.ones((2**12, 2))
def faults():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  step(x).block_until_ready()
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(faults() for _ in range(8)))  # of steps whose blocks came to lie where earlier ones did
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='settings of the GNU C library')
def test_a_step_asks_the_kernel_for_no_page_again():
  clean = {name: value for name, value in os.environ.items() if not name.startswith(('MALLOC_', 'GLIBC_'))}

  def faults(kept: bool) -> int:
    env = clean | ({} if kept else {'MALLOC_PERTURB_': '0'})
    done = subprocess.run(
      [sys.executable, '-c', PROGRAM, str(kept)], env=env, capture_output=True, text=True, check=True
    )
    return int(done.stdout)

  pages = 64 * 2**20 // resource.getpagesize()
  assert faults(kept=False) > pages
  assert faults(kept=True) < pages / 10


@pytest.mark.parametrize(
  ('variable', 'value'), [('MALLOC_ARENA_MAX', '2'), ('GLIBC_TUNABLES', ''), ('JAX_PLATFORMS', 'cuda,cpu')]
)
def test_what_the_user_chose_is_left_alone(monkeypatch, variable, value):
  monkeypatch.setenv(variable, value)
  assert not host_memory.keep_freed()
