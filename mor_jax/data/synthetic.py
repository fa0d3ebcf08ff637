"""Rows of tasks whose difficulty is known (`tasks.py`), made on the fly.

`data.source='synthetic:NAME,KEY=VALUE...'`. The rows are endless, a function of their index alone, and need no
tokenizer: a task has a vocabulary of words. Whether an example is for training or for validation is decided by a
hash of what it asks about, so that no validation example can occur in training.
"""

import dataclasses
import functools
import hashlib
import typing
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from mor_jax.config import ConfigError, DataConfig
from mor_jax.data import tasks
from mor_jax.data.manifest import FORMAT_VERSION, Manifest, SplitCounts
from mor_jax.data.packing import ROW_ARRAYS
from mor_jax.data.tokenizer import END_OF_TEXT, Tokenizer

PREFIX = 'synthetic:'
ENDLESS = 2**31  # rows: at a million tokens a second of rows of 64, a day and a half
HELD_OUT = 16  # one example in so many is for validation
MOST_TRIES = 1000  # to find an example of a split, where one in HELD_OUT should be
UNKNOWN = '<unk>'

Row = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Source:
  """What `data.source` asks for.

  Attributes:
    task: a task of `tasks.TASKS`.
    copy: share of the documents that are filler instead.
    rows: validation rows.
    seed: other examples for another seed.
  """

  task: tasks.Task
  copy: float = 0.0
  rows: int = 256
  seed: int = 0

  @functools.cached_property
  def vocabulary(self) -> dict[str, int]:
    """Id of every word."""
    words = {END_OF_TEXT: 0, UNKNOWN: 1, **self.task.vocabulary}
    if self.copy:
      others = [word for word in tasks.Copy().vocabulary if word not in words]
      words |= tasks.numbered(others, first=max(words.values()) + 1)
    return words

  @functools.cached_property
  def lengths(self) -> tuple[int, int]:
    """Fewest and most tokens that an example has."""
    kinds = [self.task.lengths] + [tasks.Copy().lengths] * bool(self.copy)
    return min(shortest for shortest, _ in kinds), max(longest for _, longest in kinds)

  def row(self, split: str, index: int, seq_len: int) -> Row:
    """A row (T,): as many examples as fit, each a segment of its own; see `SyntheticRows`."""
    rng = np.random.default_rng((self.seed, int(split == 'validation'), index))
    row = {name: np.zeros(seq_len, np.int32) for name in (*ROW_ARRAYS, *SyntheticDataset.extras)}
    row['difficulty'][:] = tasks.NOT_SCORED
    begin, segment = 0, 0
    while begin + self.lengths[0] <= seq_len:
      example = self._example(rng, split)
      size = len(example.words)
      if begin + size > seq_len:
        break
      segment += 1
      place = slice(begin, begin + size)
      words = [(example.targets or {}).get(index, word) for index, word in enumerate(example.words)]
      row['tokens'][place] = [self.vocabulary[word] for word in example.words]
      row['targets'][place] = [self.vocabulary[word] for word in words]
      row['segment_ids'][place], row['positions'][place] = segment, np.arange(size)
      row['difficulty'][place] = example.difficulty
      begin += size
    row['loss_mask'][:] = row['difficulty'] > tasks.NOT_SCORED
    return row

  def _example(self, rng: np.random.Generator, split: str) -> tasks.Example:
    """The next document that belongs to the split."""
    for _ in range(MOST_TRIES):
      task = tasks.Copy() if self.copy and rng.random() < self.copy else self.task
      example = task.example(rng)
      digest = hashlib.blake2b(f'{self.seed} {example.about}'.encode(), digest_size=8).digest()
      if (int.from_bytes(digest) % HELD_OUT == 0) == (split == 'validation'):
        return example
    raise ConfigError(
      f'{self.task} has so few different examples that none of them is left for {split}; make it larger'
    )

  def tokenizer(self) -> Tokenizer:
    """The task's words as a tokenizer, which only those need who read or write its texts."""
    backend = tokenizers.Tokenizer(models.WordLevel(self.vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([END_OF_TEXT])
    return Tokenizer(backend, END_OF_TEXT, None)


def parse(source: str) -> Source:
  """What 'synthetic:NAME,KEY=VALUE...' asks for. Raises ConfigError for what is no task."""
  name, *settings = source.removeprefix(PREFIX).split(',')
  if name not in tasks.TASKS:
    raise ConfigError(f'data.source={source}: {name!r} is not one of the tasks {", ".join(tasks.TASKS)}')
  made: dict[type, dict[str, Any]] = {tasks.TASKS[name]: {}, Source: {}}
  kinds: dict[str, tuple[type, type]] = {
    key: (owner, kind)
    for owner in made
    for key, kind in typing.get_type_hints(owner).items()
    if key != 'task'
  }
  for setting in settings:
    key, equals, text = setting.partition('=')
    if not equals or key not in kinds:
      raise ConfigError(
        f'data.source={source}: {setting!r} is no setting of {name}; it has {", ".join(sorted(kinds))}, '
        f'each written as KEY=VALUE'
      )
    owner, kind = kinds[key]
    try:
      made[owner][key] = {'true': True, 'false': False}[text] if kind is bool else kind(text)
    except (ValueError, KeyError):
      kind_name = 'true or false' if kind is bool else f'a number ({kind.__name__})'
      raise ConfigError(f'data.source={source}: {key}={text} must be {kind_name}') from None
  try:
    task = tasks.TASKS[name](**made[tasks.TASKS[name]])
    task.check()
    found = Source(task, **made[Source])
    tasks.at_least('rows', found.rows, 1)
    tasks.at_least('seed', found.seed, 0)
    if not 0 <= found.copy < 1:
      raise ValueError(f'copy={found.copy} must be in [0, 1)')
  except ValueError as error:
    raise ConfigError(f'data.source={source}: {error}') from None
  return found


class SyntheticRows(Sequence):
  """The rows of a split by index.

  `rows[i]` is a dict of int32 arrays (T,): 'tokens', 'segment_ids' and 'positions' as those of a prepared dataset;
  'targets', what is to be predicted in a token's place; 'loss_mask', 1 for tokens that are scored when they are
  predicted; and their 'difficulty', else `tasks.NOT_SCORED`.
  """

  def __init__(self, source: Source, split: str, seq_len: int):
    self._row: Callable[[int], Row] = lambda index: source.row(split, index, seq_len)
    self._length = source.rows if split == 'validation' else ENDLESS

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> Row:  # type: ignore[override]  # slices are not needed
    return self._row(range(len(self))[index])


@dataclasses.dataclass(frozen=True)
class SyntheticDataset:
  """A task as a dataset; in place of a `PreparedDataset`. Its manifest counts the validation split exactly."""

  source: Source
  tokenizer: Tokenizer
  manifest: Manifest
  extras: ClassVar[tuple[str, ...]] = ('targets', 'loss_mask', 'difficulty')

  def identity(self) -> dict[str, Any]:
    """What all processes of a training must find alike."""
    return {"the data's documents_digest": self.manifest.documents_digest}

  def rows(self, split: str) -> SyntheticRows:
    """The rows of 'train' or 'validation'."""
    return SyntheticRows(self.source, split, self.manifest.seq_len)


def open_dataset(data: DataConfig) -> SyntheticDataset:
  """The task of `data.source` as a dataset.

  Raises:
    ConfigError: there is no such task, or its examples are longer than a row.
  """
  source, length = parse(data.source), data.seq_len
  longest = source.lengths[1]
  if longest > length:
    raise ConfigError(
      f'data.seq_len={length} is too short for data.source={data.source}, whose examples have up to {longest} '
      f'tokens; set data.seq_len={longest}, or ask for smaller ones'
    )
  tokenizer = source.tokenizer()
  rows = [source.row('validation', index, length) for index in range(source.rows)]
  tokens = sum(int((row['segment_ids'] > 0).sum()) for row in rows)
  validation = SplitCounts(
    documents=sum(int(row['segment_ids'].max()) for row in rows),
    bytes=sum(len(tokenizer.decode(row['tokens'][row['segment_ids'] > 0].tolist())) for row in rows),
    tokens=tokens,
    targets=sum(int(row['loss_mask'].sum()) for row in rows),
    rows=len(rows),
    cut=0,
  )
  share = ENDLESS / len(rows)
  train = SplitCounts(
    **{
      name: round(value * share) for name, value in dataclasses.asdict(validation).items() if name != 'rows'
    },
    rows=ENDLESS,
  )
  manifest = Manifest(
    format_version=FORMAT_VERSION,
    source=data.source,
    documents_digest=hashlib.sha256(repr(source).encode()).hexdigest(),
    seq_len=length,
    packing='examples',
    tokenizer='words',
    separator=END_OF_TEXT,
    vocab_size=tokenizer.vocab_size,
    tokenizer_digest=tokenizer.digest,
    dropped={},
    dropped_examples=[],
    splits={'train': train, 'validation': validation},
    files={},
  )
  return SyntheticDataset(source, tokenizer, manifest)
