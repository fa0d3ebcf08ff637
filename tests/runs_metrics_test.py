import json

import pytest

from mor_jax.runs import metrics


def _write(folder, steps, last_step=0):
  with metrics.MetricsLog(folder, last_step) as log:
    for step in steps:
      log.write(step, {'train/loss': step / 10})
  return log


def test_resumed_run_has_every_step_once(tmp_path):
  _write(tmp_path, range(1, 8))
  _write(tmp_path, range(5, 10), last_step=4)
  records = metrics.read(tmp_path / 'metrics.jsonl')
  assert [record['step'] for record in records] == list(range(1, 10))
  assert records[6] == {'step': 7, 'train/loss': 0.7}


@pytest.mark.parametrize('damage', ['{"step": 5, "train/lo', '\0\0\0\0', '{"step": 5, "train/loss": \xff'])
def test_unfinished_last_line_is_dropped(tmp_path, damage):
  _write(tmp_path, range(1, 5))
  path = tmp_path / 'metrics.jsonl'
  with path.open('a') as file:
    file.write(damage)
  assert [record['step'] for record in metrics.read(path)] == [1, 2, 3, 4]
  log = _write(tmp_path, [5], last_step=4)
  assert len(log.records) == 5
  assert [json.loads(line)['step'] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5]


def test_lines_are_on_disk_at_once(tmp_path):
  """A run that is killed loses no metrics of steps it has reported."""
  with metrics.MetricsLog(tmp_path, 0) as log:
    log.write(1, {'train/loss': 1.0, 'train/seconds': 2.5})
    assert metrics.read(tmp_path / 'metrics.jsonl') == [{'step': 1, 'train/loss': 1.0, 'train/seconds': 2.5}]


def test_tensorboard_has_the_same_values(tmp_path):
  _write(tmp_path, range(1, 4))
  (events,) = (tmp_path / 'tensorboard').iterdir()
  content = events.read_bytes()
  assert content.count(b'train/loss') == 3


def test_no_file_is_no_record(tmp_path):
  assert metrics.read(tmp_path / 'metrics.jsonl') == []
