"""Faults that use brought to light, of a training: work that was lost, tracebacks, machines that disagree."""

import errno
import io
import os
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from mor_jax import cli, train
from mor_jax.checkpoints.checkpoint import Checkpoints
from mor_jax.config import CheckpointConfig, Config, ConfigError, resolve, with_changes
from mor_jax.console import Output
from mor_jax.errors import RunError
from mor_jax.parallel import device_memory, runtime
from mor_jax.runs import metrics
from mor_jax.runs.run_folder import RunFolder

# ---- work that must not be lost ----


class FullDisk(io.FileIO):
  """A file on a disk with room for so many bytes more."""

  room = 0

  def write(self, content) -> int:
    kept = bytes(content)[: FullDisk.room]
    if content and not kept:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    FullDisk.room -= len(kept)
    return super().write(kept)


def test_metrics_wait_for_room_on_a_full_disk(tmp_path, monkeypatch):
  told, room = [], {'left': True}

  class FullBoard:
    def __init__(self, *_):
      if not room['left']:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write = close = __init__

  monkeypatch.setattr(metrics, 'Board', FullBoard)
  with metrics.MetricsLog(tmp_path, 0, report=told.append) as log:
    log._file.close()
    log._file = FullDisk(tmp_path / 'metrics.jsonl', 'r+')
    FullDisk.room = 70
    for step in range(1, 5):
      room['left'] = step < 3
      log.write(step, {'train/loss': 1 / step})
    assert len(metrics.read(tmp_path / 'metrics.jsonl')) == 2
    assert len(told) == 1
    assert 'No space left on device' in told[0]
    FullDisk.room, room['left'] = 10_000, True
    log.write(5, {'train/loss': 0.5})
  assert [record['step'] for record in metrics.read(tmp_path / 'metrics.jsonl')] == [1, 2, 3, 4, 5]
  assert metrics.read(tmp_path / 'metrics.jsonl')[2] == {'step': 3, 'train/loss': 1 / 3}


def test_a_folder_without_room_is_refused_in_a_sentence(tmp_path, monkeypatch):
  def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(metrics, 'write_atomically', full)
  with pytest.raises(RunError, match=r'workdir=.* cannot be written \(No space left on device\); make room'):
    metrics.MetricsLog(tmp_path, 0)


LOOP = """
import signal, sys, time
from mor_jax.console import open_console, print_line
from mor_jax.training.watch import stopping

for number in stopping.HANDLED:
  signal.signal(number, signal.SIG_DFL)  # whoever runs the tests may have them ignored
with stopping.Signals() as signals:
  console = open_console(lost=signals.output_lost)
  with signals.training():
    for step in range(300):
      print_line(console, f'step {step} \u2713')
      time.sleep(0.02)
      if signals.received:
        print('saved after step', step, file=sys.stderr, flush=True)
        break
  signals.exit_code(signals.received)
"""


@pytest.mark.parametrize(
  ('happens', 'code'),
  [(signal.SIGHUP, 129), (signal.SIGQUIT, 131), ('reader gone', 141), ('terminal gone', 141)],
)
def test_the_state_is_saved_however_the_user_goes_away(happens, code):
  reader, writer = os.openpty() if happens == 'terminal gone' else os.pipe()
  command = [sys.executable, '-c', LOOP]
  with subprocess.Popen(command, stdout=writer, stderr=subprocess.PIPE, text=True) as process:
    os.close(writer)
    assert os.read(reader, 6) == b'step 0'
    if isinstance(happens, str):
      os.close(reader)
    else:
      process.send_signal(happens)
    errors = process.stderr.read()
    assert process.wait(timeout=30) == code
  assert 'saved after step' in errors


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='only Linux has a device that is full')
def test_output_without_room_ends_nothing(tmp_path):
  program = 'from mor_jax.console import open_console, print_line\nconsole = open_console()\n'
  program += (
    "for i in range(3):\n  print_line(console, 'text')\nprint('still here', file=__import__('sys').stderr)"
  )
  with open('/dev/full', 'w') as full:
    done = subprocess.run(
      [sys.executable, '-c', program], stdout=full, stderr=subprocess.PIPE, text=True, check=True
    )
  assert done.stderr.count('WARNING: output cannot be written (No space left on device)') == 1
  assert 'still here' in done.stderr


@pytest.mark.parametrize('encoding', ['ascii', 'latin-1'])
def test_text_that_a_terminal_cannot_show_is_shown_as_it_can(encoding):
  stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
  Output(stream, None).write('a \u20ac b')
  stream.flush()
  assert stream.buffer.getvalue() == b'a ? b'


# ---- a sentence instead of a traceback ----


