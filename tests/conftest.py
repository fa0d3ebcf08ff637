"""Settings of every test run: CPU, no network, no TensorFlow, compiled programs kept between runs."""

import os
import sys
from collections.abc import Iterator
from importlib import metadata

import pytest

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['HF_HUB_OFFLINE'] = os.environ['HF_DATASETS_OFFLINE'] = os.environ['TRANSFORMERS_OFFLINE'] = '1'


def pytest_configure(config: pytest.Config) -> None:
  cache = config.cache.mkdir('jax')  # .pytest_cache/d/jax; environment variables reach subprocesses too
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(cache))
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.3')


@pytest.fixture(scope='session', autouse=True)
def without_tensorflow() -> Iterator[None]:
  """mor_jax must work without TensorFlow. (Entries in sys.modules that forbid it would confuse TFDS.)"""
  yield
  assert 'tensorflow' not in sys.modules, 'a test imported TensorFlow'


def pytest_report_header() -> str:
  return ', '.join(
    f'{name} {metadata.version(name)}' for name in ('jax', 'flax', 'orbax-checkpoint', 'numpy')
  )
