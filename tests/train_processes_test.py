"""Trainings of several real processes: the losses of one, common checkpoints, a common end."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from mor_jax import train
from mor_jax.config import with_changes
from mor_jax.runs import metrics

TURNED_CHOICES = 6 / 1024  # of those that a batch makes

# Runs the command line of mor_jax.train; at a step of one process something happens.
PROGRAM = """
import os, runpy, signal, sys
from mor_jax.data import loader

process, step_of_accident, accident = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
sys.argv = ['train', *sys.argv[4:]]
batches = loader.train_batches

def unlucky(*arguments, start_step, **options):
  for step, batch in enumerate(batches(*arguments, start_step=start_step, **options), start_step + 1):
    if step == step_of_accident and accident == 'exception':
      raise ValueError('the accident')
    if step == step_of_accident and accident:
      os.kill(os.getpid(), getattr(signal, accident))
    yield batch

loader.train_batches = unlucky
runpy.run_module('mor_jax.train', run_name='__main__')
"""


def start(
  count: int,
  folder,
  config_file,
  accident: str = '',
  step: int = 0,
  process: int = 1,
  steps: int = 20,
  flags: dict[int, str] | None = None,
):
  """So many processes of one training; in one of them an accident happens at a step; some have flags of their own."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'localhost:{free.getsockname()[1]}'
  run = [f'--config={config_file}', f'--workdir={folder}', f'--config.train.steps={steps}']
  several = [f'--coordinator={address}', f'--num_processes={count}']
  started = []
  for number in range(count):
    happening = [str(number), str(step), accident if number == process else '']
    command = [sys.executable, '-c', PROGRAM, *happening, *run, *several, f'--process_id={number}']
    command += [flags[number]] if flags and number in flags else []
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    started.append(subprocess.Popen(command, env=os.environ | {'JAX_PLATFORMS': 'cpu'}, **pipes))
  return started


def finish(processes, seconds: float = 150):
  """(exit code, output, errors) of each."""
  try:
    outputs = [process.communicate(timeout=seconds) for process in processes]
  finally:
    for process in processes:
      process.kill()
  return [(process.returncode, *texts) for process, texts in zip(processes, outputs, strict=True)]


@pytest.fixture
def config_file(finished_run, tmp_path):
  """A config file with the settings of the finished run."""
  path = tmp_path / 'settings.py'
  settings = finished_run[0].to_dict()
  path.write_text(
    f'from ml_collections import config_dict\ndef get_config():\n  return config_dict.ConfigDict({settings!r})\n'
  )
  return path


@pytest.fixture
def resumable(finished_run, tmp_path):
  """A copy of the finished run that has come to step 18 of 20."""
  folder = shutil.copytree(finished_run[1], tmp_path / 'resumed')
  (folder / 'summary.json').unlink()
  shutil.rmtree(folder / 'checkpoints' / '20')
  return folder


def assert_same_metrics(folder, expected):
  """Up to rounding, which may turn a few of the choices that `sampling_accuracy` counts."""
  ours, theirs = (metrics.read(path / 'metrics.jsonl') for path in (folder, expected))
  assert [record['step'] for record in ours] == [record['step'] for record in theirs]
  for name in ('train/loss', 'train/grad_norm', 'train/sampling_accuracy', 'validation/nll'):
    pairs = [(a[name], b[name]) for a, b in zip(ours, theirs, strict=True) if name in a or name in b]
    assert pairs, name
    atol = TURNED_CHOICES if name == 'train/sampling_accuracy' else 2e-5
    np.testing.assert_allclose(*zip(*pairs, strict=True), rtol=2e-4, atol=atol, err_msg=name)


@pytest.mark.slow
def test_processes_that_disagree_end_before_anything_is_written(tmp_path, config_file):
  ended = finish(start(2, tmp_path / 'run', config_file, flags={1: '--config.train.learning_rate=0.5'}))
  for code, _, errors in ended:
    assert code == 2, errors
    assert 'train.learning_rate is' in errors
    assert 'on process 0 and 0.5 on process 1; start all of them with the same command' in errors
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_with_two(finished_run, resumable, config_file):
  _, finished = finished_run
  (first, output, errors), (second, silent, _) = finish(start(2, resumable, config_file))
  assert (first, second) == (0, 0), errors
  assert 'resuming after step 18' in output
  assert 'Finished' in output
  assert silent.replace('[Gloo]', '').count('step') == 0, 'only the first process prints'
  assert_same_metrics(resumable, finished)
  manifest = json.loads(json.loads((resumable / 'checkpoints/20/manifest.json').read_text())['manifest'])
  assert manifest['processes'] == 2
  assert {'process_0.json', 'process_1.json'} <= set(manifest['files'])
  summary, before = (json.loads((path / 'summary.json').read_text()) for path in (resumable, finished))
  assert summary['validation/nll'] == pytest.approx(before['validation/nll'], rel=1e-4)


@pytest.mark.slow
def test_two_and_four_processes_train_as_one_and_others_go_on(finished_run, config_file, tmp_path):
  # In more steps rounding, which differs with the number of processes, may turn a choice of the router.
  config, finished = with_changes(finished_run[0], train={'steps': 10}), tmp_path / 'alone'
  assert train.main(config, str(finished)) == 0
  for count in (2, 4):
    folder = tmp_path / f'run-{count}'
    ended = finish(start(count, folder, config_file, steps=10))
    assert [code for code, *_ in ended] == [0] * count, ended[0][2]
    assert_same_metrics(folder, finished)
    (folder / 'summary.json').unlink()
    shutil.rmtree(folder / 'checkpoints' / '10')
    if count == 2:
      assert train.main(config, str(folder)) == 0
    else:
      ended = finish(start(2, folder, config_file, steps=10))
      assert [code for code, *_ in ended] == [0, 0], ended[0][2]
    assert_same_metrics(folder, finished)


@pytest.mark.slow
@pytest.mark.parametrize('accident', ['exception', 'SIGKILL'])
@pytest.mark.parametrize('process', [0, 1])
def test_a_process_that_fails_takes_the_others_down(resumable, config_file, accident, process):
  processes = start(2, resumable, config_file, accident, step=20, process=process)
  unlucky, other = processes[process], processes[1 - process]
  unlucky.wait(timeout=120)
  begin = time.monotonic()
  other.wait(timeout=60)
  assert time.monotonic() - begin < 60
  ended = finish(processes)
  assert ended[process][0] == (1 if accident == 'exception' else -signal.SIGKILL)
  assert ended[1 - process][0] not in (0, None)
  if accident == 'exception':
    assert 'ValueError: the accident' in ended[process][2]
  assert not (resumable / 'summary.json').exists()
