"""Memory of the train step on a TPU: MoR against vanilla at equal settings, compiled ahead of time.

  python -m benchmarks.memory --fast [--sizes=360m] [--remats=full,dots,none,block]
      [--attentions=auto,xla,reference] [--loss_chunks=none,0] [--at=full,none] [--again]

Uses 8 x 2048 tokens on one v5p chip, AdamW, float32 parameters and bfloat16 compute. The first value of each list
is the default of the configs. Every remat is compiled with the default attention and loss, and every other
attention and loss with the remats of --at. Recursive KV sharing is compiled with every attention and the remats of
--at; its `auto` is our Pallas kernel. A program takes at least half a minute to compile. Writes results/memory.json
after each program; a second run resumes from it.
"""

from collections.abc import Iterator

from absl import flags

from benchmarks import ahead
from mor_jax import cli
from mor_jax.units import megabytes

FLAGS = flags.FLAGS
flags.DEFINE_list('sizes', ['360m', '1p7b'], 'configs')
flags.DEFINE_list('models', list(ahead.MODELS), 'models to compile')
flags.DEFINE_list('remats', ['full', 'dots', 'none', 'block'], 'values of model.remat')
flags.DEFINE_list('attentions', ['auto', 'xla', 'reference'], 'values of model.attention')
flags.DEFINE_list('loss_chunks', ['none', '0'], 'values of train.loss_chunk')
flags.DEFINE_list(
  'at', ['full', 'none'], 'values of model.remat with which other attentions and losses are compiled'
)
flags.DEFINE_boolean('shared', True, 'compile recursive KV sharing, too')
flags.DEFINE_string('topology', 'v5p:1x1x1', 'one chip')
flags.DEFINE_integer('rows', 8, 'rows of 2048 tokens')
flags.DEFINE_boolean('fast', False, 'let the compiler optimise little')
flags.DEFINE_boolean('again', False, 'repeat what is in results/ already')

SHARED = 'mor R=2 shared kv'


def main() -> None:
  """Compiles all programs and writes the table."""
  programs = {}
  for size in FLAGS.sizes:
    for remat, attention, chunk, model in _star():
      of_model = ahead.model_flags(size, 'mor R=2' if model == SHARED else model)
      programs[f'{size}, {remat}, {attention}, {chunk}, {model}'] = [
        *of_model,
        *(['--config.model.kv=shared'] if model == SHARED else []),
        f'--topology={FLAGS.topology}',
        f'--config.train.global_batch={FLAGS.rows}',
        '--config.train.accumulation=1',
        f'--config.model.remat={remat}',
        f'--config.model.attention={attention}',
        f'--config.train.loss_chunk={chunk}',
        *(['--fast'] if FLAGS.fast else []),
      ]
  about = {
    'step': f'{FLAGS.rows} x 2048 tokens, one device of {FLAGS.topology}',
    'compiler': 'little optimisation' if FLAGS.fast else 'as in training',
  }
  ahead.compile_all('memory', programs, _table, about, FLAGS.again)


def _star() -> Iterator[tuple[str, str, str, str]]:
  """Yields (remat, attention, loss chunk, model) of every program."""
  (attention, *attentions), (chunk, *chunks) = FLAGS.attentions, FLAGS.loss_chunks
  beams = [(remat, attention, chunk) for remat in FLAGS.remats]
  beams += [(remat, attention, other) for other in chunks for remat in FLAGS.at]
  beams += [(remat, other, chunk) for other in attentions for remat in FLAGS.at]
  yield from ((*beam, model) for beam in beams for model in FLAGS.models)
  if FLAGS.shared:
    yield from ((remat, one, chunk, SHARED) for one in FLAGS.attentions for remat in FLAGS.at)


def _table(programs: dict[str, ahead.Compiled]):
  columns = (
    'size',
    'remat',
    'attention',
    'loss chunk',
    'model',
    'peak',
    'state',
    'temporaries',
    'peak ratio',
    'temporaries ratio',
    'FLOP ratio',
  )
  rows = []
  for label, one in programs.items():
    *setting, model = label.split(', ')
    base = programs.get(', '.join([*setting, 'vanilla']))
    row = [*setting, model, megabytes(one['peak_bytes']), megabytes(one['argument_bytes'])]
    row += [megabytes(one['temp_bytes']) if one['temp_bytes'] else 'does not fit']
    comparable = base and one['temp_bytes'] and base['temp_bytes']
    row += [
      f'{one[key] / base[key]:.2f}' if comparable else '' for key in ('peak_bytes', 'temp_bytes', 'flops')
    ]
    rows.append(row)
  return columns, rows


if __name__ == '__main__':
  cli.run(main, __doc__, with_config=False)
