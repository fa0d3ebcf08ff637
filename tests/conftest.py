"""Settings of every test run: CPU, no network, no TensorFlow, compiled programs kept between runs."""

import dataclasses
import gc
import os
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

# Tests compile many programs and run each a few times: compiling without optimisation takes half as long.
FAST_COMPILATION = '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'

MANY_MAPPINGS = 30_000
# Files with the longest tests begin, so that no process works on one alone at the end.
FIRST = (
  'configs_tiny_test',
  'train_processes_test',
  'sweep_test',
  'inference_shards_test',
  'compile_aot_test',
)

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = f'{FAST_COMPILATION} {os.environ.get("XLA_FLAGS", "")}'.strip()
os.environ['HF_HUB_OFFLINE'] = os.environ['HF_DATASETS_OFFLINE'] = os.environ['TRANSFORMERS_OFFLINE'] = '1'


def pytest_configure(config: pytest.Config) -> None:
  cache = config.cache.mkdir('jax')  # .pytest_cache/d/jax; environment variables reach subprocesses too
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(cache))
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.3')


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  items.sort(key=lambda item: item.path.stem not in FIRST)


@pytest.fixture(scope='session', autouse=True)
def without_tensorflow() -> Iterator[None]:
  """mor_jax must work without TensorFlow. (Entries in sys.modules that forbid it would confuse TFDS.)"""
  yield
  assert 'tensorflow' not in sys.modules, 'a test imported TensorFlow'


@pytest.fixture(scope='module', autouse=True)
def room_for_programs() -> Iterator[None]:
  """Compiled programs are forgotten before a process has as many memory mappings as Linux allows (65,530)."""
  yield
  _make_room()


@pytest.fixture
def room_after_test() -> Iterator[None]:
  """The same after every test, for modules that compile many programs."""
  yield
  _make_room()


def _make_room() -> None:
  maps = Path('/proc/self/maps')
  if 'jax' in sys.modules and maps.exists() and len(maps.read_bytes().splitlines()) > MANY_MAPPINGS:
    sys.modules['jax'].clear_caches()
    if 'chex' in sys.modules:  # what may be traced once may be so again
      sys.modules['chex'].clear_trace_counter()
    gc.collect()


def pytest_report_header() -> str:
  return ', '.join(
    f'{name} {metadata.version(name)}' for name in ('jax', 'flax', 'orbax-checkpoint', 'numpy')
  )


@pytest.fixture(scope='session')
def finished_run(tmp_path_factory):
  """Config and folder of a finished training of 20 steps; what it printed is in output.txt beside the folder."""
  import tiny_run

  from mor_jax import train
  from mor_jax.config import with_changes

  data = {'max_documents': 40, 'validation_fraction': 0.2, 'cache_dir': str(tmp_path_factory.mktemp('cache'))}
  steps = {'log_every': 1, 'eval_every': 10, 'eval_rows': 12, 'sample_tokens': 8}
  # Model and batch are those of tiny_run, so that the compiled step is found in the cache.
  small = with_changes(
    tiny_run.CONFIG, model={'vocab_size': None}, data=data, train=steps, checkpoint={'every_steps': 6}
  )
  config = dataclasses.replace(small, name='small')
  folder: Path = tmp_path_factory.mktemp('runs') / 'finished'
  with pytest.MonkeyPatch.context() as patch, (folder.parent / 'output.txt').open('w') as output:
    patch.setattr(sys, 'stdout', output)
    train.main(config, str(folder))
  return config, folder
