"""What commands that generate share: flags of the engine, its mesh, and the tokenizer of a run."""

import atexit
import dataclasses
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh

from mor_jax.cli import weights
from mor_jax.cli.flags import load_config, numbers, overrides
from mor_jax.config import Config, ConfigError
from mor_jax.console import open_console, print_line
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.evaluation import calibration
from mor_jax.inference.engine import Engine, recursions_of
from mor_jax.interop import imported, published, sources
from mor_jax.model import cache
from mor_jax.model.transformer import Transformer
from mor_jax.parallel import device_memory
from mor_jax.parallel import mesh as mesh_lib
from mor_jax.runs.restore import LoadedRun, load_run

FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # what is defined here is a flag of the command that calls for it
AUTO_DRAFT = 4  # tokens of a draft with --speculate=auto
MEASURED_SLOTS = 16  # from which on a server measures what the batches of a tick cost


def define_flags(slots: int | None, slots_help: str) -> None:
  """Defines the flags of an engine.

  Args:
    slots: the default of --slots; None: the command decides, as `slots_help` says.
  """
  flags.DEFINE_integer('lanes', None, 'texts that a pass of the block takes; default: all slots')
  flags.DEFINE_integer(
    'boundary_lanes',
    None,
    'texts that pass the head together; default: all, or on CPU a quarter of the lanes',
  )
  flags.DEFINE_boolean(
    'measure_batches',
    None,
    'choose --lanes and --boundary_lanes, where they are not given, by what passes cost here, measured at the start; '
    f'default: only a server does, of {MEASURED_SLOTS} slots or more on one device',
  )
  flags.DEFINE_integer('max_recursions', None, 'recursions a token takes at most; default: as trained')
  flags.DEFINE_list(
    'capacities', None, 'use the thresholds that mor_jax.calibrate stored for these capacities'
  )
  flags.DEFINE_integer(
    'max_len', None, 'longest text in tokens, prompt included; default: data.seq_len of the run'
  )
  flags.DEFINE_integer('slots', slots, slots_help)
  flags.DEFINE_float(
    'slack', None, 'places of a recursion per token expected; default: model.threshold_slack'
  )
  flags.DEFINE_enum(
    'cache_dtype', None, sorted(cache.DTYPES), 'keys and values; default: the dtype of the model'
  )
  flags.DEFINE_string(
    'speculate',
    '0',
    'tokens that the first recursions draft, to be checked together (the text is the same): a number, 0: none; auto: '
    f'{AUTO_DRAFT}, whenever that is faster',
  )
  flags.DEFINE_boolean(
    'batch_invariant',
    False,
    'the same bits of scores, whatever else is computed at the time; costs speed where prompts are short',
  )
  flags.DEFINE_integer('draft_recursions', 1, 'recursions that write the drafts')
  weights.define_flags()


def make_mesh() -> Mesh:
  """All devices, if the settings of --config.parallel say how; else the first."""
  changes = overrides()
  if not changes:
    return mesh_lib.make_mesh(devices=jax.devices()[:1])
  return mesh_lib.make_mesh(load_config(None, changes).parallel)


def load(mesh: Mesh) -> LoadedRun:
  """The run of --checkpoint; another library's folder becomes a run folder that is gone when the process ends.

  Raises:
    ConfigError: it is neither a run, nor a published folder, nor a checkpoint of Hugging Face.
  """
  path = Path(FLAGS.checkpoint)
  if sources.is_run(path) or not (path / 'config.json').is_file():
    return load_run(path, mesh=mesh)
  is_published = published.is_published(path)
  opened = published.open_folder(path) if is_published else sources.open_model(path, '--checkpoint')
  if not is_published and opened[1] is None:
    raise ConfigError(
      f'--checkpoint={path} has neither tokenizer.json nor tokenizer.model, and texts need one: put it there'
    )
  folder = tempfile.TemporaryDirectory(prefix='mor_jax-')
  atexit.register(folder.cleanup)
  output = Path(folder.name) / path.resolve().name
  if is_published:
    published.write_run(output, opened, opened.weights, str(path))
  else:
    imported.write_run(output, *opened, str(path))
  return load_run(output, mesh=mesh)


def tokenizer_of(run: LoadedRun) -> Tokenizer:
  """The tokenizer of a run. Raises ConfigError if there is none that can be used."""
  path = run.folder.tokenizer
  if not path.exists():
    raise ConfigError(
      f'--checkpoint={FLAGS.checkpoint} has no tokenizer: put the tokenizer.json that the model was trained '
      f'with at {path}'
    )
  try:
    return Tokenizer.load(path, run.config.data.separator, run.config.data.begin)
  except ValueError as error:
    raise ConfigError(f'--checkpoint={FLAGS.checkpoint}: {error}') from None


