"""The train step compiled for TPUs that are not there (marker aot; needs requirements-aot.txt).

The compiler optimises little here, which takes a quarter of the time and
changes temporaries by up to 15%. The programs are compiled side by side, each once, by the real command.
"""

import functools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from mor_jax.planning.chips import TPUS

pytestmark = pytest.mark.aot

R2 = '--config.model.num_recursions=2'
ONE_CHIP = ['--topology=v5p:1x1x1', '--config.train.global_batch=8', '--config.train.accumulation=1']
SHARDED = ['--config.parallel.fsdp=16', '--config.train.accumulation=1']
PROGRAMS = {
  '360m on v5e': ['--config=configs/360m.py', '--topology=v5e:4x4'],
  '1p7b on v5p': ['--config=configs/1p7b.py', '--topology=v5p:4x4x4'],
  'vanilla': ['--config=configs/360m.py:vanilla', *ONE_CHIP],
  'mor': ['--config=configs/360m.py', R2, *ONE_CHIP],
  '64 chips': [
    '--config=configs/360m.py',
    R2,
    '--topology=v5p:4x4x4',
    *SHARDED,
    '--config.train.global_batch=128',
  ],
  '512 chips': [
    '--config=configs/360m.py',
    R2,
    '--topology=v5p:8x8x8',
    *SHARDED,
    '--config.train.global_batch=1024',
  ],
}
# Its rows of 256 tokens take far more than the 16 GB of the chip when nothing is computed again.
TOO_LARGE = [
  '--config=configs/tiny.py',
  '--topology=v5e:1x1',
  '--config.train.global_batch=1024',
  '--config.model.dtype=bfloat16',
]


def run(*arguments):
  # What conftest.py sets is for programs that run on this machine.
  environment = {
    name: value for name, value in os.environ.items() if name not in ('JAX_PLATFORMS', 'XLA_FLAGS')
  }
  command = [sys.executable, '-m', 'mor_jax.compile', '--json', '--fast', *arguments]
  return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)


@pytest.fixture(scope='module')
def pool():
  with ThreadPoolExecutor(max_workers=2) as workers:
    yield workers


@pytest.fixture(scope='module')
def compiled(pool):
  """name -> (exit code, figures); all are started at the first question."""
  futures = {name: pool.submit(run, *arguments) for name, arguments in PROGRAMS.items()}

  @functools.cache
  def get(name):
    ended = futures[name].result()
    assert ended.stdout, ended.stderr
    return ended.returncode, json.loads(ended.stdout)

  return get


@pytest.mark.parametrize(
  ('name', 'chip', 'devices'), [('360m on v5e', 'v5e', 16), ('1p7b on v5p', 'v5p', 64)]
)
def test_the_papers_models_fit(compiled, name, chip, devices):
  code, figures = compiled(name)
  assert code == 0
  assert figures['fits']
  assert figures['devices'] == devices
  assert figures['argument_bytes'] + figures['temp_bytes'] <= figures['peak_bytes'] < TPUS[chip].hbm
  assert figures['collective_bytes'] >= figures['parameter_bytes']  # gradients meet at least once
  # No step is faster than its work on the matrix units, nor has more tokens.
  assert figures['step_seconds'] >= figures['flops'] / TPUS[chip].flops
  assert 0.05 < figures['mfu'] <= 1


def test_mor_needs_three_quarters_of_the_memory(compiled):
  """The paper's 25%, with the settings of the configs, 8 x 2048 tokens on a device."""
  vanilla, mor = (compiled(name)[1] for name in ('vanilla', 'mor'))
  print(
    f'peak {mor["peak_bytes"] / vanilla["peak_bytes"]:.3f}, temporaries {mor["temp_bytes"] / vanilla["temp_bytes"]:.3f}'
  )
  assert vanilla['remat'] == mor['remat']
  assert vanilla['rows'] == mor['rows'] == 8
  assert mor['peak_bytes'] <= 0.75 * vanilla['peak_bytes']


def test_mor_executes_the_flops_that_the_formula_says(compiled):
  vanilla, mor = (compiled(name)[1] for name in ('vanilla', 'mor'))
  assert mor['flops'] / vanilla['flops'] == pytest.approx(
    mor['model_flops'] / vanilla['model_flops'], rel=0.05
  )


def test_communication_does_not_grow_with_the_slice(compiled):
  """64 to 512 chips, fsdp x replica, two rows a device."""
  few, many = (compiled(name)[1] for name in ('64 chips', '512 chips'))
  print(few['collective_bytes_by_kind'], many['collective_bytes_by_kind'])
  assert (few['rows'], many['rows']) == (2, 2)
  assert many['collective_bytes'] <= 1.01 * few['collective_bytes']
  assert many['peak_bytes'] <= 1.01 * few['peak_bytes']


def test_what_does_not_fit_is_refused_with_remedies_that_were_tried(pool):
  ended = pool.submit(run, *TOO_LARGE).result()
  assert ended.returncode == 1, ended.stderr
  figures = json.loads(ended.stdout)
  assert not figures['fits']
  assert figures['peak_bytes'] > TPUS['v5e'].hbm
  fitting = [attempt['flags'] for attempt in figures['tried'] if attempt['fits']]
  assert any(flags.startswith('--config.train.accumulation=') for flags in fitting)
  assert all(attempt['peak_bytes'] > 0 for attempt in figures['tried'])
  assert 'DOES NOT FIT' in ended.stderr


def test_slices_that_do_not_exist_are_refused():
  ended = run('--config=configs/tiny.py', '--topology=v5p:3x5x7')
  assert ended.returncode == 2
  assert 'the TPU compiler knows no such slice' in ended.stderr
