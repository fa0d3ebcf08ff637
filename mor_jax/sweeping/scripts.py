"""Writes a sweep as a shell script with one command per run, or as a SLURM job array."""

import shlex
from pathlib import Path

from mor_jax.config import ConfigError
from mor_jax.files import write_atomically
from mor_jax.sweeping.plan import Plan, PlannedRun

SLURM = """#!/usr/bin/env bash
# The unfinished runs of the sweep {sweep} of {config}, {count} jobs: in the folder of the repository, with the
# environment of mor_jax active,
#
#   sbatch [FLAGS OF SBATCH] {path}
#
# and when they have ended
#
#   {collect}
#
# Each job saves before its time is up and goes into the queue again, as launch/slurm.sbatch has it.
#SBATCH --job-name={name}
#SBATCH --array=0-{last}{limit}
#SBATCH --output={logs}/%x-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=TERM@120
# shellcheck disable=SC2016 # settings mean what they say, dollars included
set -euo pipefail
cd "${{SLURM_SUBMIT_DIR:-.}}"
case ${{SLURM_ARRAY_TASK_ID:?submit this file with sbatch}} in
{cases}
*)
  echo "error: there is no run $SLURM_ARRAY_TASK_ID" >&2
  exit 2
  ;;
esac
exec bash launch/slurm.sbatch "${{training[@]}}" "$@"
"""

SHELL = """#!/usr/bin/env bash
# The unfinished runs of the sweep {sweep} of {config}, a command a line: in the folder of the repository, with
# the environment of mor_jax active, `bash {path}`, or several at a time: `parallel -j4 <{path}`. Then
#   {collect}
"""


def write_shell(plan: Plan, runs: list[PlannedRun], collect: str) -> Path:
  """Writes sweep.sh, with one command per line."""
  path = plan.folder / 'sweep.sh'
  head = SHELL.format(sweep=plan.sweep, config=plan.config, path=path, collect=collect)
  lines = [shlex.join(['python', '-m', 'mor_jax.train', *run.words]) for run in runs]
  return _write(plan, path, head + '\n'.join(lines) + '\n')


def write_slurm(plan: Plan, runs: list[PlannedRun], parallel: int, collect: str) -> Path:
  """Writes sweep.sbatch, an array with one job per run, of which at most `parallel` run at a time (1: no limit).

  Raises:
    ConfigError: the folder's name has characters that are not allowed in #SBATCH lines.
  """
  if any(letter.isspace() or letter in '"\'%' for letter in str(plan.folder)):
    raise ConfigError(
      f'--workdir={plan.folder} cannot be named in an #SBATCH line; choose one without spaces, quotes and %'
    )
  path = plan.folder / 'sweep.sbatch'
  cases = '\n'.join(f'{index}) training=({shlex.join(run.words)}) ;;' for index, run in enumerate(runs))
  text = SLURM.format(
    sweep=plan.sweep,
    config=plan.config,
    count=len(runs),
    path=path,
    collect=collect,
    name=plan.folder.name,
    last=len(runs) - 1,
    limit=f'%{parallel}' if parallel > 1 else '',
    logs=plan.folder / 'logs',
    cases=cases,
  )
  (plan.folder / 'logs').mkdir(parents=True, exist_ok=True)  # SLURM does not make it
  return _write(plan, path, text)


def _write(plan: Plan, path: Path, text: str) -> Path:
  plan.folder.mkdir(parents=True, exist_ok=True)
  write_atomically(path, text)
  path.chmod(0o755)
  return path
