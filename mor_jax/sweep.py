"""Trains a model in many ways: python -m mor_jax.sweep --config=configs/tiny.py --sweep=configs/sweeps/router.py

The sweep file's `get_sweep(base)` lists overrides of the settings; each makes a run, in its own process and
folder. Giving the same command again goes on where it ended: finished runs are left alone, unfinished ones
resume, failed ones are tried again. Ends with a table (results.md, results.csv) and the report of all runs
in --workdir, by default runs/sweep-NAME. Both files are Python, and run as such: use only those that you trust.

  --parallel=4                 four runs at a time, each on its share of the cores
  --parallel=2 --gpus=0,1,2,3  two runs at a time, on two GPUs each
  --write=slurm                an array of SLURM jobs instead (shell: a list of commands)
  --write=results              table and report of what has finished, without training
"""

import importlib.util
import shlex
import sys
from functools import partial
from pathlib import Path

from absl import flags
from rich.console import Console

from mor_jax import cli
from mor_jax.config import Config, ConfigError
from mor_jax.console import open_console, print_line
from mor_jax.sweeping import plan as plan_lib
from mor_jax.sweeping import results, runner, scripts
from mor_jax.sweeping.status import Display, Status
from mor_jax.units import quantity

FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines the flags of this command."""
  flags.DEFINE_string('sweep', None, 'what to vary, a file with get_sweep(base): PATH or PATH:VARIANT')
  flags.DEFINE_integer(
    'parallel', 1, 'runs at a time; with --write=slurm the most jobs at a time, 1: no limit'
  )
  flags.DEFINE_list('gpus', [], 'GPUs to share among the runs at a time; default: each run sees all')
  flags.DEFINE_enum(
    'write',
    None,
    ['shell', 'slurm', 'results'],
    'do not train, but write: shell, sweep.sh; slurm, sweep.sbatch; results, table and report',
  )
  flags.DEFINE_list(
    'allow_change',
    [],
    'settings in which runs may go on differently although they decide what is trained; train.steps lets '
    'finished runs train on',
  )
  flags.DEFINE_integer('report_tokens', 4096, 'validation tokens whose depths the report looks at; 0: none')


def main(_: Config, workdir: str | None) -> int:
  """Trains all runs, or writes what --write names. Raises ConfigError before anything is written.

  Returns the exit code: 0, or 1 if a run failed, or 128 and the number of the signal that ended it.
  """
  _check_flags()
  plan = plan_lib.read(FLAGS.config, cli.overrides(), FLAGS.sweep, workdir, FLAGS.allow_change)
  console = open_console()
  status = runner.read_status(plan)
  _describe(console, plan, status)
  if FLAGS.write in ('shell', 'slurm'):
    return _write_script(console, plan, status)
  if FLAGS.write is None:
    training = runner.Runner(plan, Display(console, plan), FLAGS.parallel, FLAGS.gpus)
    ended_by = training.run()
    status = training.status
    if ended_by:
      finished = sum(one.state == 'finished' for one in status.values())
      print_line(console, f'stopped: {finished} of {len(plan.runs)} runs finished; the same command goes on')
      return 128 + ended_by
  print_line(console, f'\n{results.write(plan, status)}')
  print_line(console, f'wrote {plan.folder / "results.md"} and results.csv')
  _report(console, plan)
  return int(any(one.state == 'failed' for one in status.values()))


def _check_flags() -> None:
  if not FLAGS.sweep:
    raise ConfigError('--sweep is missing: name a file, for example --sweep=configs/sweeps/router.py')
  cli.check_least(parallel=1, report_tokens=0)
  if FLAGS.gpus and FLAGS.write:
    raise ConfigError(f'--gpus={",".join(FLAGS.gpus)} is for runs on this machine; leave it out with --write')
  if len(FLAGS.gpus) % FLAGS.parallel:
    raise ConfigError(
      f'--gpus={",".join(FLAGS.gpus)} names {len(FLAGS.gpus)} devices, which --parallel={FLAGS.parallel} runs '
      f'cannot share equally'
    )
  if FLAGS.parallel > 1 and FLAGS.write in ('shell', 'results'):
    raise ConfigError(f'--parallel={FLAGS.parallel} has no effect with --write={FLAGS.write}; leave it out')


def _describe(console: Console, plan: plan_lib.Plan, status: dict[str, Status]) -> None:
  states = [one.state for one in status.values()]
  counts = ', '.join(f'{states.count(state)} {state}' for state in dict.fromkeys(states))
  tokens, work = sum(run.tokens for run in plan.runs), sum(run.work for run in plan.runs)
  print_line(
    console, f'{plan.sweep} of {plan.config}: {len(plan.runs)} runs ({counts}), {quantity(tokens)} tokens'
  )
  print_line(console, f'  varies        {", ".join(plan.axes)}')
  print_line(console, f'  compute       {quantity(work)}FLOPs forward, as the paper counts')
  print_line(console, f'  workdir       {plan.folder}')


def _write_script(console: Console, plan: plan_lib.Plan, status: dict[str, Status]) -> int:
  runs = [run for run in plan.runs if status[run.name].state != 'finished']
  if not runs:
    print_line(console, 'all runs have finished; --write=results shows them')
    return 0
  words = [word for word in sys.argv[1:] if not word.startswith(('--write', '--parallel'))]
  collect = shlex.join(['python', '-m', 'mor_jax.sweep', *words, '--write=results'])
  if FLAGS.write == 'shell':
    path = scripts.write_shell(plan, runs, collect)
  else:
    path = scripts.write_slurm(plan, runs, FLAGS.parallel, collect)
  print_line(console, f'wrote {path}: {len(runs)} runs; how to use it stands in it')
  return 0


def _report(console: Console, plan: plan_lib.Plan) -> None:
  """The page of all runs that have something to show."""
  shown = [str(run.folder.path) for run in plan.runs if run.folder.metrics.exists()]
  if importlib.util.find_spec('matplotlib') is None:
    print_line(console, "no report, which needs matplotlib: pip install 'mor_jax[report]'")
  elif not shown:
    print_line(console, 'no report, since no run has metrics')
  else:
    from mor_jax.reporting import build  # matplotlib is an optional extra

    output = Path(plan.folder / 'report.html')
    build.write_page(shown, output, FLAGS.report_tokens, partial(print_line, console))


if __name__ == '__main__':
  define_flags()
  cli.run(main, __doc__)
