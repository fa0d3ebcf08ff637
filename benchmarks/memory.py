"""Memory of the train step on a TPU, MoR against vanilla at equal settings, compiled ahead of time.

  python -m benchmarks.memory [--sizes=360m] [--remats=none,dots,block,full,offload] [--attentions=auto,xla]
      [--loss_chunks=none,0] [--fast] [--again]

8 x 2048 tokens on one chip of v5p, AdamW, float32 parameters, bfloat16 compute. The settings of the
configs are the first of each list. A program takes minutes; results/memory.json is written after each,
and a second run goes on from there.
"""

import itertools

from absl import flags

from benchmarks import ahead
from mor_jax import cli
from mor_jax.units import megabytes

FLAGS = flags.FLAGS
flags.DEFINE_list('sizes', ['360m', '1p7b'], 'configs')
flags.DEFINE_list('models', list(ahead.MODELS), 'models to compile')
flags.DEFINE_list('remats', ['full', 'dots', 'none', 'block', 'offload'], 'values of model.remat')
flags.DEFINE_list('attentions', ['auto', 'xla'], 'values of model.attention')
flags.DEFINE_list('loss_chunks', ['none', '0'], 'values of train.loss_chunk')
flags.DEFINE_string('topology', 'v5p:1x1x1', 'one chip')
flags.DEFINE_integer('rows', 8, 'rows of 2048 tokens')
flags.DEFINE_boolean('fast', False, 'let the compiler optimise little')
flags.DEFINE_boolean('again', False, 'repeat what is in results/ already')


def main() -> None:
  """Compiles and writes the table."""
  programs = {}
  settings = list(itertools.product(FLAGS.attentions, FLAGS.loss_chunks, FLAGS.remats))
  for size, setting, model in itertools.product(FLAGS.sizes, settings, FLAGS.models):
    attention, chunk, remat = setting
    programs[f'{size}, {remat}, {attention}, {chunk}, {model}'] = [
      *ahead.model_flags(size, model),
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
