"""Writes a benchmark's results, machine, versions and commit to benchmarks/results/NAME.json and NAME.md."""

import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from mor_jax.runs.run_folder import code_version

FOLDER = Path(__file__).parent / 'results'


def machine() -> dict[str, str]:
  """Machine, versions and commit of a benchmark run; queries accelerators only if JAX is loaded."""
  about = {
    'machine': f'{platform.machine()}, {len(os.sched_getaffinity(0))} cores',
    'python': platform.python_version(),
    'jax': metadata.version('jax'),
    'commit': code_version(),
  }
  if 'jax' in sys.modules:
    import jax

    about['devices'] = f'{jax.device_count()} x {jax.devices()[0].device_kind}'
  return about


def keep(
  name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], settings: dict[str, Any], **more: Any
) -> str:
  """Writes both files and returns the table in Markdown.

  Args:
    name: file name without extension.
    columns: column titles.
    rows: cells; text is shown verbatim, numbers as in JSON.
    settings: settings of the benchmark and how it measures.
    **more: further JSON values for the .json file only.
  """
  lines = [f'| {" | ".join(columns)} |', f'|{"---|" * len(columns)}']
  lines += [f'| {" | ".join(map(str, row))} |' for row in rows]
  table = '\n'.join(lines) + '\n'
  about = machine()
  FOLDER.mkdir(exist_ok=True)
  entries = [dict(zip(columns, row, strict=True)) for row in rows]
  result = {**about, 'settings': settings, 'rows': entries, **more}
  (FOLDER / f'{name}.json').write_text(json.dumps(result, indent=2) + '\n')
  notes = ''.join(f'- {key}: {value}\n' for key, value in {**about, **settings}.items())
  (FOLDER / f'{name}.md').write_text(f'{table}\n{notes}')
  return table
