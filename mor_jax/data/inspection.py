"""Shows a prepared dataset to the user: rows with their segments, what of them is learned, lengths, tokens per byte."""

import itertools

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mor_jax.config import ConfigError
from mor_jax.console import has_colours
from mor_jax.data.dataset import PreparedDataset
from mor_jax.data.token_texts import token_texts
from mor_jax.data.tokenizer import Tokenizer

SAMPLED_ROWS = 2000  # for the histogram
SHOWN_CHARACTERS = 160  # of a segment: its beginning and its end
LEARNED, CONTEXT = 'bold green', 'bright_black'
BRACKETS = '[[', ']]'  # around what is learned, where there are no colours


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
    'documents': f'{counts.documents:,}, {counts.cut:,} longer than a row{_left_out(manifest.too_long)}',
    'text': f'{counts.bytes / 1e6:,.1f} MB, {counts.tokens:,} tokens, {1 / counts.bytes_per_token:.3f} tokens per byte',
    **_masked(dataset, split),
    'left out': ', '.join(f'{count:,} {reason}' for reason, count in manifest.dropped.items()) or 'nothing',
  }.items():
    table.add_row(name, value)
  console.print(table, highlight=False, markup=False)
  _print_histogram(console, segment_lengths(dataset, split), min(len(rows), SAMPLED_ROWS))
  if 'loss_mask' in dataset.extras and min(num_rows, len(rows)):
    console.print(_legend(console), highlight=False)
  for index in range(min(num_rows, len(rows))):
    _print_row(console, dataset, index, rows[index])


def _left_out(count: int) -> str:
  return f', {count:,} of them left out' if count else ''


def _masked(dataset: PreparedDataset, split: str) -> dict[str, str]:
  """What is learned of rows that have a mask; {} of others."""
  if 'loss_mask' not in dataset.extras:
    return {}
  counts, chat = dataset.manifest.splits[split], dataset.manifest.chat
  said = ', what the assistant says' if chat else ''
  return {'learned': f'{counts.targets:,} tokens, {counts.targets / counts.tokens:.1%}{said}'}


def _legend(console: Console) -> Text:
  if has_colours(console):
    return Text.assemble('\n', ('learned', LEARNED), ', ', ('context', CONTEXT))
  return Text(f'\n{BRACKETS[0]}learned{BRACKETS[1]}, context')


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
    if 'loss_mask' in row:
      mask = row['loss_mask'][segments_T == segment]
      console.print(
        f'── segment {segment}: {len(tokens):,} tokens, {int(mask.sum()):,} learned', highlight=False
      )
      console.print(learned_text(console, dataset.tokenizer, tokens, mask), highlight=False, soft_wrap=True)
      continue
    ends = 'ends here' if tokens[-1] == dataset.tokenizer.end_of_text else 'continues in another row'
    console.print(f'── segment {segment}: {len(tokens):,} tokens, {ends}', highlight=False)
    console.print(_shortened(dataset.tokenizer.decode(tokens)), highlight=False, markup=False, soft_wrap=True)
  padding = int(np.sum(segments_T == 0))
  if padding:
    console.print(f'── padding: {padding:,} tokens', highlight=False)


def learned_text(console: Console, tokenizer: Tokenizer, tokens: np.ndarray, mask: np.ndarray) -> Text:
  """The text of tokens, special ones spelled, with those that are learned in colour or in BRACKETS."""
  text, colours = Text(), has_colours(console)
  pieces = zip(spelled_texts(tokenizer, tokens), mask > 0, strict=True)
  for is_learned, group in itertools.groupby(pieces, key=lambda piece: piece[1]):
    part = _shortened(''.join(piece for piece, _ in group))
    if not colours and is_learned:
      part = part.join(BRACKETS)
    text.append(part, style=(LEARNED if is_learned else CONTEXT) if colours else '')
  return text


def spelled_texts(tokenizer: Tokenizer, tokens: np.ndarray) -> list[str]:
  """As `token_texts`, with the names of special tokens, which texts do not show."""
  pieces = zip(token_texts(tokenizer, tokens), tokens.tolist(), strict=True)
  return [text or ('' if tokenizer.decode([token]) else tokenizer.spelled(token)) for text, token in pieces]


def _shortened(text: str) -> str:
  if len(text) <= 2 * SHOWN_CHARACTERS:
    return text
  return f'{text[:SHOWN_CHARACTERS]} [...] {text[-SHOWN_CHARACTERS:]}'
