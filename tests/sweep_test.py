"""The command `python -m mor_jax.sweep`: its flags, what it writes, and a real sweep that is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import entry_points
import pytest
import tiny_run
from absl.testing import flagsaver

from mor_jax.config import Config, ConfigError, with_changes

ROOT = Path(__file__).parents[1]
CONFIG = """
from mor_jax import config
from mor_jax.config.typed import to_config_dict

def get_config():
  settings = to_config_dict(config.resolve(SETTINGS))
  return settings
"""
SWEEP = """
from mor_jax.sweeping import axes

def get_sweep(base):
  return axes.grid({'model.num_recursions': (1, 2), 'train.seed': (0, 1, 2)})
"""


@pytest.fixture
def files(tmp_path):
  """--config of a tiny model, --sweep of six runs of it, and --workdir."""
  small = with_changes(
    tiny_run.CONFIG,
    model={'vocab_size': None},
    data={'max_documents': 40, 'validation_fraction': 0.2, 'cache_dir': str(tmp_path / 'cache')},
    train={'log_every': 1, 'eval_every': 10, 'eval_rows': 12, 'sample_tokens': 0},
    checkpoint={'every_steps': 6},
  )
  (tmp_path / 'config.py').write_text(CONFIG.replace('SETTINGS', repr(small.to_dict())))
  (tmp_path / 'sweep.py').write_text(SWEEP)
  return {
    'config': str(tmp_path / 'config.py'),
    'sweep': str(tmp_path / 'sweep.py'),
    'workdir': str(tmp_path / 'out'),
  }


def command(files: dict[str, str], *more: str) -> list[str]:
  flags = [f'--{name}={value}' for name, value in files.items()]
  return [sys.executable, '-m', 'mor_jax.sweep', *flags, *more]


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    ({'sweep': None}, '--sweep is missing'),
    ({'sweep': 'x', 'parallel': 0}, '--parallel=0 is not allowed: must be >= 1'),
    ({'sweep': 'x', 'report_tokens': -1}, '--report_tokens=-1 is not allowed'),
    (
      {'sweep': 'x', 'gpus': ['0', '1', '2'], 'parallel': 2},
      'names 3 devices, which --parallel=2 runs cannot',
    ),
    ({'sweep': 'x', 'gpus': ['0'], 'write': 'slurm'}, '--gpus=0 is for runs on this machine'),
    ({'sweep': 'x', 'parallel': 2, 'write': 'shell'}, '--parallel=2 has no effect with --write=shell'),
  ],
)
def test_flags_that_cannot_work_are_refused(given, message):
  sweep = entry_points.load('mor_jax.sweep')
  with flagsaver.flagsaver(**given), pytest.raises(ConfigError, match=message):
    sweep.main(Config(), None)


def test_wrong_run_ends_with_code_2_and_leaves_nothing(files):
  Path(files['sweep']).write_text(SWEEP.replace('(1, 2)', '(1, 2, 5)'))
  done = subprocess.run(command(files), cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 2
  assert 'run num_recursions=5,seed=0: model.num_recursions=5 does not divide' in done.stderr
  assert not Path(files['workdir']).exists()


def test_shell_list_says_how_to_collect(files):
  done = subprocess.run(
    command(files, '--write=shell'), cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  text = (Path(files['workdir']) / 'sweep.sh').read_text()
  assert text.count('\npython -m mor_jax.train ') == 6
  assert f'--sweep={files["sweep"]} --workdir={files["workdir"]} --write=results' in text


@pytest.mark.slow
def test_killed_sweep_completes_without_repeating_a_finished_run(files):
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
  begun = subprocess.Popen(command(files), cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
  runs = Path(files['workdir']) / 'runs'
  second = runs / 'num_recursions=1,seed=1' / 'metrics.jsonl'
  deadline = time.monotonic() + 240
  while not second.exists():
    assert begun.poll() is None, begun.stdout.read()
    assert time.monotonic() < deadline
    time.sleep(0.05)
  begun.send_signal(signal.SIGTERM)
  assert begun.wait(60) == 143
  (first,) = runs.glob('*/summary.json')
  written = first.stat().st_mtime_ns

  done = subprocess.run(
    command(files), cwd=ROOT, env=environment, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert len(list(runs.glob('*/summary.json'))) == 6
  assert first.stat().st_mtime_ns == written
  processes = {
    file.parent.name: len(json.loads(file.read_text())) for file in sorted(runs.glob('*/goodput.json'))
  }
  assert processes.pop('num_recursions=1,seed=1') == 2, 'the run that was stopped resumes'
  assert set(processes.values()) == {1}
  for name in ('results.md', 'results.csv', 'results_over_seeds.csv', 'report.html'):
    assert (Path(files['workdir']) / name).exists()
