"""Trains a model: python -m mor_jax.train --config=configs/tiny.py [--workdir=DIR] [--config.train.steps=N ...]

The run folder is --workdir, or runs/NAME. Running the same command again resumes from the newest
checkpoint; a finished run shows its result again.

The state comes from the first of these that exists:
  1. the newest good checkpoint of the run itself, so that the same command resumes;
  2. --init_from=MODEL, with a fresh optimiser and step 0: a vanilla model (run, or checkpoint of Hugging Face)
     whose layers become the shared block as config.init says, with fresh routers; or a run of this very
     model, routers included, to be trained on other text (docs/uptraining.md);
  3. random weights.
"""

from collections.abc import Sequence

from absl import flags

from mor_jax import cli
from mor_jax.config import Config
from mor_jax.interop import pretrained
from mor_jax.recipes import stages
from mor_jax.training.watch.stopping import Signals
from mor_jax.training.watch.watchdog import Watchdog

FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines the flags of this command."""
  flags.DEFINE_list(
    'allow_change', [], 'settings that a resumed run may change although they decide what is trained'
  )
  flags.DEFINE_string(
    'init_from',
    None,
    'vanilla model, or run of the same model, that a new training begins from; the same as --config.init.source',
  )
  flags.DEFINE_string(
    'profile', None, 'START:STOP: trace these steps, STOP left out, into profile/ of the run folder'
  )


def main(
  config: Config, workdir: str | None, allow_change: Sequence[str] = (), profile: str | None = None
) -> int:
  """Trains, or resumes, or shows the result of a finished run.

  Args:
    config: resolved settings.
    workdir: the run folder; None: runs/NAME.
    allow_change: settings in which a resumed run may differ although they decide what is trained.
    profile: START:STOP, steps to trace.

  Returns the exit code: 0, or what says that the state was saved early: 143 after SIGTERM, 130 after Ctrl-C, 129 and
  131 after SIGHUP and SIGQUIT, 141 when nobody reads the output any more.

  Raises:
    ConfigError: before anything is compiled or written.
    RunError: the training cannot go on.
  """
  with Signals() as signals:
    # ---- settings, folder ----
    run = stages.open_run(config, workdir, allow_change, profile, signals.output_lost)
    if stages.show_earlier_result(run):
      return 0
    with stages.alone(run):
      # ---- data, model and step, state, loop ----
      run, inputs = stages.open_inputs(run)
      watchdog = Watchdog(config.train.hang_seconds, config.train.exit_on_hang)
      cli.use_compilation_cache(run.config)
      with run.folder.checkpoints(run.config, inputs.dataset, run.report) as checkpoints:
        training = stages.Training(run, inputs, checkpoints)
        train_step = training.compile_step()
        state = training.first_state()
        state, last, stopped = training.train(train_step, state, signals, watchdog)

      # ---- result ----
      if stopped:
        stages.say_stopped(run, checkpoints, stopped)
        return signals.exit_code(stopped)
      stages.write_result(run, inputs, state, last, training.order)
      return 0


if __name__ == '__main__':
  define_flags()
  cli.run(
    lambda config, workdir: main(
      pretrained.with_source(config, FLAGS.init_from), workdir, FLAGS.allow_change, FLAGS.profile
    ),
    __doc__,
    several_processes=True,
  )
