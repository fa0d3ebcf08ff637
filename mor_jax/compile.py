"""Compiles the train step, or generating, for a machine that need not be there, and tells what it costs on each device:

  python -m mor_jax.compile --config=configs/1p7b.py --topology=v5p:8x8x8 [--slices=2] [--json]
  python -m mor_jax.compile --config=configs/360m.py --topology=v5e:4x4 --suggest
  python -m mor_jax.compile --config=configs/360m.py --topology=v5e:1x1 --program=decode --max_len=2048 [--speculate=4]

--program=decode compiles what the engine of mor_jax.generate runs on one device: a pass of the shared block, the
boundary, a chunk of prompts and, with --speculate, a draft with its check; for as many texts as fit, unless --slots
says how many.

Exits with 1 if the step does not fit into memory, after trying what would help. For TPUs it needs
libtpu (pip install -r requirements-aot.txt), but no TPU.
"""

import json
from collections.abc import Callable, Iterable, Sequence

import jax
from absl import flags
from rich.console import Console

from mor_jax import cli
from mor_jax.config import Config, ConfigError, with_changes
from mor_jax.config.validation import SPECIAL_AND_BYTE_TOKENS
from mor_jax.console import open_console, print_rows, print_table
from mor_jax.data import synthetic
from mor_jax.inference import speculation
from mor_jax.interop import pretrained
from mor_jax.model import cache
from mor_jax.parallel import mesh as mesh_lib
from mor_jax.planning import ahead_of_time, decoding, fitting, program_report, topology
from mor_jax.planning.ahead_of_time import Program
from mor_jax.training import benefit, budget, trainable

FLAGS = flags.FLAGS
DOES_NOT_FIT = 1
OF_PROGRAM = {
  'train': ('slices', 'suggest', 'remedies'),
  'decode': ('slots', 'max_len', 'chunk', 'speculate', 'draft_recursions', 'cache_dtype'),
}
"""Flags that only one program has."""


def define_flags() -> None:
  """Defines the flags of this command."""
  flags.DEFINE_string(
    'topology', None, 'v5e:16x16, v5p:8x8x8, v6e:16x16, tpu7x:4x4x4, cpu:8 ...; default: this machine'
  )
  flags.DEFINE_integer('slices', 1, 'slices of that topology, joined by the network between them')
  flags.DEFINE_boolean(
    'suggest', False, 'find the rows at once and the remat that fit, by compiling a dozen programs'
  )
  flags.DEFINE_boolean(
    'fast',
    False,
    'let the compiler optimise little: takes a third of the time; temporaries may differ by 15%',
  )
  flags.DEFINE_boolean(
    'remedies', True, 'try what would help, by compiling that too, if the step does not fit'
  )
  flags.DEFINE_enum('program', 'train', ['train', 'decode'], 'what to compile')
  flags.DEFINE_integer('slots', None, 'decode: texts at a time; default: as many as fit')
  flags.DEFINE_integer('max_len', None, 'decode: longest text; default: data.seq_len')
  flags.DEFINE_integer('chunk', 64, 'decode: tokens of a prompt that are computed together')
  flags.DEFINE_integer('speculate', 0, 'decode: tokens of a draft; 0: none')
  flags.DEFINE_integer('draft_recursions', 1, 'decode: recursions that write it')
  flags.DEFINE_enum(
    'cache_dtype', None, sorted(cache.DTYPES), 'decode: keys and values; default: the dtype of the model'
  )
  flags.DEFINE_boolean('json', False, 'print one JSON object, with figures of one device')


def main(config: Config, workdir: str | None) -> int:
  """Compiles and reports; returns 0 if the step fits.

  Raises:
    ConfigError: no such machine, or sizes that cannot be laid out on it.
  """
  del workdir  # nothing is written
  console = open_console(stderr=FLAGS.json)
  for program, names in OF_PROGRAM.items():
    for name in names:
      if FLAGS[name].present and program != FLAGS.program:
        raise ConfigError(f'--{name} is for --program={program}; with --program={FLAGS.program} leave it out')
  if FLAGS.program == 'decode':
    return _decode(config, console)
  compile_config = _compiler()
  config = budget.with_budgeted_steps(_with_vocabulary(config))
  program = compile_config(config, may_lower='train.accumulation' not in cli.overrides())
  name = f'{config.name} on {FLAGS.topology or "this machine"}'
  print_table(console, name, program_report.describe(program, config))
  report = program_report.as_json(program) | {'topology': FLAGS.topology}
  if FLAGS.suggest:
    attempts = _try(console, fitting.suggestions(program, compile_config))
    choice = fitting.best(attempts)
    if choice:
      print_rows(console, [('suggested', choice.flags), ('', program_report.speed(choice.program))])
    report |= {'tried': [_as_json(attempt) for attempt in attempts]}
    report |= {'suggested': _as_json(choice) if choice else None}
    fits = choice is not None
  elif not program.fits and FLAGS.remedies:
    attempts = _try(console, fitting.remedies(program, compile_config))
    report |= {'tried': [_as_json(attempt) for attempt in attempts]}
    fits = False
  else:
    fits = program.fits
  if FLAGS.json:
    print(json.dumps(report))
  return 0 if fits else DOES_NOT_FIT


