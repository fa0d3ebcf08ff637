"""This checkout against another, such as the commit before a change: nothing may get worse.

  git worktree add ../before COMMIT
  python -m benchmarks.before_after --before=../before [--rounds=9] [--ticks=200] [--only=step,decode,tpu,compile]

Each checkout runs its own code in processes of its own; training steps and stretches of decoding alternate, and a
ratio is the median over rounds of this checkout's time over that of the other's beside it: on the wall, and of the
CPU, which other work on the machine changes less. Bytes are those of XLA's memory analysis, of the CPU's programs
and of those compiled for TPUs with the settings that configs/ has. Compiling is measured in CPU seconds of tracing,
lowering and compiling. Below 1 is better. Writes benchmarks/results/before_after.json and .md after every part.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console

from benchmarks import results, sides
from mor_jax import cli
from mor_jax.config import ConfigError

FLAGS = flags.FLAGS
flags.DEFINE_string('before', None, 'folder of the other checkout')
flags.DEFINE_integer(
  'rounds', 9, 'training steps, and stretches of decoding, of each checkout that are timed'
)
flags.DEFINE_integer('ticks', 200, 'ticks of the engine in a stretch of decoding')
flags.DEFINE_list(
  'only', ['step', 'decode', 'tpu', 'compile'], 'parts to measure; the others stay as they are'
)

TRAINED = ('vanilla', 'recursive R=2', 'mor R=3', 'mor R=3, shared KV', 'mor R=3, token-choice')
DECODED = ('vanilla', 'MoR R=3')
FOR_TPU = {
  '360m vanilla, v5e:4x4': ('360m', ':vanilla', 'v5e:4x4'),
  '360m mor, v5e:4x4': ('360m', '', 'v5e:4x4'),
  '1p7b vanilla, v5p:2x2x4': ('1p7b', ':vanilla', 'v5p:2x2x4'),
  '1p7b mor, v5p:2x2x4': ('1p7b', '', 'v5p:2x2x4'),
}
FOR_CPU = {'360m vanilla, cpu:1': ('360m', ':vanilla', 'cpu:1'), '360m mor, cpu:1': ('360m', '', 'cpu:1')}
COLUMNS = ('what', 'model', 'before', 'after', 'ratio', 'smallest to largest')
HERE = Path(__file__).resolve().parents[1]


def main() -> None:
  """Measures and writes the table. Raises ConfigError for flags that cannot work."""
  before = Path(FLAGS.before or '').resolve()
  if FLAGS.before is None or not (before / 'benchmarks' / 'training.py').exists():
    raise ConfigError(f'--before={FLAGS.before} must be a folder with another checkout of this repository')
  parts = {'step': _steps, 'decode': _decoding, 'tpu': _for_tpu, 'compile': _for_cpu}
  if unknown := set(FLAGS.only) - set(parts):
    raise ConfigError(f'--only={",".join(sorted(unknown))} is not among {", ".join(parts)}')
  path = results.FOLDER / 'before_after.json'
  known = json.loads(path.read_text())['parts'] if path.exists() else {}
  settings = {'before': _commit(before), 'rounds': FLAGS.rounds, 'ticks': FLAGS.ticks}
  table = ''
  for name in FLAGS.only:
    known[name] = []
    for row in parts[name](before):
      known[name].append(row)
      rows = [row for part in parts for row in known.get(part, [])]
      table = results.keep('before_after', COLUMNS, rows, settings, parts=known)
      Console().print('  '.join(map(str, row)), highlight=False, soft_wrap=True)
  Console().print(table, highlight=False, soft_wrap=True)


def _steps(before: Path) -> Iterator[list[Any]]:
  for model in TRAINED:
    about, rounds = _alternate(before, 'training', model, range(FLAGS.rounds + 1))
    yield _timed('training step, ms', model, rounds, 'seconds', 1e3)
    yield _timed('training step, CPU ms', model, rounds, 'cpu_seconds', 1e3)
    yield _exact('training step, MB', model, [one['bytes'] / 1e6 for one in about])
    yield _exact('making model and step, CPU s', model, [one['compile_cpu_seconds'] for one in about])


def _decoding(before: Path) -> Iterator[list[Any]]:
  for model in DECODED:
    _, rounds = _alternate(before, 'decoding', model, [FLAGS.ticks] * (FLAGS.rounds + 1))
    yield _timed('decoding, ms a token', model, rounds, 'seconds', 1e3)
    yield _timed('decoding, CPU ms a token', model, rounds, 'cpu_seconds', 1e3)


def _for_tpu(before: Path) -> Iterator[list[Any]]:
  for label, program in FOR_TPU.items():
    both = [_compiled(checkout, *program) for checkout in (before, HERE)]
    yield _exact('TPU memory a device, MB', label, [one['peak_bytes'] / 1e6 for one in both])
    yield _exact('TPU GFLOPs a device', label, [one['flops'] / 1e9 for one in both])
    yield _exact('compiling for it, CPU s', label, [one['compile_cpu_seconds'] for one in both])


def _for_cpu(before: Path) -> Iterator[list[Any]]:
  for label, program in FOR_CPU.items():
    both = [_compiled(checkout, *program) for checkout in (before, HERE)]
    yield _exact('CPU memory, MB', label, [one['peak_bytes'] / 1e6 for one in both])
    yield _exact('compiling for it, CPU s', label, [one['compile_cpu_seconds'] for one in both])


def _alternate(before: Path, what: str, model: str, questions) -> tuple[list[dict], list[tuple[dict, dict]]]:
  """What both sides are, and their answers of each round but the first, before and after; who begins alternates."""
  arguments = ['-P', str(Path(__file__).with_name('checkout_side.py')), what, model]
  both = [sides.Side(arguments, folder=checkout) for checkout in (before, HERE)]
  rounds = []
  for number, question in enumerate(questions):
    order = (0, 1) if number % 2 else (1, 0)
    found = {side: both[side].ask(question) for side in order}
    if number:
      rounds.append((found[0], found[1]))
  for side in both:
    side.close()
  return [side.about for side in both], rounds


def _timed(what: str, model: str, rounds: list[tuple[dict, dict]], key: str, factor: float) -> list[Any]:
  ratios = [after[key] / before[key] for before, after in rounds]
  medians = [factor * statistics.median(one[side][key] for one in rounds) for side in (0, 1)]
  spread = f'{min(ratios):.3f} to {max(ratios):.3f}'
  return [what, model, *(f'{value:,.4g}' for value in medians), f'{statistics.median(ratios):.3f}', spread]


def _exact(what: str, model: str, pair: list[float]) -> list[Any]:
  return [what, model, *(f'{value:,.1f}' for value in pair), f'{pair[1] / pair[0]:.3f}', '']


def _compiled(checkout: Path, size: str, variant: str, topology: str) -> dict[str, Any]:
  command = [sys.executable, '-m', 'mor_jax.compile', '--json', '--noremedies', f'--topology={topology}']
  command.append(f'--config=configs/{size}.py{variant}')
  ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=checkout)
  if not ended.stdout.strip():
    raise RuntimeError(f'{" ".join(command)} ended with {ended.returncode}: {ended.stderr[-2000:]}')
  return json.loads(ended.stdout.splitlines()[-1])


def _commit(checkout: Path) -> str:
  command = ['git', '-C', str(checkout), 'rev-parse', 'HEAD']
  return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or 'unknown'


if __name__ == '__main__':
  cli.run(main, __doc__, with_config=False)
