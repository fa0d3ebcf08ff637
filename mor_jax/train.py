"""Trains a model: python -m mor_jax.train --config=configs/tiny.py [--workdir=DIR] [--config.train.steps=N ...]

The run folder is --workdir, or runs/NAME. Running the same command again resumes from the newest
checkpoint; a finished run shows its result again.

The state comes from the first of these that there is:
  1. the newest good checkpoint of the run itself, so that the same command resumes;
  2. --init_from=MODEL, a vanilla model (run folder or Llama checkpoint) whose layers become the shared
     block as config.init says, with a fresh optimiser, routers and step 0 (docs/uptraining.md);
  3. random weights.
"""

import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import optax
from absl import flags
from jax.sharding import Mesh
from rich.console import Console

from mor_jax import cli
from mor_jax.checkpoints.checkpoint import Checkpoints, ever_finished
from mor_jax.config import Config, ConfigError, TrainConfig, with_changes
from mor_jax.data import live, loader, schedule
from mor_jax.evaluation import nll, result
from mor_jax.interop import pretrained
from mor_jax.model.transformer import Transformer
from mor_jax.parallel import mesh as mesh_lib
from mor_jax.parallel import runtime
from mor_jax.runs import summary
from mor_jax.runs.metrics import MetricsLog
from mor_jax.runs.progress import Progress
from mor_jax.runs.run_folder import RunFolder
from mor_jax.training import budget, distillation, loop, phases
from mor_jax.training.distillation import Teacher
from mor_jax.training.optimizer import make_optimizer
from mor_jax.training.state import TrainState, abstract_state, begin_from, initializer
from mor_jax.training.step import TrainStep, abstract_batch, make_train_step
from mor_jax.training.watch import goodput, profiling
from mor_jax.training.watch.goodput import Ledger
from mor_jax.training.watch.nonfinite import NonFiniteError
from mor_jax.training.watch.stopping import Signals, Stop
from mor_jax.training.watch.watchdog import Watchdog

FLAGS = flags.FLAGS
ROWS_NAMED = 64  # of a batch, in a message


