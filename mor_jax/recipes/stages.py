"""The stages of a training, in the order in which `train.py` goes through them."""

import contextlib
import dataclasses
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import Mesh
from rich.console import Console

from mor_jax.checkpoints.checkpoint import Checkpoints
from mor_jax.config import Config, ConfigError
from mor_jax.console import open_console, print_line, print_rows, print_table
from mor_jax.data import loader, schedule
from mor_jax.data.conventions import Conventions
from mor_jax.evaluation import result
from mor_jax.evaluation.validation import make_validation
from mor_jax.interop import inputs, pretrained
from mor_jax.interop.inputs import Inputs
from mor_jax.model.transformer import Transformer
from mor_jax.parallel import device_memory, runtime
from mor_jax.parallel import mesh as mesh_lib
from mor_jax.runs import lock, summary
from mor_jax.runs.metrics import MetricsLog, Record
from mor_jax.runs.progress import Progress
from mor_jax.runs.run_folder import RunFolder, code_version
from mor_jax.training import benefit, budget, handover, loop, phases, trainable
from mor_jax.training.state import TrainState, abstract_state, begin_from
from mor_jax.training.watch import goodput, nonfinite, profiling
from mor_jax.training.watch.stopping import Signals, Stop
from mor_jax.training.watch.watchdog import Watchdog
from mor_jax.units import megabytes

_WHAT_IS_TRAINED = {'train.trainable', 'train.stages'}


@dataclasses.dataclass(frozen=True)
class Run:
  """A training that may begin: nothing is read, compiled or written yet.

  Attributes:
    config: resolved, with the number of steps.
    folder: its folder, which holds nothing or this very run.
    mesh: its devices, over which batches and model can be split.
    allowed: settings that may differ from those of the run so far.
    traced: steps to profile.
    ledger: where the time goes.
    console: what the user sees; nothing but on the main process.
  """

  config: Config
  folder: RunFolder
  mesh: Mesh
  allowed: Sequence[str]
  traced: range
  ledger: goodput.Ledger
  console: Console

  def report(self, text: str) -> None:
    """Shows a line to the user."""
    print_line(self.console, text)


def open_run(
  config: Config,
  workdir: str | None,
  allow_change: Sequence[str],
  profile: str | None,
  lost: Callable[[], None],
) -> Run:
  """Checks what is cheap to check: settings, folder, devices.

  Args:
    lost: called once when nobody reads the output any more; the others, and errors, as in `train.main`.
  """
  config = budget.with_budgeted_steps(config)
  trainable.check(config)
  place = workdir or f'runs/{config.name}'
  asked = {'workdir': str(place), 'allow_change': sorted(allow_change), 'profile': profile}
  code = {'code': code_version(), 'jax': jax.__version__}
  runtime.require_agreement({**traverse_util.flatten_dict(config.to_dict(), sep='.'), **asked, **code})
  traced = profiling.parse_span(profile, config.train.steps)
  folder, is_main = RunFolder(Path(place)), runtime.is_main()
  ledger = goodput.Ledger(folder.goodput if is_main else None)
  folder.check(config, allow_change, writes=is_main)
  config = folder.with_vocabulary(config)
  mesh = mesh_lib.make_checked_mesh(config.parallel, config.model, config.train)
  micro_rows = config.train.global_batch // config.train.accumulation
  benefit.check_rows(config.model, micro_rows, mesh_lib.row_shards(mesh))
  return Run(config, folder, mesh, allow_change, traced, ledger, open_console(quiet=not is_main, lost=lost))


def show_earlier_result(run: Run) -> bool:
  """Whether the run has finished all its steps before; then the user sees its result."""
  finished = run.folder.read_summary() if run.folder.is_finished(run.config) else None
  if finished is not None:
    print_table(run.console, 'Already finished', summary.describe_result(finished, run.folder.path))
  return finished is not None


@contextlib.contextmanager
def alone(run: Run) -> Iterator[None]:
  """No other process trains in the run's folder, nor writes to its checkpoints. Raises ConfigError if one does."""
  with contextlib.ExitStack() as stack:
    if runtime.is_main():
      stack.enter_context(lock.exclusive(run.folder.path, 'workdir'))
      folder = run.config.checkpoint.folder
      if folder and '://' not in folder:
        stack.enter_context(lock.exclusive(Path(folder).absolute(), 'checkpoint.folder'))
    yield


