"""Descriptions of absent devices, from which the TPU compiler can compile for a pod on any machine."""

import importlib.util
import os
import re

import jax

from mor_jax.config import ConfigError
from mor_jax.planning import chips

_NAME = re.compile(r'(?P<chip>\w+):(?P<shape>\d+(x\d+)*)')
_DIMENSIONS = {'v5e': 2, 'v5p': 3, 'v6e': 2, 'tpu7x': 3}
_SINGLE_CHIP = {'chips_per_host_bounds': (1, 1, 1)}


def prepare() -> None:
  """Call before JAX initialises: keeps it from using a real accelerator or querying cloud metadata."""
  jax.config.update('jax_platforms', 'cpu')
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  # Without a TPU, libtpu warns about what these do not say.
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-16')


def devices(name: str, slices: int = 1) -> list[jax.Device]:
  """The devices of `slices` slices of a topology such as `v5p:8x8x8`, or of `cpu:8`. Call `prepare` first.

  Raises:
    ConfigError: the topology does not exist, or the TPU compiler is not installed.
  """
  if slices < 1:
    raise ConfigError(f'--slices={slices} is not allowed: must be >= 1')
  match = _NAME.fullmatch(name)
  if match is None:
    raise ConfigError(f'--topology={name} must be CHIP:SHAPE, such as v5p:8x8x8, v5e:16x16 or cpu:8')
  sizes = [int(size) for size in match['shape'].split('x')]
  if match['chip'] == 'cpu':
    return _cpu_devices(name, sizes, slices)
  if match['chip'] not in chips.TPUS:
    raise ConfigError(f'--topology={name}: unknown chip; known are {", ".join([*chips.TPUS, "cpu"])}')
  dimensions = _DIMENSIONS[match['chip']]
  if len(sizes) != dimensions or min(sizes) < 1:
    example = {2: '16x16', 3: '8x8x8'}[dimensions]
    raise ConfigError(
      f'--topology={name}: slices of {match["chip"]} have {dimensions} dimensions, such as '
      f'{match["chip"]}:{example}'
    )
  if importlib.util.find_spec('libtpu') is None:
    raise ConfigError(
      f"--topology={name} needs the TPU compiler: pip install 'mor_jax[tpu]', or pip install -r requirements-aot.txt"
    )
  return _tpu_devices(name, sizes, slices)


def _cpu_devices(name: str, sizes: list[int], slices: int) -> list[jax.Device]:
  if len(sizes) > 1 or sizes[0] < 1 or slices > 1:
    raise ConfigError(f'--topology={name} --slices={slices}: processors are cpu:COUNT, in one slice')
  jax.config.update('jax_num_cpu_devices', sizes[0])
  return jax.devices()


def _tpu_devices(name: str, sizes: list[int], slices: int) -> list[jax.Device]:
  from jax.experimental import topologies

  single = _SINGLE_CHIP if set(sizes) == {1} else {}
  several = {'num_slices': slices} if slices > 1 else {}
  try:
    found = topologies.get_topology_desc(name, 'tpu', **single, **several).devices
  except jax.errors.JaxRuntimeError as error:
    reason = str(error).splitlines()[0].partition(': ')[2]
    raise ConfigError(f'--topology={name}: the TPU compiler knows no such slice ({reason})') from None
  return list(found)