def define_flags() -> None:
  """Defines the flags of this command."""
  flags.DEFINE_list(
    'allow_change', [], 'settings that a resumed run may change although they decide what is trained'
  )
  flags.DEFINE_string(
    'init_from', None, 'vanilla model that a new training begins from; the same as --config.init.source'
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

  Returns the exit code: 0, or 143 after SIGTERM and 130 after Ctrl-C, which save the state first.

  Raises:
    ConfigError: before anything is compiled or written.
    RunError: the training cannot go on.
  """
  profiled = profiling.parse_span(profile)
  with Signals() as signals:
    return _run(config, workdir, allow_change, profiled, signals)


def _run(
  config: Config, workdir: str | None, allow_change: Sequence[str], profiled: range, signals: Signals
) -> int:
  console = Console(quiet=not runtime.is_main())
  config = budget.with_budgeted_steps(config)
  if profiled and profiled.start > config.train.steps:
    raise ConfigError(
      f'--profile={profiled.start}:{profiled.stop} begins after the last step, {config.train.steps}'
    )
  folder = RunFolder(Path(workdir or f'runs/{config.name}'))

  ledger = Ledger(folder.goodput if runtime.is_main() else None)

  # ---- what is cheap to check comes first ----
  folder.check(config, allow_change, writes=runtime.is_main())
  config = folder.with_vocabulary(config)
  mesh = mesh_lib.make_mesh(config.parallel)
  mesh_lib.check_batch(mesh, config.train)
  mesh_lib.check_model(mesh, config.model)
  finished = folder.read_summary()
  if finished is not None:
    summary.print_table(console, 'Already finished', summary.describe_result(finished, folder.path))
    return 0

  # ---- pretrained models and data, which decide the vocabulary ----
  checkpoint_folder, mirror = folder.checkpoint_folder(config), folder.mirror(config)
  resumes = ever_finished(checkpoint_folder, mirror)
  source = None if resumes else pretrained.open_source(config)
  teacher_source = pretrained.open_teacher(config)
  if source is not None:
    config = with_changes(
      config, model={'vocab_size': config.model.vocab_size or source.weights.config.vocab_size}
    )
    pretrained.shared_weights(config, source)  # checks shapes
  dataset = loader.open_dataset(config.data, report=partial(_print, console))
  for opened in (source, teacher_source):
    if opened is not None:
      opened.check_tokenizer(config, dataset.tokenizer)
  config = _with_vocabulary(config, dataset.tokenizer.vocab_size)
  mesh_lib.check_model(mesh, config.model)
  teacher = pretrained.make_teacher(config, teacher_source)
  if runtime.is_main():
    folder.create(config, dataset)
  runtime.barrier('run folder')
  summary.print_table(console, config.name, summary.describe_run(config, mesh, dataset, folder.path))

  # ---- model and step ----
  watchdog = Watchdog(config.train.hang_seconds, config.train.exit_on_hang)
  cli.use_compilation_cache(config)
  model = Transformer(config.model)
  optimizer = make_optimizer(config.train, config.model.has_aux_router)
  initialize = initializer(model, optimizer, mesh, config.data.seq_len)
  abstract = abstract_state(initialize)
  abstract_theirs = (pretrained.abstract_teacher(teacher, mesh),) if teacher else ()

  about = folder.describe_checkpoints(config, dataset)
  report = partial(_print, console)
  with Checkpoints(
    checkpoint_folder, config.checkpoint, about, [folder.tokenizer], report, mirror=mirror
  ) as checkpoints:
    profiler = profiling.Profiler(profiled, folder.profile, report)
    guards = loop.Guards(Stop(signals, mesh, checkpoints.wants_save), watchdog, ledger, profiler)
    validate = _validator(model, config, mesh, dataset, guards)
    done = checkpoints.newest_good() or 0
    position = checkpoints.position(done) if done else None
    ledger.resume(done)
    with ledger.measure(goodput.COMPILE):
      programs = _compile(console, config, optimizer, mesh, (abstract, abstract_theirs), teacher, done)
      ledger.note_memory(max((summary.device_bytes(step) for _, step in programs), default=0))
      theirs = tuple(distillation.load_parameters(spec, teacher_source.weights) for spec in abstract_theirs)
      train_step = phases.PhasedStep(programs, done, theirs)

    # ---- state: the newest good checkpoint, else a model to begin from, else random weights ----
    if profiled and done >= profiled.start:
      _print(console, f'--profile: step {profiled.start} was trained before, so nothing is traced')
    if done:
      state = checkpoints.restore(done, abstract)
      _print(console, f'\nresuming after step {done} from {checkpoints.path(done)}')
    else:
      state = initialize(jnp.uint32(config.train.seed))
      if source is not None:
        state = begin_from(state, pretrained.shared_weights(config, source))

    # ---- training ----
    host, num_hosts = mesh_lib.data_hosts(mesh)
    batches = loader.train_batches(
      dataset,
      config.data,
      schedule.of(config.train),
      start_step=done,
      host=host,
      num_hosts=num_hosts,
      position=position,
    )
    with (
      MetricsLog(folder.path, done, writes=runtime.is_main()) as log,
      Progress(console, config.train.steps, done) as progress,
      signals.training(),
      watchdog,
    ):
      try:
        state = loop.train(
          config, mesh, state, train_step, batches, validate, checkpoints, log, progress, guards
        )
      except NonFiniteError as error:
        error.add(f'its batch had {_rows(config, dataset, error.step)}')
        error.add(_remedy(config.train))
        raise
      last = log.records[-1] if log.records else {}
      watchdog.beat('the last checkpoint')
      with ledger.measure(goodput.CHECKPOINT):
        checkpoints.wait()
      stopped = guards.stop.settle()
      ledger.write()

  if stopped:
    summary.print_rows(console, [summary.describe_time(ledger.seconds(), ledger.restarts())])
    _print(console, _describe_stop(stopped, checkpoints))
    return signals.exit_code(stopped)

  # ---- result ----
  if 'validation/nll' not in last:
    last |= validate(state.variables)
  outcome = result.of_run(config, dataset, last)
  outcome |= {'goodput': ledger.seconds(), 'restarts': ledger.restarts()}
  if config.train.sample_tokens:
    variables = runtime.on_host(state.variables)
    if runtime.is_main():
      outcome['sample'] = result.sample(model, config, dataset, variables)
  if runtime.is_main():
    folder.write_summary(outcome)
  summary.print_table(console, 'Finished', summary.describe_result(outcome, folder.path))
  return 0


def _print(console: Console, text: str) -> None:
  console.print(text, highlight=False, markup=False, soft_wrap=True)


def _describe_stop(number: int, checkpoints: Checkpoints) -> str:
  """The last line of a training that a signal ended."""
  step = checkpoints.latest_step
  where = f'saved after step {step} in {checkpoints.path(step)}' if step else 'nothing was trained yet'
  return f'{signal.Signals(number).name}: {where}; the same command resumes'


def _rows(config: Config, dataset: loader.Dataset, step: int) -> str:
  """Which rows are in the batch of a step."""
  batches = schedule.of(config.train)
  first, count = batches.rows_before(step - 1), batches.rows(step - 1)
  if isinstance(dataset, live.LiveDataset):
    return f'rows {first} to {first + count - 1} of the stream'
  rows = loader.batch_rows(dataset.manifest.splits['train'].rows, first, count, config.data.seed)
  named = ', '.join(map(str, rows[:ROWS_NAMED])) + (', ...' if count > ROWS_NAMED else '')
  return f'{count} rows of the training split: {named}'


def _remedy(train: TrainConfig) -> str:
  """What a user can do about an update that is not finite."""
  if train.on_nonfinite == 'skip':
    return f'raise train.max_skipped={train.max_skipped} to leave out more, or lower train.learning_rate'
  return 'set train.on_nonfinite=skip to leave it out, or lower train.learning_rate'


def _with_vocabulary(config: Config, tokenizer_size: int) -> Config:
  """The config with `model.vocab_size` filled in."""
  size = config.model.vocab_size or tokenizer_size
  if size < tokenizer_size:
    raise ConfigError(
      f'model.vocab_size={size} is smaller than the {tokenizer_size} entries of the tokenizer; '
      f'leave it unset or set it to at least {tokenizer_size}'
    )
  return with_changes(config, model={'vocab_size': size})


def _compile(
  console: Console,
  config: Config,
  optimizer: optax.GradientTransformation,
  mesh: Mesh,
  abstract: tuple[TrainState, tuple],
  teacher: Teacher | None,
  done: int,
) -> list[tuple[int, TrainStep]]:
  """The step of every phase that is still to come after `done` updates, compiled.

  Args:
    abstract: state, and further arguments of the step.
  """
  planned = phases.plan(config)
  programs = []
  for first, phase in phases.remaining(planned, done):
    begin = time.perf_counter()
    step = make_train_step(Transformer(phase.model), phase, optimizer, mesh, teacher)
    state, theirs = abstract
    programs.append((first, step.lower(state, abstract_batch(phase, mesh), *theirs).compile()))
    seconds = time.perf_counter() - begin
    rows = summary.describe_program(phase, *programs[-1], seconds, not_alone=len(planned) > 1)
    summary.print_rows(console, rows)
  return programs


def _validator(
  model: Transformer,
  config: Config,
  mesh: Mesh,
  dataset: loader.Dataset,
  guards: loop.Guards,
) -> Callable[[Any], dict[str, float]]:
  """Variables -> validation/nll, validation/bits_per_byte and router metrics, under top-k routing."""
  nll_step = nll.make_nll_step(model, config, mesh)
  rows = config.train.global_batch // config.train.accumulation
  split = dataset.manifest.splits['validation']

  def validate(variables: Any) -> dict[str, float]:
    batches = loader.validation_batches(dataset, rows, config.train.eval_rows, *mesh_lib.data_hosts(mesh))
    metrics = nll.evaluate(nll_step, variables, guards.over(batches), mesh)
    metrics['bits_per_byte'] = nll.bits_per_byte(metrics['nll'], split.tokens, split.bytes)
    return {f'validation/{name}': value for name, value in metrics.items()}

  return validate


if __name__ == '__main__':
  define_flags()
  cli.run(
    lambda config, workdir: main(
      pretrained.with_source(config, FLAGS.init_from), workdir, FLAGS.allow_change, FLAGS.profile
    ),
    __doc__,
    several_processes=True,
  )