def _decode(config: Config, console: Console) -> int:
  """Compiles and reports what generating takes on one device."""
  cli.check_least(slots=1, max_len=2, chunk=1, speculate=0, draft_recursions=1)
  model = _with_vocabulary(config).model
  speculation.check(FLAGS.speculate, FLAGS.draft_recursions, cache.num_steps(model))
  asked = decoding.Asked(
    config.data.seq_len if FLAGS.max_len is None else FLAGS.max_len,
    FLAGS.cache_dtype or model.dtype,
    FLAGS.slots,
    FLAGS.chunk,
    FLAGS.speculate,
    FLAGS.draft_recursions,
    model.threshold_slack,
    FLAGS.fast,
  )
  plan = decoding.compile_decoding(model, _devices()[0], asked)
  print_table(
    console, f'{config.name}, generating on {FLAGS.topology or "this machine"}', decoding.describe(plan)
  )
  if FLAGS.json:
    print(json.dumps({'name': config.name, 'topology': FLAGS.topology, **decoding.as_json(plan)}))
  return 0 if plan.fits else DOES_NOT_FIT


def _devices() -> Sequence[jax.Device]:
  if FLAGS.topology is None:
    return jax.devices()
  topology.prepare()
  return topology.devices(FLAGS.topology, FLAGS.slices)


def _compiler() -> Callable[..., Program]:
  """Config -> Program for the devices that the flags name."""
  if FLAGS.topology is None and FLAGS.slices != 1:
    raise ConfigError(f'--slices={FLAGS.slices} needs --topology: name what one slice is')
  devices = None if FLAGS.topology is None else _devices()

  def compile_config(config: Config, may_lower: bool = False) -> Program:
    mesh = mesh_lib.make_mesh(config.parallel, devices)
    if may_lower:
      config = _with_enough_rows(config, mesh_lib.row_shards(mesh))
    mesh_lib.check_batch(mesh, config.train)
    mesh_lib.check_model(mesh, config.model)
    micro_rows = config.train.global_batch // config.train.accumulation
    trainable.check(config)
    benefit.check_rows(config.model, micro_rows, mesh_lib.row_shards(mesh))
    teacher = pretrained.make_teacher(config, pretrained.open_teacher(config))
    return ahead_of_time.compile_step(config, mesh, teacher, FLAGS.fast)

  return compile_config


def _with_vocabulary(config: Config) -> Config:
  """The config with the vocabulary that its tokenizer will have, where that is known without data."""
  if config.model.vocab_size:
    return config
  if config.data.source.startswith(synthetic.PREFIX):
    size = 1 + max(synthetic.parse(config.data.source).vocabulary.values())
    return with_changes(config, model={'vocab_size': size})
  known = {'bytes': SPECIAL_AND_BYTE_TOKENS, 'bpe': config.data.vocab_size}
  if config.data.tokenizer not in known:
    raise ConfigError(
      f'model.vocab_size is unset, and only data.tokenizer={config.data.tokenizer} itself knows its size; '
      f'set --config.model.vocab_size'
    )
  return with_changes(config, model={'vocab_size': known[config.data.tokenizer]})


def _with_enough_rows(config: Config, shards: int) -> Config:
  """Fewer micro-batches, as many as can be, if those of the config file have too few rows for the machine."""
  train = config.train
  possible = [
    count
    for count in range(train.accumulation, 0, -1)
    if train.global_batch % count == 0 and train.global_batch // count % shards == 0
  ]
  return with_changes(config, train={'accumulation': possible[0]}) if possible else config


def _try(console: Console, attempts: Iterable[fitting.Attempt]) -> list[fitting.Attempt]:
  """All attempts, each shown as it is done."""
  done = []
  for attempt in attempts:
    done.append(attempt)
    print_rows(console, [('tried', f'{attempt.flags}: {program_report.memory(attempt.program)}')])
  return done


def _as_json(attempt: fitting.Attempt) -> dict:
  return {'flags': attempt.flags, **program_report.as_json(attempt.program)}


if __name__ == '__main__':
  define_flags()
  cli.run(main, __doc__)
