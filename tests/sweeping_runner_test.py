"""Running a sweep: all runs, some at a time, whatever becomes of them; with a training that is a stand-in."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from mor_jax.errors import RunError
from mor_jax.sweeping import plan as plan_lib
from mor_jax.sweeping import results, runner
from mor_jax.sweeping.status import Display

ROOT = Path(__file__).parents[1]
STAND_IN = (sys.executable, str(ROOT / 'tests' / 'stand_in_train.py'))
SWEEP = """
from mor_jax.sweeping import axes

def get_sweep(base):
  good = axes.product([{'name': 'a'}, {'name': 'b', 'model.kind': 'vanilla'}], axes.grid({'train.seed': (0, 1, 2)}))
  return good + [{'name': 'bad', 'train.learning_rate': 1e9}] * BAD
"""
RUN = """
import sys
from rich.console import Console
from mor_jax.sweeping import plan, runner
from mor_jax.sweeping.status import Display
made = plan.read(sys.argv[1], {}, sys.argv[2], sys.argv[3])
training = runner.Runner(made, Display(Console(), made), train=sys.argv[4:])
sys.exit(128 + (training.run() or -128))
"""


@pytest.fixture
def planned(tmp_path):
  """Plans a sweep of six runs and, if asked, one that fails."""

  def planned(bad: bool = False) -> plan_lib.Plan:
    (tmp_path / 'sweep.py').write_text(SWEEP.replace('BAD', str(int(bad))))
    tiny = str(ROOT / 'configs' / 'tiny.py')
    return plan_lib.read(tiny, {}, str(tmp_path / 'sweep.py'), str(tmp_path / 'sweep'))

  return planned


def train(plan, speed: float = 0.01, **options) -> runner.Runner:
  training = runner.Runner(
    plan, Display(Console(quiet=True), plan), train=(*STAND_IN, f'--step_seconds={speed}'), **options
  )
  assert training.run() is None
  return training


def begin(plan, speed: float) -> subprocess.Popen:
  """A sweep in a process of its own."""
  words = [plan.config, plan.sweep, str(plan.folder), *STAND_IN, f'--step_seconds={speed}']
  return subprocess.Popen([sys.executable, '-c', RUN, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def wait_for(condition, seconds: float = 60.0) -> None:
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, 'waited too long'
    time.sleep(0.02)


def starts(plan) -> dict[str, int]:
  files = {run.name: run.folder.path / 'starts' for run in plan.runs}
  return {name: len(file.read_text().splitlines()) if file.exists() else 0 for name, file in files.items()}


def finished(plan) -> list[str]:
  return [run.name for run in plan.runs if run.folder.read_summary()]


def steps(run) -> list[int]:
  return [json.loads(line)['step'] for line in run.folder.metrics.read_text().splitlines()]


def test_failures_are_recorded_and_the_rest_goes_on(planned):
  plan = planned(bad=True)
  training = train(plan, parallel=3)
  assert finished(plan) == [run.name for run in plan.runs[:6]]
  assert training.status['bad'].state == 'failed'
  assert training.status['bad'].error.splitlines()[-1] == 'error: loss is nan'
  stored = {entry['name']: entry for entry in json.loads((plan.folder / 'sweep.json').read_text())['runs']}
  assert (stored['bad']['status'], stored['bad']['exit_code']) == ('failed', 1)
  assert stored['a,seed=1']['status'] == 'finished'
  assert stored['b,seed=2']['overrides'] == {'model.kind': 'vanilla', 'train.seed': 2}
  text = results.write(plan, runner.read_status(plan))
  assert 'bad, exit code 1' in text
  assert 'error: loss is nan' in text

  before = starts(plan)
  train(plan, parallel=3)
  assert starts(plan) == before | {'bad': before['bad'] + 1}, 'only what failed is tried again'


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_signal_reaches_the_trainings_and_the_next_sweep_goes_on(planned, number):
  plan = planned()
  first = plan.runs[1].folder.metrics
  sweep = begin(plan, speed=0.05)
  wait_for(first.exists)
  sweep.send_signal(number)
  assert sweep.wait(30) == 128 + number
  assert finished(plan) == ['a,seed=0']
  assert runner.read_status(plan)['a,seed=1'].state == 'unfinished'
  assert 0 < len(steps(plan.runs[1])) < 20
  train(plan)
  assert finished(plan) == [run.name for run in plan.runs]
  assert starts(plan) == {run.name: 1 for run in plan.runs} | {'a,seed=1': 2}
  assert steps(plan.runs[1]) == list(range(1, 21)), 'it must have resumed'


def test_killed_sweep_waits_for_the_training_that_outlived_it(planned):
  plan = planned()
  sweep = begin(plan, speed=0.05)
  wait_for(plan.runs[1].folder.metrics.exists)
  sweep.kill()
  sweep.wait()
  train(plan)
  assert finished(plan) == [run.name for run in plan.runs]
  assert starts(plan) == {run.name: 1 for run in plan.runs}, 'no run was started twice'
  assert all(steps(run) == list(range(1, 21)) for run in plan.runs)


def test_second_sweep_in_the_same_folder_is_refused(planned):
  plan = planned()
  sweep = begin(plan, speed=0.05)
  wait_for(plan.runs[0].folder.metrics.exists)
  with pytest.raises(RunError, match=r'another sweep is running in '):
    train(plan)
  sweep.terminate()
  assert sweep.wait(30) == 128 + signal.SIGTERM


def test_runs_at_a_time_have_cores_and_gpus_of_their_own(planned):
  cores = sorted(os.sched_getaffinity(0))
  if len(cores) < 2:
    pytest.skip('one core cannot be shared')
  plan = planned()
  train(plan, parallel=2, gpus=('0', '1', '2', '3'))
  logs = [plan.log(run).read_text() for run in plan.runs]
  half = len(cores) // 2
  places = {(log.splitlines()[0].partition(' on ')[2], log.splitlines()[1]) for log in logs}
  assert places == {(f'cores {cores[:half]}', 'GPUs 0,1'), (f'cores {cores[half : 2 * half]}', 'GPUs 2,3')}


def test_table_has_means_and_deviations_over_seeds(planned):
  plan = planned()
  train(plan, parallel=3)
  table = results.of_runs(plan, runner.read_status(plan))
  assert [row['validation_nll'] for row in table.rows] == [2, 3, 4, 2, 3, 4]
  assert [row['model.kind'] for row in table.rows] == ['mor'] * 3 + ['vanilla'] * 3
  assert {row['seconds'] for row in table.rows} == {4.0}
  rows = results.over_seeds(plan).rows
  assert [(row['runs'], row['finished']) for row in rows] == [('a', 3), ('b', 3)]
  assert (rows[0]['validation_nll_mean'], rows[0]['validation_nll_std']) == (3.0, 1.0)
  text = results.write(plan, runner.read_status(plan))
  assert '3.0000 ± 1.0000' in text
  assert 'different tokenizers' in text, 'a and b have tokenizers of their own'
  assert 'perplexity' in (plan.folder / 'results.csv').read_text().splitlines()[0]
  assert len((plan.folder / 'results_over_seeds.csv').read_text().splitlines()) == 3
