"""Memory, communication and minimum step time of the paper's models on TPU pods, compiled ahead of time.

  python -m benchmarks.scale [--sizes=135m,360m] [--topologies=v5p:8x8x8] [--fast] [--again]

Every program is the train step of a config with its 1024 x 2048 tokens, compiled for the whole slice. A second
table shows that communication per device does not grow with the slice. A program takes minutes to compile.
Writes results/scale.json after each program; a second run resumes from it.
"""

import math
from collections.abc import Iterator

from absl import flags

from benchmarks import ahead
from mor_jax import cli
from mor_jax.units import megabytes, quantity

FLAGS = flags.FLAGS
flags.DEFINE_list('sizes', ['360m', '1p7b', '135m', '730m'], 'configs')
flags.DEFINE_list('topologies', ['v5p:8x8x8', 'v5e:16x16', 'v6e:16x16'], 'slices')
flags.DEFINE_list(
  'growth', ['v5p:4x4x4', 'v5p:4x4x8', 'v5p:4x8x8', 'v5p:8x8x8'], 'slices of the second table'
)
flags.DEFINE_boolean('fast', False, 'let the compiler optimise little')
flags.DEFINE_boolean('again', False, 'repeat what is in results/ already')

FSDP = 16  # shards of the state; copies of them are replicas
ROWS = 2  # rows of a device in the second table


def main() -> None:
  """Compiles all programs and writes both tables."""
  fast = ['--fast'] if FLAGS.fast else []
  growth = {}
  for topology in FLAGS.growth:
    batch = ROWS * _chips(topology)
    flag_list = ahead.model_flags('360m', 'mor R=2')
    flag_list += [f'--topology={topology}', f'--config.parallel.fsdp={FSDP}']
    flag_list += [f'--config.train.global_batch={batch}', '--config.train.accumulation=1', *fast]
    growth[topology] = flag_list
  ahead.compile_all(
    'scale_growth', growth, _growth_table, _settings(f'mor R=2, 360m, {ROWS} rows a device'), FLAGS.again
  )

  programs = {}
  for size in FLAGS.sizes:
    for topology in FLAGS.topologies:
      for model in ahead.MODELS:
        flag_list = [*ahead.model_flags(size, model), f'--topology={topology}']
        programs[f'{size}, {topology}, {model}'] = [*flag_list, f'--config.parallel.fsdp={FSDP}', *fast]
  ahead.compile_all('scale', programs, _table, _settings('1024 rows a step'), FLAGS.again)


def _settings(what: str) -> dict[str, str]:
  return {
    'what': f'{what}, 2048 tokens a row',
    'compiler': 'little optimisation' if FLAGS.fast else 'as in training',
  }


def _mesh(one: ahead.Compiled) -> str:
  return ' x '.join(f'{axis} {size}' for axis, size in one['mesh'].items() if size > 1)


def _chips(topology: str) -> int:
  return math.prod(int(size) for size in topology.partition(':')[2].split('x'))


def _table(programs: dict[str, ahead.Compiled]):
  columns = (
    'size',
    'slice',
    'model',
    'mesh',
    'rows at once',
    'memory',
    'fits',
    'received',
    'step at least, s',
    'tokens/s at most',
    'MFU at most',
  )
  return columns, list(_rows(programs))


def _rows(programs: dict[str, ahead.Compiled]) -> Iterator[list[str]]:
  for label, one in programs.items():
    row = [
      *label.split(', '),
      _mesh(one),
      one['rows'],
      megabytes(one['peak_bytes']),
      'yes' if one['fits'] else 'no',
    ]
    if one['fits']:
      tokens = one['tokens_per_second'] * one['devices']
      row += [
        megabytes(one['collective_bytes']),
        f'{one["step_seconds"]:.3f}',
        quantity(tokens),
        f'{one["mfu"]:.0%}',
      ]
    else:
      row += ['', '', '', '']
    yield row


def _growth_table(programs: dict[str, ahead.Compiled]):
  columns = (
    'slice',
    'devices',
    'mesh',
    'received by a device',
    'all-gather',
    'reduce-scatter',
    'all-reduce',
    'other',
  )
  rows = []
  for label, one in programs.items():
    kinds = dict(one['collective_bytes_by_kind'])
    shown = [megabytes(kinds.pop(kind, 0)) for kind in ('all-gather', 'reduce-scatter', 'all-reduce')]
    rows.append(
      [
        label,
        one['devices'],
        _mesh(one),
        megabytes(one['collective_bytes']),
        *shown,
        megabytes(sum(kinds.values())),
      ]
    )
  return columns, rows


if __name__ == '__main__':
  cli.run(main, __doc__, with_config=False)