def run_train(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
  command = [sys.executable, '-m', 'mor_jax.train', '--config=configs/tiny.py', *words]
  return subprocess.run(
    command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
  )


def test_a_platform_that_is_not_there_is_named(tmp_path):
  done = run_train(f'--workdir={tmp_path / "run"}', JAX_PLATFORMS='rocm')
  assert done.returncode == 2
  assert done.stderr.strip().startswith('error: JAX_PLATFORMS=rocm names a platform')
  assert 'Traceback' not in done.stderr


@pytest.mark.parametrize(('tasks', 'several'), [('', False), ('1', False), ('4', True)])
def test_slurm_may_leave_its_number_of_tasks_empty(tasks, several):
  found = runtime.find(runtime.Processes(), None, {'SLURM_PROCID': '0', 'SLURM_NTASKS': tasks})
  assert (found is not None) == several


def test_numbers_of_steps_may_be_written_short():
  assert cli.parse_setting('train.steps', '1e4') == 10_000
  with pytest.raises(ConfigError, match=r'train\.steps=1\.5e0 must be an integer'):
    cli.parse_setting('train.steps', '1.5e0')


def test_paths_begin_at_home(monkeypatch):
  monkeypatch.setenv('HOME', '/home/somebody')
  config = resolve({'checkpoint': {'folder': '~/c'}, 'data': {'cache_dir': '~'}, 'init': {'source': 'a~b'}})
  assert (config.checkpoint.folder, config.data.cache_dir) == ('/home/somebody/c', '/home/somebody')
  assert config.init.source == 'a~b'


def test_a_checkpoint_folder_that_cannot_be_written_is_refused_first(tmp_path):
  (tmp_path / 'file').write_text('')
  config = with_changes(Config(), checkpoint={'folder': str(tmp_path / 'file' / 'c')})
  with pytest.raises(ConfigError, match=r'checkpoint\.folder=.* cannot be written \(Not a directory\)'):
    RunFolder(tmp_path / 'run').check(config)
  assert not (tmp_path / 'run').exists()


def test_a_step_too_large_for_the_machine_is_refused_with_what_would_fit(finished_run, tmp_path, monkeypatch):
  config, _ = finished_run
  monkeypatch.setattr(device_memory, 'host_free', lambda: 1_000_000.0)
  with pytest.raises(
    ConfigError,
    match=r'needs \d\.\d MB of memory on each device, .* 1\.0 MB are free; .*accumulation.*--suggest',
  ):
    train.main(config, str(tmp_path / 'run'))


def test_what_this_machine_has_left_is_known():
  assert 1e8 < device_memory.host_free() < 1e14
  assert device_memory.free(jax.devices()) == pytest.approx(device_memory.host_free(), rel=0.2)


# ---- files of settings ----


def test_a_config_may_import_its_neighbour_and_have_a_colon_in_its_path(tmp_path):
  for name, steps in (('a:b', 3), ('c', 4)):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'shared_by_them.py').write_text(f'STEPS = {steps}')
    (tmp_path / name / 'run.py').write_text(
      'from mor_jax import config\nfrom shared_by_them import STEPS\n\n\n'
      'def get_config(variant="one"):\n  made = config.default()\n  made.name = variant\n'
      '  made.train.warmup_steps, made.train.steps = 0, STEPS\n  return made\n'
    )
  for name, steps in (('a:b', 3), ('c', 4)):
    assert cli.load_config(str(tmp_path / name / 'run.py'), {}).train.steps == steps
    made = cli.load_config(f'{tmp_path / name / "run.py"}:other', {})
    assert (made.name, made.train.steps) == ('other', steps)
  assert str(tmp_path / 'c') not in sys.path


# ---- starting among others ----


LONELY = """
import sys
from mor_jax.parallel import runtime

runtime.PATIENCE = 2
runtime.initialize(runtime.Processes(sys.argv[1], 2, 0))
"""


def test_a_first_process_without_its_peers_ends_with_a_sentence():
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  command = [sys.executable, '-c', LONELY, f'localhost:{port}']
  done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
  assert done.returncode == 1
  assert 'the processes did not find each other through localhost' in done.stderr


def test_a_disk_that_stays_full_does_not_end_the_training(tmp_path, monkeypatch):
  told = []
  checkpoints = Checkpoints(tmp_path, CheckpointConfig(), report=told.append)
  checkpoints._note_failure(1, OSError(errno.ENOSPC, 'full'))

  def full():
    raise OSError(errno.ENOSPC, 'full')

  with monkeypatch.context() as patch:
    patch.setattr(checkpoints, '_open', full)
    checkpoints.save(2, {'a': np.zeros(3)})
    checkpoints.save(3, {'a': np.zeros(3)})
  checkpoints.save(4, {'a': np.zeros(3)})
  checkpoints.wait()
  assert checkpoints.latest_step == 4
  checkpoints.__exit__()
