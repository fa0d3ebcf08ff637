"""Capacities chosen after training, and the thresholds that go with them."""

import json
import shutil
import subprocess
import sys

import pytest
import tiny_run

from mor_jax.config import ConfigError, with_changes
from mor_jax.evaluation import calibration, nll
from mor_jax.model.transformer import Transformer
from mor_jax.runs.restore import load_run


def batch():
  return {name: rows[:24] for name, rows in tiny_run.rows().items()}


@pytest.mark.parametrize('capacity', [0.25, 0.75])
def test_thresholds_let_as_many_tokens_in_as_top_k(capacity):
  run = tiny_run.run()
  variables, mesh = run.initial().variables, tiny_run.MESH
  config = calibration.check(run.config, (1.0, capacity))
  thresholds, rows = calibration.calibrate(config, variables, [batch()], mesh)
  assert rows == 24
  assert thresholds[0] == 0, 'a step that refuses nobody needs no threshold'
  found = calibration.Calibration((1.0, capacity), thresholds, step=0, rows=rows)
  config, variables = calibration.apply(config, variables, found)
  step = nll.make_nll_step(Transformer(config.model), config, mesh, 'threshold')
  counts = nll.run(step, variables, batch(), mesh)['counts']
  share = (counts['selected_R'] + counts['overflow_R'])[1] / counts['entered_R'][1]
  assert share == pytest.approx(capacity, abs=0.06)


def test_what_cannot_be_calibrated_is_refused():
  with pytest.raises(ConfigError, match='only expert-choice'):
    calibration.check(with_changes(tiny_run.CONFIG, model={'router': 'token_choice'}), (1.0, 0.5))
  with pytest.raises(ConfigError, match='rises'):
    calibration.check(tiny_run.CONFIG, (0.5, 1.0))


def command(*flags):
  program = [sys.executable, '-m', 'mor_jax.calibrate', *flags]
  return subprocess.run(program, capture_output=True, text=True, check=False)


def test_command_stores_what_it_finds_with_the_run(finished_run, tmp_path):
  run = shutil.copytree(finished_run[1], tmp_path / 'run')
  done = command(f'--checkpoint={run}', '--capacities=1,0.25', '--rows=16', '--eval_rows=16')
  assert done.returncode == 0, done.stderr
  assert '1.000 0.250' in done.stdout
  [stored] = calibration.read(run / 'calibrations.json')
  assert (stored.capacities, stored.step, stored.rows) == ((1.0, 0.25), 20, 16)
  calibration.store(run / 'calibrations.json', calibration.Calibration((1.0, 0.25), (0.0, 3.0), 20, 8))
  assert [entry.rows for entry in calibration.read(run / 'calibrations.json')] == [8]


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--capacities=1,0.5'], '--checkpoint is missing'),
    (['--checkpoint=RUN', '--capacities=1,x'], 'must be numbers separated by commas'),
    (['--checkpoint=RUN', '--capacities=1,0.5,0.2'], 'has 3 entries'),
    (['--checkpoint=nowhere', '--capacities=1,0.5'], 'is not the folder of a run'),
    (['--checkpoint=RUN', '--capacities=1,0.5', '--rows=0'], '--rows=0'),
  ],
)
def test_bad_flags(finished_run, flags, message):
  done = command(*(flag.replace('RUN', str(finished_run[1])) for flag in flags))
  assert done.returncode == 2
  assert message in done.stderr
  assert 'Traceback' not in done.stderr
  assert not (finished_run[1] / 'calibrations.json').exists()


def test_a_run_is_opened_with_its_newest_variables(finished_run):
  run = load_run(finished_run[1])
  summary = json.loads((finished_run[1] / 'summary.json').read_text())
  assert run.step == 20

  assert run.config.model.vocab_size == 257
  assert summary['steps'] == run.step