def load_as_asked(mesh: Mesh) -> LoadedRun:
  """The run of --checkpoint with the thresholds of --capacities, and weights as --weights says.

  Raises:
    ConfigError: as `load`, or one of the flags cannot be followed.
  """
  weights.check_flags()
  run = load(mesh)
  if FLAGS.capacities:
    config, variables = calibrated(run)
    run = dataclasses.replace(run, config=config, model=Transformer(config.model), variables=variables)
  recursions_of(run.config.model, FLAGS.max_recursions)
  return weights.quantised(run, mesh, FLAGS.max_recursions, partial(print_line, open_console(stderr=True)))


def make_engine(
  run: LoadedRun, slots: int, mesh: Mesh, top_logprobs: int | None = None, may_measure: bool = False
) -> Engine:
  """An engine with at least so many slots, as many on every part of the mesh.

  Args:
    may_measure: --measure_batches holds, unless it is given, where it pays.

  Raises:
    ConfigError: a setting cannot work, or there is no memory for it.
  """
  parts = mesh_lib.row_shards(mesh)
  slots = FLAGS.slots or -(-slots // parts) * parts
  measure = FLAGS.measure_batches
  if measure is None:
    pays = (
      slots >= MEASURED_SLOTS and cache.num_steps(run.config.model) > 1 and run.config.model.unique_ends > 0
    )
    measure = may_measure and pays and mesh.size == 1 and not FLAGS.batch_invariant
  engine = Engine(
    run.model,
    run.variables,
    slots=slots,
    lanes=FLAGS.lanes,
    boundary_lanes=FLAGS.boundary_lanes,
    measure=measure,
    max_len=run.config.data.seq_len if FLAGS.max_len is None else FLAGS.max_len,
    slack=FLAGS.slack,
    cache_dtype=FLAGS.cache_dtype,
    max_recursions=FLAGS.max_recursions,
    top_logprobs=top_logprobs,
    mesh=mesh if mesh.size > 1 else None,
    speculate=_draft_length(),
    draft_recursions=FLAGS.draft_recursions,
    batch_invariant=FLAGS.batch_invariant,
  )
  _check_memory(engine, mesh)
  return engine


def _check_memory(engine: Engine, mesh: Mesh) -> None:
  needed, left = engine.state_bytes(), device_memory.free(list(mesh.devices.flat))
  if left is not None and needed > left:
    raise ConfigError(
      f'--slots={engine.slots} texts of --max_len={engine.max_len} tokens need {needed / 1e9:,.2f} GB for keys and values '
      f'on each device, where {left / 1e9:,.2f} GB are free: use fewer or shorter ones'
      + ('' if FLAGS.cache_dtype in cache.LARGEST else ', or --cache_dtype=int8')
    )


def drafting() -> bool | None:
  """Whether calls draft, as --speculate says; None: those that are faster so."""
  return None if FLAGS.speculate == 'auto' else _draft_length() > 0


def _draft_length() -> int:
  if FLAGS.speculate == 'auto':
    return AUTO_DRAFT
  if not FLAGS.speculate.isascii() or not FLAGS.speculate.isdecimal():
    raise ConfigError(f'--speculate={FLAGS.speculate} is not allowed: must be auto, or a number of tokens')
  return int(FLAGS.speculate)


def calibrated(run: LoadedRun) -> tuple[Config, dict[str, Any]]:
  """Settings and variables with the thresholds for --capacities.

  Raises:
    ConfigError: they were not calibrated, or with another checkpoint.
  """
  wanted = numbers('capacities')
  stored = {entry.capacities: entry for entry in calibration.read(run.folder.calibrations)}
  text = ','.join(FLAGS.capacities)
  command = f'python -m mor_jax.calibrate --checkpoint={FLAGS.checkpoint} --capacities={text}'
  if wanted not in stored:
    raise ConfigError(f'--capacities={text} has not been calibrated for this run: first run {command}')
  if stored[wanted].step != run.step:
    raise ConfigError(
      f'--capacities={text} was calibrated with the checkpoint of step {stored[wanted].step}, and the thresholds of '
      f'step {run.step} are others: run {command} again'
    )
  return calibration.apply(run.config, run.variables, stored[wanted])
