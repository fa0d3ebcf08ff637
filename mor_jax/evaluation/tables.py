"""Tables of evaluation results for the terminal: held-out losses, and tasks next to the paper's results."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from mor_jax.console import print_line

# Few-shot accuracy of models on 16.5e18 FLOPs at 360M (paper, Table 3), in per cent, in the order of BENCHMARKS.
TABLE_3 = {
  'vanilla, 315M': (32.0, 37.8, 65.6, 50.5, 39.6, 28.0),
  'recursive, R = 2': (31.0, 37.1, 66.7, 52.3, 40.8, 27.5),
  'recursive, R = 3': (29.8, 35.9, 65.0, 52.3, 39.0, 27.2),
  'recursive, R = 4': (28.2, 35.4, 65.5, 52.5, 38.0, 26.8),
  'MoR expert-choice, R = 2': (34.4, 39.3, 65.7, 51.2, 39.6, 28.1),
  'MoR expert-choice, R = 3': (33.1, 37.9, 66.9, 52.1, 38.3, 27.4),
  'MoR expert-choice, R = 4': (30.1, 37.3, 65.0, 51.1, 38.9, 27.4),
  'MoR token-choice, R = 3': (27.6, 34.1, 63.8, 50.6, 37.4, 26.8),
  'MoR expert-choice, R = 3, shared KV': (31.7, 37.2, 65.1, 51.0, 39.0, 27.1),
}
# Title, part of the names of its tasks, and whether the paper's accuracy is normalised by the answer's length.
BENCHMARKS = (
  ('LAMBADA', 'lambada', False),
  ('HellaSwag', 'hellaswag', True),
  ('PIQA', 'piqa', True),
  ('WinoGrande', 'winogrande', False),
  ('ARC', 'arc_', True),
  ('MMLU', 'mmlu', False),
)
TITLES = {'topk': 'top-k', 'threshold': 'threshold', 'none': '', 'oracle': 'oracle (optimistic)'}


def print_held_out(console: Console, result: dict[str, Any]) -> None:
  """Prints the results of `held_out.evaluate`: for the whole model, by recursion limit and by position."""
  modes = result['routing']
  first = next(iter(modes.values()))
  data = result['data']
  text = (
    f'{result["run"]}, step {result["step"]:,}: {data["rows"]:,} rows of {data["seq_len"]:,} tokens of '
    f'{data["source"]}, {first["predicted_tokens"]:,} tokens predicted'
  )
  print_line(console, text)
  _print(console, 'Whole model', _whole(result))
  if len(first['recursion_limits']) > 1:
    _print(console, 'By recursion limit', _limits(modes))
  if 'by_difficulty' in first:
    _print(console, 'By difficulty', _difficulties(modes))
  _print(console, 'By position: tokens of the document before', _positions(modes))

  if exits := result.get('exits'):
    _print_exits(console, exits)


def _print_exits(console: Console, exits: dict[str, Any]) -> None:
  table = Table('readout', 'recursions k')
  for column in ('loss', 'on every second row', 'temperature fitted on the others', 'loss with it'):
    table.add_column(column, justify='right')
  for entry in exits['readouts']:
    losses = (f'{entry[name]:.4f}' for name in ('nll', 'nll_other_rows'))
    table.add_row(
      entry['control'],
      str(entry['k']),
      *losses,
      f'{entry["temperature"]:.2f}',
      f'{entry["nll_at_temperature"]:.4f}',
    )
  _print(console, 'What recursions are worth: readouts of one forward pass', table)
  if 'contrast' in exits:
    table = Table('weight w', 'loss')
    for entry in exits['contrast']:
      table.add_row(f'{entry["weight"]:g}', f'{entry["nll"]:.4f}')
    _print(console, 'Contrast decoding: z_R + w (z_R - z_1)', table)
  if 'calibration' in exits:
    table = Table('recursion', 'probability')
    for column in ('tokens', 'better served later', 'gain of the next, nats'):
      table.add_column(column, justify='right')
    for entry in exits['calibration']:
      bounds = f'{entry["from"]:.1f} to {entry["to"]:.1f}'
      values = (f'{entry["tokens"]:,}', f'{entry["better"]:.1%}', f'{entry["gain"]:+.4f}')
      table.add_row(str(entry['recursion']), bounds, *values)
    _print(console, 'What routers thought of going on, and what it was worth', table)
    table = Table('recursion', 'token identity', 'position')
    for entry in exits['explained']:
      shares = ('-' if entry[name] is None else f'{entry[name]:.1%}' for name in ('token', 'position'))
      table.add_row(str(entry['recursion']), *shares)
    _print(console, "Share of the variance of routers' scores that is explained by", table)


def _difficulties(modes: dict[str, Any]) -> Table:
  table = _table('difficulty', modes, ['accuracy', 'loss', 'depth'])
  table.add_column('tokens', justify='right')
  for entries in zip(*(mode['by_difficulty'] for mode in modes.values()), strict=True):
    row = [str(entries[0]['difficulty'])]
    for entry in entries:
      row += [f'{entry["accuracy"]:.1%}', f'{entry["nll"]:.4f}', f'{entry["mean_depth"]:.2f}']
    table.add_row(*row, f'{entries[0]["predicted_tokens"]:,}')
  cells = []
  for mode in modes.values():
    correlation = mode['rank_correlation']
    cells += [
      f'{mode["accuracy"]:.1%}',
      f'{mode["nll"]:.4f}',
      '' if correlation is None else f'r={correlation:.2f}',
    ]
  first = next(iter(modes.values()))
  table.add_row('all', *cells, f'{first["predicted_tokens"]:,}', style='bold')
  return table


def _print(console: Console, title: str, table: Table) -> None:
  console.print(f'\n{title}', style='bold', highlight=False, soft_wrap=True)
  console.print(table)


def _table(first: str, modes: dict[str, Any], columns: list[str]) -> Table:
  table = Table(first)
  for mode in modes:
    for column in columns:
      table.add_column(f'{TITLES.get(mode, mode)} {column}'.strip(), justify='right')
  return table


def _whole(result: dict[str, Any]) -> Table:
  modes, gap = result['routing'], result.get('gap', {})
  table = _table('routing' if gap else 'model', modes, ['' if gap else 'value'])
  if gap:
    table.add_column('gap', justify='right')
  for label, texts, name in _figures(result):
    table.add_row(label, *texts, *([_signed(gap.get(name))] if gap else []))
  return table


def _figures(result: dict[str, Any]) -> Iterator[tuple[str, list[str], str]]:
  """Yields (label, text for every mode, key) of all available figures."""
  modes = result['routing']
  named = [
    ('loss, nats per token', 'nll', '.4f'),
    ('perplexity', 'perplexity', '.3f'),
    ('bits per byte', 'bits_per_byte', '.4f'),
    ('mean depth', 'mean_depth', '.2f'),
  ]
  routed = result['model']['kind'] == 'mor'
  capacities = result['model']['capacities'] if routed else ()
  for step, capacity in enumerate(capacities, start=1):
    named += [(f'tokens in recursion {step} (capacity {capacity:.0%})', f'tokens_recursion_{step}', '.1%')]
  named += [
    ('router: sampling accuracy', 'sampling_accuracy', '.1%'),
    ('dead tokens', 'dead_token_ratio', '.1%'),
    ('tokens that found no place', 'overflow_ratio', '.2%'),
  ]
  for step, _ in enumerate(capacities, start=1):
    named += [(f'  in recursion {step}', f'overflow_recursion_{step}', '.2%')]
  for label, name, form in named:
    if any(name in mode for mode in modes.values()):
      texts = {key: format(mode[name], form) for key, mode in modes.items()}
      if name == 'sampling_accuracy' and 'threshold' in texts:
        texts['threshold'] = ''  # it tells how well the causal rule foretells top-k
      yield label, list(texts.values()), name


def _limits(modes: dict[str, Any]) -> Table:
  routed = 'threshold' in modes
  table = _table('at most', modes, ['loss', 'depth'] if routed else ['loss'])
  if not routed:
    table.add_column('perplexity', justify='right')
    table.add_column('bits per byte', justify='right')
  for limits in zip(*(mode['recursion_limits'] for mode in modes.values()), strict=True):
    row = [str(limits[0]['max_recursions'])]
    for limit in limits:
      row.append(f'{limit["nll"]:.4f}')
      row += [f'{limit["mean_depth"]:.2f}'] if routed else []
      row += [] if routed else [f'{limit["perplexity"]:.3f}', f'{limit["bits_per_byte"]:.4f}']
    table.add_row(*row)
  return table


def _positions(modes: dict[str, Any]) -> Table:
  routed = 'threshold' in modes
  columns = ['loss', 'depth'] if routed else ['loss']
  table = _table('position', modes, columns)
  if routed:
    table.add_column('found no place', justify='right')
  table.add_column('tokens', justify='right')
  for bins in zip(*(mode['positions'] for mode in modes.values()), strict=True):
    first, last = bins[0]['first'], bins[0]['last']
    row = [f'{first:,}' if first == last else f'{first:,} to {last:,}']
    for entry in bins:
      row.append(f'{entry["nll"]:.4f}')
      row += [f'{entry.get("mean_depth", 0):.2f}'] if routed else []
    row += [f'{bins[-1].get("overflow_ratio", 0):.2%}'] if routed else []
    table.add_row(*row, f'{bins[0]["predicted_tokens"]:,}')
  return table


def _signed(value: float | None) -> str:
  return '' if value is None else f'{value:+.4f}'


def print_few_shot(console: Console, result: dict[str, Any]) -> None:
  """Prints the results of lm-evaluation-harness, and Table 3 of the paper next to them if it has the benchmarks."""
  table = Table('task', 'examples', 'shots', 'metric')
  for column in ('value', 'standard error'):
    table.add_column(column, justify='right')
  for name, values in result['results'].items():
    count = result.get('n-samples', {}).get(name, {}).get('effective')
    label, examples, shots = (
      values.get('alias', name),
      '' if count is None else f'{count:,}',
      result['n-shot'],
    )
    for metric, value, error in _metrics(values):
      row = (label, examples, str(shots.get(name, '')), metric, f'{value:.4f}')
      table.add_row(*row, f'{error:.4f}' if isinstance(error, float) else '')
      label = examples = ''
  console.print(table)
  if columns := _of_the_paper(result):
    _print(console, 'Accuracy in per cent, beside models of 360M in the paper (Table 3)', _beside(columns))


def _metrics(values: dict[str, Any]) -> Iterator[tuple[str, float, Any]]:
  """Yields (metric, value, standard error) from a task's entry, whose keys are `metric,filter`."""
  for key, value in values.items():
    metric, _, how = key.partition(',')
    if how and not metric.endswith('_stderr') and isinstance(value, int | float):
      yield metric if how == 'none' else f'{metric} ({how})', value, values.get(f'{metric}_stderr,{how}')


def _of_the_paper(result: dict[str, Any]) -> dict[str, float]:
  """Accuracy in per cent for each benchmark of Table 3 in the results; the mean if it has several tasks."""
  found = {}
  for title, part, normalised in BENCHMARKS:
    accuracies = []
    # Of a group and its members the group counts.
    members = {member for group in result.get('group_subtasks', {}).values() for member in group}
    for name, values in result['results'].items():
      keys = ('acc_norm,none', 'acc,none') if normalised else ('acc,none',)
      known = [values[key] for key in keys if key in values]
      if part in name and name not in members and known:
        accuracies.append(100 * known[0])
    if accuracies:
      found[title] = sum(accuracies) / len(accuracies)
  return found


def _beside(columns: dict[str, float]) -> Table:
  table = Table('model')
  for title in columns:
    table.add_column(title, justify='right')
  table.add_row('this run', *(f'{value:.1f}' for value in columns.values()), style='bold')
  for model, values in TABLE_3.items():
    of_title = dict(zip((title for title, *_ in BENCHMARKS), values, strict=True))
    table.add_row(model, *(f'{of_title[title]:.1f}' for title in columns))
  return table
