"""Signals: what they end and when. The run of several processes is in parallel_runtime_test.py."""

import os
import signal
import subprocess
import sys
import time

import pytest
import tiny_run

from mor_jax.training.watch import stopping
from mor_jax.training.watch.stopping import Interrupted, Signals, Stop

IN_COMPILED_CODE = """
import ctypes, sys
from mor_jax.training.watch import stopping

stopping.GRACE_SECONDS = 0.5

def never_return():
  '''Waits for a lock that nobody frees, as deaf to Python's handlers as a compiler.'''
  print('deep', flush=True)
  mutex = ctypes.create_string_buffer(64)
  for _ in range(2):
    ctypes.CDLL(None).pthread_mutex_lock(mutex)

with stopping.Signals() as signals:
  if sys.argv[1] == 'starting':
    never_return()
  with signals.training():
    never_return()
"""


@pytest.fixture
def signals():
  """Handlers that are there as in a process started from a terminal."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  with Signals() as signals:
    yield signals
  signal.signal(signal.SIGINT, before)


def _send(number: int, wait: float = 0.01) -> None:
  os.kill(os.getpid(), number)
  time.sleep(wait)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_ends_the_process_while_there_is_nothing_to_save(signals, number):
  with pytest.raises(SystemExit) as end:
    _send(number)
  assert end.value.code == 128 + number


def test_in_training_it_is_noted(signals, capfd):
  stop = Stop(signals, tiny_run.MESH)
  with signals.training():
    assert stop.poll(1) is None
    _send(signal.SIGTERM)
    assert stop.poll(2) == signal.SIGTERM
    assert stop.signal == signal.SIGTERM
  assert 'SIGTERM: saving, then leaving' in capfd.readouterr().err


def test_a_wait_in_training_is_interrupted(signals):
  stop = Stop(signals, tiny_run.MESH)
  with signals.training():
    with pytest.raises(Interrupted), stop.interruptible():
      _send(signal.SIGINT, wait=30)
    assert stop.signal == signal.SIGINT
    with pytest.raises(Interrupted), stop.interruptible():
      pytest.fail('the signal came before')


def test_the_end_of_a_machine_that_jax_reports_is_taken_for_sigterm(signals, monkeypatch):
  monkeypatch.setattr(stopping.jax, 'process_count', lambda: 2)
  monkeypatch.setattr(stopping.multihost_utils, 'reached_preemption_sync_point', lambda step: step == 3)
  stop = Stop(signals, tiny_run.MESH)
  with signals.training():
    assert [stop.poll(step) for step in (1, 2, 3, 4)] == [None, None, signal.SIGTERM, signal.SIGTERM]

  def switched_off(step):
    raise RuntimeError('the service is not enabled')

  monkeypatch.setattr(stopping.multihost_utils, 'reached_preemption_sync_point', switched_off)
  assert Stop(signals, tiny_run.MESH).poll(3) is None


def test_handlers_are_restored():
  before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
  with Signals():
    assert signal.getsignal(signal.SIGTERM) not in before
  assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.parametrize(('phase', 'sent'), [('starting', 1), ('training', 2)])
def test_ends_soon_though_the_main_thread_is_in_compiled_code(phase, sent):
  """One signal is enough while there is nothing to save, the second one is in training."""
  command = [sys.executable, '-c', IN_COMPILED_CODE, phase]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
    assert process.stdout.readline() == 'deep\n'
    for _ in range(sent):
      time.sleep(0.2)
      assert process.poll() is None
      process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 143
