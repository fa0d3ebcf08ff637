"""`python -m mor_jax.compile` on this machine's processors; for TPUs see compile_aot_test.py."""

import json
import subprocess
import sys

import pytest

from mor_jax.config import ConfigError
from mor_jax.planning import topology

TINY = [
  '--config=configs/tiny.py',
  '--config.model.num_layers=5',
  '--config.model.d_model=32',
  '--config.model.mlp_dim=48',
  '--config.data.seq_len=32',
  '--config.train.global_batch=8',
]


def run(*arguments):
  command = [sys.executable, '-m', 'mor_jax.compile', *arguments]
  return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_figures_of_one_device():
  # On CPUs `xla` attention computes its weights again in the backward pass, which the model does not ask for.
  settings = ['--config.train.accumulation=2', '--config.model.attention=reference']
  done = run(*TINY, '--topology=cpu:4', *settings, '--json')
  assert done.returncode == 0, done.stderr
  figures = json.loads(done.stdout)
  assert figures['devices'] == 4
  assert figures['rows'] == 1
  assert figures['flops'] == figures['model_flops'] > 0
  # Gradients of every micro-batch are summed over the replicas at least once.
  assert figures['collective_bytes_by_kind']['all-reduce'] >= figures['parameter_bytes']
  assert figures['collective_bytes'] == sum(figures['collective_bytes_by_kind'].values())
  # AdamW keeps two moments.
  assert figures['optimizer_bytes'] == pytest.approx(2 * figures['parameter_bytes'], rel=0.01)
  assert figures['peak_bytes'] >= figures['argument_bytes'] + figures['temp_bytes']
  assert figures['compile_seconds'] > 0
  assert 'cpu:4' in done.stderr


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--topology=cpu:4', '--config.parallel.fsdp=3'], 'cannot be laid out on 4 devices'),
    (['--topology=cpu:3'], 'do not divide among 3 devices; set train.global_batch to 6 or 9'),
    (['--slices=2'], '--slices=2 needs --topology'),
    (['--slots=2'], '--slots is for --program=decode; with --program=train leave it out'),
  ],
)
def test_what_cannot_work_is_refused(arguments, message):
  done = run(*TINY, *arguments)
  assert done.returncode == 2
  assert message in done.stderr
  assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
  ('name', 'slices', 'message'),
  [
    ('v5p', 1, '--topology=v5p must be CHIP:SHAPE'),
    ('v9:4x4', 1, 'unknown chip; known are v5e, v5p, v6e, tpu7x, cpu'),
    ('v5p:4x4', 1, 'slices of v5p have 3 dimensions, such as v5p:8x8x8'),
    ('v5e:4x0', 1, 'slices of v5e have 2 dimensions'),
    ('cpu:2', 2, 'processors are cpu:COUNT, in one slice'),
    ('cpu:2', 0, '--slices=0 is not allowed: must be >= 1'),
  ],
)
def test_unknown_topologies_are_refused(name, slices, message):
  with pytest.raises(ConfigError, match=message):
    topology.devices(name, slices)


def test_a_missing_compiler_is_named(monkeypatch):
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  with pytest.raises(ConfigError, match='needs the TPU compiler: pip install'):
    topology.devices('v5e:4x4')
