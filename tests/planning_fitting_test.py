"""The search for what fits, with programs whose memory is a formula: state / shards + rows * what remat keeps."""

import dataclasses

import jax
import pytest
import tiny_run

from mor_jax.config import Config, ConfigError, with_changes
from mor_jax.parallel import mesh as mesh_lib
from mor_jax.planning import fitting
from mor_jax.planning.ahead_of_time import Program

STATE, KEPT = 120, {'none': 100, 'dots': 40, 'full': 20, 'block': 10, 'offload': 5}
CONFIG = with_changes(
  tiny_run.CONFIG,
  train={'global_batch': 16, 'accumulation': 1},
  model={'remat': 'none'},
  parallel={'replica': -1},
)


class Devices:
  """A compiler for 4 devices of a memory, which keeps what it was asked for."""

  def __init__(self, memory: float):
    self.memory, self.asked = memory, []

  def compile(self, config: Config) -> Program:
    self.asked.append(config)
    fsdp = config.parallel.fsdp
    if fsdp == 2:
      raise ConfigError('two will not do')
    mesh = _Mesh({'replica': 4 // fsdp, 'fsdp': fsdp, 'tensor': 1})
    rows = config.train.global_batch // config.train.accumulation // 4
    state = STATE // fsdp
    peak = state + rows * KEPT[config.model.remat]
    return Program(
      config=config,
      mesh=mesh,
      parameter_bytes=state // 3,
      optimizer_bytes=2 * state // 3,
      memory=self.memory,
      flops=1.0,
      argument_bytes=state,
      temp_bytes=peak - state,
      peak_bytes=peak,
      traffic=1,
      collectives=[],
      compile_seconds=0.0,
      compile_cpu_seconds=0.0,
    )


@dataclasses.dataclass(frozen=True)
class _Mesh:
  shape: dict[str, int]

  @property
  def devices(self):
    return mesh_lib.make_mesh(devices=jax.devices()[:1]).devices


def remedies(memory: float) -> list[tuple[str, int, bool]]:
  devices = Devices(memory)
  program = devices.compile(CONFIG)
  assert not program.fits
  tried = list(fitting.remedies(program, devices.compile))
  return [
    (attempt.flags.removeprefix('--config.'), attempt.program.peak_bytes, attempt.program.fits)
    for attempt in tried
  ]


def test_of_each_remedy_the_first_that_fits_ends_the_search():
  assert remedies(350) == [
    ('train.accumulation=2', 320, True),  # 2 rows: as many as there is room for
    ('model.remat=dots', 280, True),
    ('parallel.fsdp=4', 430, False),
  ]


def test_what_fits_by_no_remedy_is_shown_all_the_same():
  tried = remedies(121)
  assert not any(fits for *_, fits in tried)
  assert [flags for flags, *_ in tried] == [
    'train.accumulation=4',
    'model.remat=dots',
    'model.remat=full',
    'model.remat=block',
    'model.remat=offload',
    'parallel.fsdp=4',
  ]


def test_more_shards_may_be_what_helps():
  assert remedies(440)[-1] == ('parallel.fsdp=4', 430, True)


@pytest.mark.parametrize(
  ('memory', 'most'),
  [
    (1000, {'none': 4, 'dots': 4, 'full': 4, 'block': 4, 'offload': 4}),
    (250, {'none': 1, 'dots': 2, 'full': 4, 'block': 4, 'offload': 4}),
    (150, {'none': 0, 'dots': 0, 'full': 1, 'block': 2, 'offload': 4}),
  ],
)
def test_suggestions_find_the_most_rows_of_every_remat(memory, most):
  devices = Devices(memory)
  attempts = list(fitting.suggestions(devices.compile(CONFIG), devices.compile))
  found = dict.fromkeys(KEPT, 0)
  for attempt in attempts:
    if attempt.program.fits:
      remat = attempt.program.config.model.remat
      found[remat] = max(found[remat], attempt.program.rows)
  assert found == most
  assert len(attempts) <= 3 * len(KEPT)
  assert fitting.best(attempts).program.fits


def test_nothing_fits():
  devices = Devices(50)
  attempts = list(fitting.suggestions(devices.compile(CONFIG), devices.compile))
  assert fitting.best(attempts) is None
  assert [attempt.program.rows for attempt in attempts] == [1] * len(KEPT)
