import json
import time

import pytest

from mor_jax.runs.summary import describe_time
from mor_jax.training.watch import goodput
from mor_jax.training.watch.goodput import KINDS, Ledger


def test_every_moment_counts_once(monkeypatch):
  now = [50.0]
  monkeypatch.setattr(goodput.time, 'perf_counter', lambda: now[0])

  def wait(seconds):
    now[0] += seconds

  ledger = Ledger()
  wait(2)
  with ledger.measure(goodput.STEPS):
    wait(1)
    with ledger.measure(goodput.VALIDATION):
      wait(3)
    wait(1)
  wait(4)
  seconds = {kind: value for kind, value in ledger.seconds().items() if value}
  assert seconds == {'start_up': 6, 'steps': 2, 'validation': 3}


def _note(saved: list, **seconds: float) -> dict:
  zeros = dict.fromkeys(KINDS, 0.0)
  return {'seconds': zeros | seconds, 'saved': [[step, zeros | before] for step, before in saved]}


def test_work_behind_the_step_resumed_from_is_lost(tmp_path):
  """The first process got to step 30 or so, of which 20 were saved; the second died before it saved anything."""
  first = _note(
    [(0, {}), (10, {'steps': 100, 'data_wait': 2}), (20, {'steps': 200, 'data_wait': 4})], steps=310.0
  )
  first['seconds'] |= {'start_up': 7.0, 'compile': 50.0, 'data_wait': 9.0, 'checkpoint': 1.0}
  second = _note([(20, {'start_up': 5})], start_up=5.0, steps=33.0)
  path = tmp_path / 'goodput.json'
  path.write_text(json.dumps([first, second]))

  for _ in range(2):  # another restart from there finds the same
    ledger = Ledger(path)
    ledger.resume(20)
    seconds = ledger.seconds()
    assert seconds['lost'] == pytest.approx((310 - 200) + (9 - 4) + 33)
    assert (seconds['steps'], seconds['data_wait'], seconds['checkpoint']) == (200, 4, 1)
    assert seconds['compile'] == 50
    assert seconds['start_up'] == pytest.approx(12, abs=0.1)
  assert ledger.restarts() == 3

  ledger.resume(10)  # the newest checkpoint was damaged
  assert ledger.seconds()['lost'] == pytest.approx(148 + 100 + 2)


def test_notes_outlive_a_kill_but_not_the_training_a_full_disk(tmp_path):
  ledger = Ledger(tmp_path / 'goodput.json')
  ledger.resume(0)
  with ledger.measure(goodput.STEPS):
    time.sleep(0.02)
    ledger.saved(5)
  again = Ledger(tmp_path / 'goodput.json')
  again.resume(5)
  assert again.seconds()['steps'] == pytest.approx(0.02, abs=0.01)
  assert again.seconds()['lost'] < 0.01
  lost_folder = Ledger(tmp_path / 'missing' / 'goodput.json')
  lost_folder.resume(0)


def test_a_line_for_the_user():
  seconds = dict.fromkeys(KINDS, 0.0) | {'steps': 900.0, 'data_wait': 100.0}
  label, text = describe_time(seconds, restarts=2)
  assert label == 'time'
  assert text.startswith('1,000 s in 3 processes: start up 0.0%, compile 0.0%, data wait 10.0%, steps 90.0%')
