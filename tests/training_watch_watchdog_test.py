import subprocess
import sys
import time

import pytest

from mor_jax.training.watch.watchdog import Watchdog

HANGING = """
import sys, time
from mor_jax.training.watch.watchdog import Watchdog

def a_step_that_never_ends():
  time.sleep(30)

with Watchdog(0.3, exits=True) as watchdog:
  for step in range(4):
    watchdog.beat(f'step {step}')
    time.sleep(0.1)
  a_step_that_never_ends()
"""


def test_a_hang_shows_the_stacks_and_ends_with_70():
  done = subprocess.run([sys.executable, '-c', HANGING], capture_output=True, text=True, timeout=20)
  assert done.returncode == 70
  assert 'hang: step 3 takes more than 0 s; the process ends with exit code 70' in done.stderr
  assert 'in a_step_that_never_ends' in done.stderr


def test_tells_again_but_lets_the_process_be(capfd):
  with Watchdog(0.2) as watchdog:
    watchdog.beat('step 1')
    time.sleep(0.5)
    assert capfd.readouterr().err.count('hang: step 1 takes') == 2
    watchdog.beat('step 2')
    time.sleep(0.1)
    assert capfd.readouterr().err == ''


@pytest.mark.parametrize('limit', [0, 0.2])
def test_quiet_while_paused_or_off(capfd, limit):
  with Watchdog(limit, exits=True) as watchdog, watchdog.paused():
    time.sleep(0.4)
  assert capfd.readouterr().err == ''


def test_the_first_of_many_may_take_its_time(capfd):
  """It compiles a program; the others are limited, and the end of the last one starts nothing new."""
  with Watchdog(0.2) as watchdog:
    for item in watchdog.over(range(3), 'a batch'):
      time.sleep(0.3 if item != 2 else 0.0)
  err = capfd.readouterr().err
  assert err.count('hang: a batch takes') == 1
