"""Sweeps as scripts: a list of commands that a shell reads as they are meant, and an array of SLURM jobs."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from mor_jax.config import ConfigError
from mor_jax.sweeping import plan as plan_lib
from mor_jax.sweeping import scripts

ROOT = Path(__file__).parents[1]
SWEEP = """
def get_sweep(base):
  return [{'train.sample_prompt': "it's $HOME", 'name': 'a'}, {'train.seed': 1, 'name': 'b'}]
"""


@pytest.fixture
def plan(tmp_path):
  (tmp_path / 'sweep.py').write_text(SWEEP)
  return plan_lib.read('configs/tiny.py', {}, str(tmp_path / 'sweep.py'), str(tmp_path / 'sweep'))


def test_shell_list_has_a_command_a_run(plan):
  path = scripts.write_shell(plan, list(plan.runs), 'collect')
  commands = [line for line in path.read_text().splitlines() if not line.startswith('#')]
  assert [tuple(shlex.split(command)) for command in commands] == [
    ('python', '-m', 'mor_jax.train', *run.words) for run in plan.runs
  ]


@pytest.mark.parametrize('index', [0, 1])
def test_every_job_of_the_array_trains_its_run(plan, index):
  path = scripts.write_slurm(plan, list(plan.runs), 4, 'collect')
  assert '#SBATCH --array=0-1%4\n' in path.read_text()
  done = job(path, str(index))
  assert done.returncode == 0, done.stderr
  command = shlex.split(done.stdout.splitlines()[0])
  assert command[-len(plan.runs[index].words) :] == list(plan.runs[index].words)
  assert command[0] == 'srun'


def test_job_without_a_run_is_refused(plan):
  done = job(scripts.write_slurm(plan, list(plan.runs), 1, 'collect'), '2')
  assert done.returncode == 2
  assert 'there is no run 2' in done.stderr


def test_array_script_is_clean(plan):
  path = scripts.write_slurm(plan, list(plan.runs), 1, 'collect')
  done = subprocess.run(['shellcheck', str(path)], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout


def test_folder_that_slurm_cannot_name_is_refused(tmp_path):
  (tmp_path / 'sweep.py').write_text(SWEEP)
  spaced = plan_lib.read('configs/tiny.py', {}, str(tmp_path / 'sweep.py'), str(tmp_path / 'a b'))
  with pytest.raises(ConfigError, match=r'cannot be named in an #SBATCH line'):
    scripts.write_slurm(spaced, list(spaced.runs), 1, 'collect')


def job(path: Path, index: str) -> subprocess.CompletedProcess:
  environment = {**os.environ, 'SLURM_ARRAY_TASK_ID': index, 'SLURM_SUBMIT_DIR': str(ROOT)}
  return subprocess.run(
    ['bash', str(path), '--dry_run'], env=environment, capture_output=True, text=True, check=False
  )
