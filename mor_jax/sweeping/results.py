"""Results of a sweep as CSV and Markdown tables: one row per run, and means and deviations over seeds."""

import csv
import dataclasses
import math
import statistics
from collections.abc import Mapping
from typing import Any

from mor_jax.files import write_atomically
from mor_jax.sweeping.plan import SEEDS, Plan, PlannedRun, value_of
from mor_jax.sweeping.status import Status
from mor_jax.units import quantity

RESULTS = (
  'validation_nll',
  'perplexity',
  'bits_per_byte',
  'tokens',
  'train_flops',
  'parameters',
  'non_embedding_parameters',
  'seconds',
)
OVER_SEEDS = ('validation_nll', 'perplexity', 'bits_per_byte', 'seconds')
TITLES = {
  'validation_nll': 'validation NLL',
  'bits_per_byte': 'bits/byte',
  'train_flops': 'training FLOPs',
  'non_embedding_parameters': 'outside embedding',
  'seconds': 'wall time',
}
FORMS = {
  'validation_nll': '{:.4f}'.format,
  'perplexity': '{:.3f}'.format,
  'bits_per_byte': '{:.4f}'.format,
  'seconds': lambda seconds: f'{seconds:,.0f} s',
}
"""How a number is written in Markdown; others as quantities with a unit."""


@dataclasses.dataclass(frozen=True)
class Table:
  """Rows of values by column. `axes` are the columns with settings."""

  columns: tuple[str, ...]
  rows: list[dict[str, Any]]

  def to_csv(self, path) -> None:
    """Writes a CSV file with full precision."""
    with path.open('w', newline='') as file:
      writer = csv.DictWriter(file, self.columns)
      writer.writeheader()
      writer.writerows(self.rows)

  def to_markdown(self) -> str:
    """The table in Markdown, with rounded numbers."""
    lines = [f'| {" | ".join(TITLES.get(column, column) for column in self.columns)} |']
    lines += ['|' + '---|' * len(self.columns)]
    for row in self.rows:
      lines.append(f'| {" | ".join(_shown(column, row.get(column)) for column in self.columns)} |')
    return '\n'.join(lines) + '\n'


def of_runs(plan: Plan, status: Mapping[str, Status]) -> Table:
  """One row per run: the settings that differ, its results and its status."""
  rows = []
  for run in plan.runs:
    mine = status[run.name]
    settings = {axis: value_of(run.config, axis) for axis in plan.axes}
    error = mine.error.splitlines()[-1] if mine.error else ''
    rows.append(
      {'run': run.name, **settings, 'status': mine.state, **_result(run), 'exit_code': mine.exit_code}
      | {'error': error}
    )
  return Table(('run', *plan.axes, 'status', *RESULTS, 'exit_code', 'error'), rows)


def over_seeds(plan: Plan) -> Table | None:
  """One row per group of runs that differ in seeds only; None if the axes include no seed.

  Deviations are sample standard deviations (n - 1); a single run has none.
  """
  if not set(plan.axes) & set(SEEDS):
    return None
  axes = [axis for axis in plan.axes if axis not in SEEDS]
  groups: dict[str, list[PlannedRun]] = {}
  for run in plan.runs:
    groups.setdefault(run.group, []).append(run)
  rows = []
  for group, runs in groups.items():
    results = [result for run in runs if (result := _result(run))]
    row = {'runs': group, **{axis: value_of(runs[0].config, axis) for axis in axes}}
    row |= {'seeds': len(runs), 'finished': len(results)}
    for name in OVER_SEEDS:
      values = [result[name] for result in results]
      row[f'{name}_mean'] = statistics.fmean(values) if values else None
      row[f'{name}_std'] = statistics.stdev(values) if len(values) > 1 else None
    rows.append(row)
  measured = tuple(f'{name}_{kind}' for name in OVER_SEEDS for kind in ('mean', 'std'))
  return Table(('runs', *axes, 'seeds', 'finished', *measured), rows)


def write(plan: Plan, status: Mapping[str, Status]) -> str:
  """Writes results.csv, results_over_seeds.csv and results.md; returns the Markdown."""
  runs = of_runs(plan, status)
  runs.to_csv(plan.folder / 'results.csv')
  failed = [run for run in plan.runs if status[run.name].state == 'failed']
  short = dataclasses.replace(runs, columns=tuple(c for c in runs.columns if c not in ('exit_code', 'error')))
  parts = [f'# Sweep {plan.sweep} of {plan.config}\n', *_notes(plan), short.to_markdown()]
  seeds = over_seeds(plan)
  if seeds is not None:
    seeds.to_csv(plan.folder / 'results_over_seeds.csv')
    parts += ['## Over seeds\n', _with_deviations(seeds).to_markdown()]
  if failed:
    parts += ['## Failed\n']
    for run in failed:
      log, error = plan.log(run), status[run.name].error
      parts.append(f'{run.name}, exit code {status[run.name].exit_code}, {log}:\n\n```\n{error}\n```\n')
  text = '\n'.join(parts)
  write_atomically(plan.folder / 'results.md', text)
  return text


def _result(run: PlannedRun) -> dict[str, Any]:
  """The results of a run; {} if it has not finished."""
  summary = run.folder.read_summary() if run.folder.is_finished(run.config) else None
  if summary is None:
    return {}
  nll = summary['validation/nll']
  return {
    'validation_nll': nll,
    'perplexity': math.exp(nll),
    'bits_per_byte': summary['validation/bits_per_byte'],
    **{name: summary[name] for name in ('tokens', 'train_flops', 'parameters', 'non_embedding_parameters')},
    'seconds': sum(summary['goodput'].values()),  # of all its processes
  }


def _notes(plan: Plan) -> list[str]:
  finished = [run for run in plan.runs if run.folder.is_finished(run.config)]
  tokenizers = {run.folder.read_data()['tokenizer_digest'] for run in finished}
  if len(tokenizers) < 2:
    return []
  return [
    'These runs have different tokenizers: a token of one is not a token of the other. Compare bits per byte; '
    'NLL and perplexity are not comparable between them.\n'
  ]


def _with_deviations(table: Table) -> Table:
  """Puts the mean and the deviation of a measure into one cell."""
  measured = [column.removesuffix('_mean') for column in table.columns if column.endswith('_mean')]
  others = [column for column in table.columns if not column.endswith(('_mean', '_std'))]
  rows = []
  for row in table.rows:
    cells = {column: row[column] for column in others}
    for name in measured:
      mean, deviation = (row[f'{name}_{kind}'] for kind in ('mean', 'std'))
      cells[name] = '-' if mean is None else FORMS[name](mean)
      if deviation is not None:
        cells[name] += f' ± {FORMS[name](deviation)}'
    rows.append(cells)
  return Table((*others, *measured), rows)


def _shown(column: str, value: Any) -> str:
  if value is None or value == '':
    return '-'
  if isinstance(value, str):
    return value
  if column in FORMS:
    return FORMS[column](value)
  return quantity(value) if column in RESULTS else str(value)
