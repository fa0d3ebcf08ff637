"""Keeps what a benchmark found: benchmarks/results/NAME.json and NAME.md, with machine, versions and commit."""

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
  """Where and with what a benchmark ran; asks for accelerators only if JAX is in use."""
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
  """Writes both files, and returns the table in Markdown.

  Args:
    columns: titles.
    rows: cells; text is shown as it is, numbers as in JSON.
    settings: what the benchmark was run with, and how it was measured.
    **more: further JSON for the .json alone.
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
