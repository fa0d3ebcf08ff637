"""Two processes in one training: they stop together, and one that hangs does not hang the other.

The step is a sum over both processes' rows; coordinator, signals, votes and watchdog are the real ones.
"""

import re
import signal
import socket
import subprocess
import sys

import pytest

PROCESS = """
import io, itertools, sys, time
import jax, jax.numpy as jnp, numpy as np
from pathlib import Path
from rich.console import Console
from mor_jax.config import Config, with_changes
from mor_jax.data import schedule
from mor_jax.parallel import mesh as mesh_lib
from mor_jax.training import loop
from mor_jax.training.watch.goodput import Ledger
from mor_jax.runs.metrics import MetricsLog
from mor_jax.runs.progress import Progress
from mor_jax.training.state import TrainState
from mor_jax.training.watch.stopping import Signals, Stop
from mor_jax.training.watch.watchdog import Watchdog

address, index, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]) / sys.argv[2]
jax.config.update('jax_cpu_collectives_implementation', 'gloo')
jax.distributed.initialize(address, 2, index)
mesh = mesh_lib.make_mesh()
folder.mkdir()
eval_every = int(sys.argv[4])
train = {'steps': 500, 'global_batch': 2, 'warmup_steps': 0, 'log_every': 1, 'eval_every': eval_every}
config = with_changes(Config(), train=train, data={'seq_len': 4})

@jax.jit
def step(state, batch):
  loss = 1.0 / (state.step + 1) + 0 * batch['tokens'].sum()
  metrics = dict(loss=loss, grad_norm=loss, learning_rate=loss, skipped=0, halted=False)
  return TrainState(state.step + 1, (), ()), metrics

class Checkpoints:
  latest_step = None

  def save(self, step, state, nll, position, rows_read):
    print('saved', step, int(jax.device_get(state.step)), flush=True)

def batches():
  for number in itertools.count(1):
    time.sleep(0.02)
    print('step', number, flush=True)
    yield {'tokens': np.zeros((1, 4), np.int32)}

def validate(variables):
  for number in guards.over(range(500)):
    print('validation', number, flush=True)
    time.sleep(0.02)

replicated = mesh_lib.replicated(mesh)
state = jax.jit(lambda: TrainState(jnp.int32(0), (), ()), out_shardings=replicated)()
with (
  Signals() as signals,
  MetricsLog(folder, 0) as log,
  Progress(Console(file=io.StringIO()), 500, 0) as progress,
  signals.training(),
  Watchdog(float(sys.argv[5]), exits=True) as watchdog,
):
  guards = loop.Guards(Stop(signals, mesh), watchdog, Ledger())
  order = schedule.of(config.train)
  loop.train(config, mesh, state, step, order, batches(), validate, Checkpoints(), log, progress, guards)
  stopped = guards.stop.settle()
sys.exit(128 + stopped if stopped else 0)
"""


@pytest.fixture
def pair(request, tmp_path):
  """Two processes that train; (steps between validations, line to wait for, limit of the watchdog) is the parameter."""
  eval_every, sign_of_life, limit = request.param
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'localhost:{free.getsockname()[1]}'
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', PROCESS, address, str(index), str(tmp_path), str(eval_every), str(limit)],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(2)
  ]
  for process in processes:
    while (line := process.stdout.readline()) not in ('', f'{sign_of_life}\n'):
      pass
    assert line, process.communicate()[1]
  yield processes
  for process in processes:
    process.kill()
    process.communicate()


@pytest.mark.parametrize(
  'pair',
  [
    pytest.param((0, 'step 6', 100), id='steps'),
    pytest.param((3, 'validation 6', 100), id='validation', marks=pytest.mark.slow),
  ],
  indirect=True,
)
def test_one_is_told_and_both_save_the_same_step(pair):
  pair[1].send_signal(signal.SIGTERM)
  outputs = [process.communicate(timeout=30)[0] for process in pair]
  assert [process.returncode for process in pair] == [143, 143]
  saves = [re.findall(r'^saved (\d+) (\d+)$', output, re.M) for output in outputs]
  assert saves[0] == saves[1]
  assert len(saves[0]) == 1
  assert 'validation 60' not in outputs[0]
  assert saves[0][0][0] == saves[0][0][1]


@pytest.mark.parametrize('pair', [(0, 'step 6', 6)], indirect=True)
def test_a_stopped_process_ends_the_other_by_its_watchdog(pair):
  pair[1].send_signal(signal.SIGSTOP)
  _, err = pair[0].communicate(timeout=30)
  assert pair[0].returncode == 70
  assert re.search(r'hang: step \d+ takes more than \d+ s; the process ends with exit code 70', err)
  assert re.search(r'loop.py", line \d+ in train', err), 'where it waits'
