"""What an evaluation found, as tables for a terminal."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

TITLES = {'topk': 'top-k', 'threshold': 'threshold', 'none': ''}


def print_held_out(console: Console, result: dict[str, Any]) -> None:
  """The tables of `held_out.evaluate`: the whole model, by recursion limit, by position."""
  modes = result['routing']
  first = next(iter(modes.values()))
  data = result['data']
  text = (
    f'{result["run"]}, step {result["step"]:,}: {data["rows"]:,} rows of {data["seq_len"]:,} tokens of '
    f'{data["source"]}, {first["predicted_tokens"]:,} tokens predicted'
  )
  console.print(text, highlight=False, markup=False, soft_wrap=True)
  _print(console, 'Whole model', _whole(result))
  if len(first['recursion_limits']) > 1:
    _print(console, 'By recursion limit', _limits(modes))
  _print(console, 'By position: tokens of the document before', _positions(modes))


def _print(console: Console, title: str, table: Table) -> None:
  console.print(f'\n{title}', style='bold', highlight=False, soft_wrap=True)
  console.print(table)


def _table(first: str, modes: dict[str, Any], columns: list[str]) -> Table:
  table = Table(first)
  for mode in modes:
    for column in columns:
      table.add_column(f'{TITLES[mode]} {column}'.strip(), justify='right')
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
  """(label, text for every mode, key) of all figures that the model has."""
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