def open_inputs(run: Run) -> tuple[Run, Inputs]:
  """Data and pretrained models, and the run with the vocabulary that they decide; writes the run's folder."""
  given = inputs.open_inputs(run.config, run.folder.has_checkpoint(run.config), run.report)
  run = dataclasses.replace(run, config=given.config)
  runtime.require_agreement(given.dataset.identity())
  mesh_lib.check_model(run.mesh, run.config.model)
  if runtime.is_main():
    run.folder.create(run.config, given.dataset, _conventions(given))
  runtime.barrier('run folder')
  trained = handover.describe(run.config, run.mesh)
  begun = given.source and pretrained.describe(run.config, given.source)
  described = summary.describe_run(run.config, run.mesh, given.dataset, run.folder.path, trained, begun)
  print_table(run.console, run.config.name, described)
  if warning := summary.warn_of_repetition(run.config, given.dataset):
    run.report(warning)
  return run, given


def _conventions(given: Inputs) -> Conventions | None:
  """What the model will say of its texts: as the one that it begins with, and the template of its conversations."""
  conventions = given.source and given.source.conventions
  if given.dataset.manifest.chat is None:
    return conventions
  end, longest = given.dataset.tokenizer.end_of_text, given.config.data.seq_len
  return (conventions or Conventions((end,), longest)).with_chats(given.dataset.manifest.chat)


class Training:
  """Model, optimiser and compiled steps of a run, after `done` updates.

  Attributes:
    done: updates that the newest good checkpoint has.
    order: rows of every step, those that were read before the run was resumed included.
  """

  def __init__(self, run: Run, given: Inputs, checkpoints: Checkpoints):
    """Finds out how far the run is, and makes the model; compiles nothing yet."""
    self._run, self._given, self._checkpoints = run, given, checkpoints
    config, self._mesh = run.config, run.mesh
    self._model = Transformer(config.model)
    self.done = checkpoints.newest_good() or 0
    self._initialize = handover.initializer_after(config, self._mesh, self.done)
    self._shapes = abstract_state(self._initialize)
    self.order, self._position, self._renews = schedule.of(config.train), None, False
    if self.done:
      self._check_checkpoint()
      self._position = checkpoints.position(self.done)
      self.order = self.order.resumed(self.done, checkpoints.manifest(self.done).get('rows_read'))
    run.ledger.resume(self.done)

  def _check_checkpoint(self) -> None:
    run, where = self._run, self._checkpoints.path(self.done)
    run.folder.check_checkpoint(self._checkpoints.manifest(self.done), run.config, run.allowed)
    if self.done > run.config.train.steps:
      raise ConfigError(
        f'train.steps={run.config.train.steps} is less than the {self.done} steps after which {where} was saved; set '
        f'it to at least as many, or begin a new run in another --workdir'
      )
    self._renews = bool(_WHAT_IS_TRAINED & set(run.allowed)) and not self._checkpoints.has_shapes(
      self.done, 'opt_state', self._shapes.opt_state
    )
    self._checkpoints.check_shapes(self.done, self._shapes, 'opt_state' if self._renews else None)

  def compile_step(self) -> phases.PhasedStep:
    """The optimiser step, compiled for every phase that is still to come."""
    run, programs = self._run, []
    with run.ledger.measure(goodput.COMPILE):
      for program in phases.compile_remaining(
        run.config,
        self._mesh,
        self._shapes,
        self._given.teacher,
        self.done,
        loader.train_arrays(self._given.dataset),
      ):
        first, config, step, seconds, is_only, optimizer_bytes, _ = program
        rows = summary.describe_program(config, first, step, seconds, is_only, optimizer_bytes)
        print_rows(run.console, rows)
        run.ledger.note_memory(summary.device_bytes(step))
        _require_memory(run, step)
        programs.append(program)
      theirs = pretrained.load_teacher(self._given.teacher, self._given.teacher_source, self._mesh)
    return phases.PhasedStep(programs, self.done, theirs)

  def first_state(self) -> TrainState:
    """The state to go on from: the newest good checkpoint, else a model to begin from, else random weights."""
    run, source = self._run, self._given.source
    if self.done:
      state = self._restored()
      run.report(f'\nresuming after step {self.done} from {self._checkpoints.path(self.done)}')
    else:
      state = self._initialize(jnp.uint32(run.config.train.seed))
      if source is not None:
        state = begin_from(state, pretrained.initial_weights(run.config, source))
    if runtime.is_main():
      run.folder.go_on(run.config)  # not before: a change that fails leaves the run as it was
    return state

  def _restored(self) -> TrainState:
    if not self._renews:
      return self._checkpoints.restore(self.done, self._shapes)
    self._run.report('other parameters are trained than before: the moments of the optimiser begin anew')
    kept = {field.name: getattr(self._shapes, field.name) for field in dataclasses.fields(TrainState)}
    del kept['opt_state']
    found = self._checkpoints.restore_parts(
      self.done, {name: part for name, part in kept.items() if part != {}}
    )
    state = self._shapes.replace(opt_state=None, **found)
    return handover.renewed(self._run.config, self._mesh, self.done, state)

  def train(
    self, train_step: phases.PhasedStep, state: TrainState, signals: Signals, watchdog: Watchdog
  ) -> tuple[TrainState, Record, int | None]:
    """The training itself: the last state, saved; metrics of the last step; the signal that ended it, if one did."""
    run, checkpoints, dataset = self._run, self._checkpoints, self._given.dataset
    config, order = run.config, self.order
    profiler = profiling.Profiler(run.traced, run.folder.profile, run.report, self.done)
    guards = loop.Guards(Stop(signals, self._mesh, checkpoints.wants_save), watchdog, run.ledger, profiler)
    validate = make_validation(self._model, config, self._mesh, dataset, guards.over)
    host, num_hosts = mesh_lib.data_hosts(self._mesh)
    place = {'start_step': self.done, 'host': host, 'num_hosts': num_hosts, 'position': self._position}
    batches = loader.train_batches(dataset, config.data, order, **place)
    with (
      nonfinite.explained(config.train, partial(loader.describe_batch, dataset, order, config.data.seed)),
      MetricsLog(run.folder.path, self.done, runtime.is_main(), run.report) as log,
      Progress(run.console, config.train.steps, self.done) as progress,
      signals.training(),
      watchdog,
    ):
      state = loop.train(
        config, self._mesh, state, train_step, order, batches, validate, checkpoints, log, progress, guards
      )
      last = log.records[-1] if log.records else {}
      stopped = guards.finish(checkpoints)
    if not stopped and 'validation/nll' not in last:  # a run that ended between its last step and its result
      last |= validate(state.variables)
    return state, last, stopped


