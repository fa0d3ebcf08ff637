"""Shows a prepared dataset to the user: rows with their segments, segment lengths, tokens per byte."""

import itertools

import numpy as np
from rich.console import Console
from rich.table import Table

from mor_jax.config import ConfigError
from mor_jax.data.dataset import PreparedDataset

SAMPLED_ROWS = 2000  # for the histogram
SHOWN_CHARACTERS = 160  # of a segment: its beginning and its end


def show(console: Console, dataset: PreparedDataset, split: str, num_rows: int) -> None:
  """Prints counts, a histogram of segment lengths and the first rows of a split.

  Raises:
    ConfigError: there is no such split.
  """
  manifest = dataset.manifest
  if split not in manifest.splits:
    raise ConfigError(f'--split={split} is not one of {", ".join(manifest.splits)}')
  counts, rows = manifest.splits[split], dataset.rows(split)
  padding = 1 - counts.tokens / (counts.rows * manifest.seq_len)
  table = Table(show_header=False, box=None)
  for name, value in {
    'source': manifest.source,
    'tokenizer': f'{manifest.tokenizer}, {dataset.tokenizer.entries:,} entries',
    'rows': f'{counts.rows:,} of {manifest.seq_len} tokens, packing {manifest.packing}, {padding:.2%} padding',
    'documents': f'{counts.documents:,}, {counts.cut:,} longer than a row',
    'text': f'{counts.bytes / 1e6:,.1f} MB, {counts.tokens:,} tokens, {1 / counts.bytes_per_token:.3f} tokens per byte',
    'left out': ', '.join(f'{count:,} {reason}' for reason, count in manifest.dropped.items()) or 'nothing',
  }.items():
    table.add_row(name, value)
  console.print(table, highlight=False, markup=False)
  _print_histogram(console, segment_lengths(dataset, split), min(len(rows), SAMPLED_ROWS))
  for index in range(min(num_rows, len(rows))):
    _print_row(console, dataset, index, rows[index])


def segment_lengths(dataset: PreparedDataset, split: str) -> np.ndarray:
  """Tokens in each segment of the first SAMPLED_ROWS rows."""
  rows = itertools.islice(dataset.rows(split), SAMPLED_ROWS)
  return np.concatenate([np.bincount(row['segment_ids'])[1:] for row in rows])


def _print_histogram(console: Console, lengths: np.ndarray, num_rows: int) -> None:
  console.print(f'\nsegments by length, in {num_rows:,} rows', highlight=False)
  powers = np.frexp(lengths)[1] - 1  # of two
  counts = np.bincount(powers)
  for power in range(powers.min(), powers.max() + 1):
    bar = '█' * round(40 * counts[power] / counts.max())
    label = f'{2**power:,} to {2 ** (power + 1) - 1:,}'
    console.print(f'  {label:>18}  {counts[power]:>8,}  {bar}', highlight=False)


def _print_row(console: Console, dataset: PreparedDataset, index: int, row: dict[str, np.ndarray]) -> None:
  console.print(f'\n── row {index}', highlight=False)
  tokens_T, segments_T = row['tokens'], row['segment_ids']
  for segment in range(1, segments_T.max() + 1):
    tokens = tokens_T[segments_T == segment]
    ends = 'ends here' if tokens[-1] == dataset.tokenizer.end_of_text else 'continues in another row'
    console.print(f'── segment {segment}: {len(tokens):,} tokens, {ends}', highlight=False)
    console.print(_shortened(dataset.tokenizer.decode(tokens)), highlight=False, markup=False, soft_wrap=True)
  padding = int(np.sum(segments_T == 0))
  if padding:
    console.print(f'── padding: {padding:,} tokens', highlight=False)


def _shortened(text: str) -> str:
  if len(text) <= 2 * SHOWN_CHARACTERS:
    return text
  return f'{text[:SHOWN_CHARACTERS]} [...] {text[-SHOWN_CHARACTERS:]}'
