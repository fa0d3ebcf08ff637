"""Compile time of the train step: MoR against vanilla, at two depths.

  python -m benchmarks.compile_time [--size=360m] [--topologies=v5e:4x4,cpu:1] [--depths=32,62] [--again]

Measures the process CPU seconds of tracing, lowering and compiling, which depend little on other load.
Writes results/compile_time.json after each program; a second run resumes from it.
"""

from absl import flags

from benchmarks import ahead
from mor_jax import cli

FLAGS = flags.FLAGS
flags.DEFINE_string('size', '360m', 'config')
flags.DEFINE_list('topologies', ['v5e:4x4', 'cpu:1'], 'machines')
flags.DEFINE_list('depths', ['32', '62'], 'layers, which two and three recursions divide: 2 + 30 and 2 + 60')
flags.DEFINE_boolean('fast', False, 'let the compiler optimise little')
flags.DEFINE_boolean('again', False, 'repeat what is in results/ already')

BATCH = ['--config.train.global_batch=16', '--config.train.accumulation=1']


def main() -> None:
  """Compiles all programs and writes the table."""
  programs = {}
  for topology in FLAGS.topologies:
    for depth in FLAGS.depths:
      for model in ahead.MODELS:
        flag_list = [*ahead.model_flags(FLAGS.size, model), f'--topology={topology}', *BATCH]
        flag_list += [f'--config.model.num_layers={depth}', *(['--fast'] if FLAGS.fast else [])]
        programs[f'{topology}, {depth}, {model}'] = flag_list
  settings = {
    'step': f'{FLAGS.size}, 16 x 2048 tokens',
    'compiler': 'little optimisation' if FLAGS.fast else 'as in training',
  }
  ahead.compile_all('compile_time', programs, _table, settings, FLAGS.again)


def _table(programs: dict[str, ahead.Compiled]):
  columns = ('machine', 'layers', 'model', 'CPU s', 'of vanilla', f'of {FLAGS.depths[0]} layers')
  rows = []
  for label, one in programs.items():
    topology, depth, model = label.split(', ')
    seconds = one['compile_cpu_seconds']
    others = [
      programs.get(f'{topology}, {other}') for other in (f'{depth}, vanilla', f'{FLAGS.depths[0]}, {model}')
    ]
    ratios = [f'{seconds / other["compile_cpu_seconds"]:.2f}' if other else '' for other in others]
    rows.append([topology, depth, model, f'{seconds:.0f}', *ratios])
  return columns, rows


if __name__ == '__main__':
  cli.run(main, __doc__, with_config=False)
