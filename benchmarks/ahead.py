"""Compiles benchmark programs for absent accelerators with the real command, and saves each result at once."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console

from benchmarks import results
from mor_jax.planning import topology

Compiled = dict[str, Any]  # what `python -m mor_jax.compile --json` prints
MODELS = {
  'vanilla': (':vanilla', []),
  'mor R=2': ('', ['--config.model.num_recursions=2']),
  'mor R=3': ('', ['--config.model.num_recursions=3']),
}


def model_flags(size: str, model: str) -> list[str]:
  """Command-line flags of one of MODELS at one of the paper's sizes."""
  variant, more = MODELS[model]
  return [f'--config=configs/{size}.py{variant}', *more]


def compile_all(
  name: str,
  programs: Mapping[str, Sequence[str]],
  table: Callable[[dict[str, Compiled]], tuple[Sequence[str], Sequence[Sequence[Any]]]],
  settings: dict[str, Any],
  again: bool,
) -> dict[str, Compiled]:
  """Compiles programs, and after each writes the table anew; those in results/NAME.json are not repeated.

  Args:
    programs: label -> flags of `mor_jax.compile`.
    table: the programs compiled so far -> columns and rows.
    settings: how it was measured.
    again: repeat all.
  """
  topology.prepare()  # what is kept beside the figures includes the devices of this machine
  console = Console()
  path = results.FOLDER / f'{name}.json'
  known = json.loads(path.read_text())['programs'] if path.exists() and not again else {}
  done = {
    label: known[label]
    for label in programs
    if label in known and known[label]['flags'] == list(programs[label])
  }
  for number, (label, flags) in enumerate(programs.items(), 1):
    if label in done:
      continue
    console.print(f'{number} of {len(programs)}: {label}', highlight=False)
    done[label] = {'flags': list(flags), **_compile(flags)}
    columns, rows = table(done)
    others = {key: value for key, value in known.items() if key not in done}
    results.keep(name, columns, rows, settings, programs={**others, **done})
  columns, rows = table(done)
  console.print(
    results.keep(name, columns, rows, settings, programs={**known, **done}), soft_wrap=True, highlight=False
  )
  return done


def _compile(flags: Sequence[str]) -> Compiled:
  of_training = [] if '--program=decode' in flags else ['--noremedies']
  command = [sys.executable, '-m', 'mor_jax.compile', '--json', *of_training, *flags]
  ended = subprocess.run(command, capture_output=True, text=True, check=False)
  if not ended.stdout.strip():
    raise RuntimeError(f'{" ".join(command)} ended with {ended.returncode}: {ended.stderr[-2000:]}')
  return json.loads(ended.stdout.splitlines()[-1])