def _require_memory(run: Run, compiled: Any) -> None:
  """Raises ConfigError on all processes if a compiled step needs more memory than a device of one of them has."""
  free = device_memory.free(list(run.mesh.devices.flat))
  needed, state = summary.device_bytes(compiled), summary.state_bytes(compiled)
  if runtime.anywhere(free is not None and needed > free):
    least = megabytes(free) if free is not None else 'less'
    fewer = 'fewer rows at once (--config.train.accumulation), stronger remat (--config.model.remat=block)'
    if free is not None and state > free:
      fewer = 'a smaller model'
    raise ConfigError(
      f'the train step needs {megabytes(needed)} of memory on each device, {megabytes(state)} of it for state and '
      f'batch, and {least} are free; use {fewer} or more devices (--config.parallel.fsdp); python -m mor_jax.compile '
      f'--suggest with the same --config finds settings that fit'
    )


def say_stopped(run: Run, checkpoints: Checkpoints, number: int) -> None:
  """What the user reads after a signal has ended the training."""
  print_rows(run.console, [summary.describe_time(run.ledger.seconds(), run.ledger.restarts())])
  name = signal.Signals(number).name
  run.report(f'{name}: {checkpoints.describe_newest()}; the same command resumes')


def write_result(
  run: Run, given: Inputs, state: TrainState, last: Record, order: schedule.BatchSchedule
) -> None:
  """Writes summary.json and shows it.

  Args:
    last: metrics of the last step, those of the validation among them.
    order: rows of every step.
  """
  outcome = result.of_run(run.config, given.dataset, state.variables, last, run.ledger, order)
  if runtime.is_main():
    run.folder.write_summary(outcome)
  print_table(run.console, 'Finished', summary.describe_result(outcome, run.folder.path))
