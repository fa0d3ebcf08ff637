"""Live data: a stream is tokenised and packed while the model trains (`data.live`).

This is for streams that cannot be prepared first. Documents are grouped into units, as during preparation.
The hosts take units in turn; each tokenises its own and shuffles their rows. Three numbers describe the
position of a host: the pass over the stream, the unit, and the rows taken from it. A resumed run reads the
stream up to that unit without tokenising, then continues with the next row.

Unlike batches of a prepared dataset, these depend on the number of hosts.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from grain.experimental import ThreadPrefetchIterDataset

from mor_jax.config import ConfigError, DataConfig
from mor_jax.data import corpus, packing, pipeline
from mor_jax.data import tokenizer as tokenizers
from mor_jax.data.conversations import converter, open_chats
from mor_jax.data.manifest import FORMAT_VERSION, Manifest, SplitCounts
from mor_jax.data.schedule import BatchSchedule

UNIT_CHARACTERS = 2**20  # rows are shuffled within a unit: some 100 of 2,048 tokens

Row = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Position:
  """Position of one host in the stream: the next row is row `row` of unit `unit` in pass `epoch`.

  `digest` identifies the unit's documents, so that a resumed run can tell whether the stream has
  changed. It is '' before the first row of the unit.
  """

  epoch: int = 0
  unit: int = 0
  row: int = 0
  digest: str = ''


@dataclasses.dataclass(frozen=True)
class LiveDataset:
  """A stream and its tokenizer. Validation rows are in memory; `LiveRows` reads training rows.

  It replaces a `PreparedDataset`. Its manifest has counts for the validation split only.
  """

  data: DataConfig
  tokenizer: tokenizers.Tokenizer
  manifest: Manifest
  validation: list[Row]
  chats: Any = None  # what conversations go through (`chats.Chats`); none: documents are texts

  @property
  def extras(self) -> tuple[str, ...]:
    """Arrays that rows have beside tokens, segments and positions."""
    return self.manifest.extras

  def reading(self) -> corpus.Reading:
    """One pass over the stream."""
    return corpus.Reading(self.data, converter(self.chats))

  def identity(self) -> dict[str, Any]:
    """What all processes of a training must find alike; copies of files may have other times."""
    names = ('tokenizer_digest', 'template_digest')
    return {f"the data's {name}": getattr(self.manifest, name) for name in names}

  def rows(self, split: str) -> list[Row]:
    """The rows of 'validation'. Raises ValueError for 'train', which is a stream."""
    if split != 'validation':
      raise ValueError(f'the {split} rows of a live dataset can only be read in order')
    return self.validation


def open_dataset(data: DataConfig, report: Callable[[str], None] = lambda line: None) -> LiveDataset:
  """Reads the start of the stream to collect `data.live_validation_rows` validation rows.

  Raises:
    ConfigError: the source or tokenizer cannot be used, or does not fill one validation row.
  """
  tokenizer = tokenizers.build(data)
  chats = open_chats(data, tokenizer)
  reading = corpus.Reading(data, converter(chats))
  counts: Counter[str] = Counter()
  rows: list[Row] = []
  report(f'reading the head of {data.source} for validation')
  for unit in pipeline.units(reading, UNIT_CHARACTERS // 16):
    if unit.split == 'validation':
      packed = pipeline.pack_texts(tokenizer, data, unit.texts)
      for row in packed.rows[: data.live_validation_rows - len(rows)]:
        rows.append(packing.unpack(row))
        counts.update(rows=1, tokens=row.num_tokens, targets=row.num_targets)
      # Bytes of the rows kept, in the proportion of the unit: a row has no bytes of its own.
      counts.update(
        {name: packed.counts[name] for name in ('documents', 'bytes', 'cut', 'too_long')},
        all=packed.counts['tokens'],
      )
      pipeline.check_unsaid(data, packed.counts, at_least=1)
    if len(rows) >= data.live_validation_rows:
      break
  if not rows or counts['tokens'] < data.seq_len:
    raise ConfigError(
      f'data.source={data.source} gives not one full row of data.seq_len={data.seq_len} tokens for validation; '
      f'raise data.validation_fraction={data.validation_fraction} or lower data.seq_len'
    )
  too_long = counts.pop('too_long')
  counts['bytes'] = round(counts['bytes'] * counts['tokens'] / counts.pop('all'))
  nothing = SplitCounts(documents=0, bytes=0, tokens=0, targets=0, rows=0, cut=0)
  manifest = Manifest(
    format_version=FORMAT_VERSION,
    source=data.source,
    documents_digest=corpus.open_source(data).fingerprint(),
    seq_len=data.seq_len,
    packing=data.packing,
    tokenizer=tokenizers.fingerprint(data),
    separator=data.separator,
    begin=tokenizer.begin,
    vocab_size=tokenizer.vocab_size,
    tokenizer_digest=tokenizer.digest,
    dropped={},
    dropped_examples=[],
    splits={'train': nothing, 'validation': SplitCounts(**counts)},
    files={},
    extras=('loss_mask',) if chats else (),
    chat=chats.describe() if chats else None,
    too_long=too_long,
  )
  return LiveDataset(data, tokenizer, manifest, rows, chats)


class LiveRows(grain.IterDataset):
  """The endless training rows of one host: pass after pass over the stream."""

  def __init__(self, dataset: LiveDataset, host: int, num_hosts: int):
    super().__init__()
    self.dataset, self.host, self.num_hosts = dataset, host, num_hosts

  def __iter__(self) -> 'LiveRowIterator':
    return LiveRowIterator(self)


class LiveRowIterator(grain.DatasetIterator):
  """Iterator over `LiveRows`. Its state is a `Position` as a dict.

  Raises on reading:
    ConfigError: the stream is unreadable, has changed since the position was saved, or has
      fewer units than there are hosts.
  """

  def __init__(self, rows: LiveRows):
    super().__init__()
    self._rows_of = rows
    self.set_state(dataclasses.asdict(Position()))

  def get_state(self) -> dict[str, Any]:
    """The position of the next row."""
    return dataclasses.asdict(self._position)

  def set_state(self, state: dict[str, Any]) -> None:
    """Moves to a position. The stream is read up to there when the next row is requested."""
    self._position = Position(**state)
    self._rows = self._read(self._position)

  def __next__(self) -> Row:
    row, self._position = next(self._rows)
    return row

  def _read(self, start: Position) -> Iterator[tuple[Row, Position]]:
    """Yields (row, position after it), beginning at `start`."""
    data, skipped = self._rows_of.dataset.data, start.row
    for epoch in itertools.count(start.epoch):
      first, own = (start.unit if epoch == start.epoch else 0), 0
      for number, unit in self._own_units():
        own += 1
        if number < first:
          continue
        if skipped and unit.digest != start.digest:
          raise ConfigError(
            f'data.source={data.source} is not the stream that the run has read so far: it differs in unit '
            f'{number} of pass {epoch}; restore it, or start a new run in another --workdir'
          )
        rows = self._shuffled(unit, epoch, number)
        for index in range(skipped, len(rows)):
          yield rows[index], Position(epoch, number, index + 1, unit.digest)
        skipped = 0
      if not own:
        raise ConfigError(
          f'data.source={data.source} is too small to be read live by {self._rows_of.num_hosts} hosts; prepare it: '
          f'data.live=false'
        )

  def _own_units(self) -> Iterator[tuple[int, pipeline.Unit]]:
    """Yields (number, unit) for this host's units in a pass over the stream."""
    units = pipeline.units(self._rows_of.dataset.reading(), UNIT_CHARACTERS)
    train = (unit for unit in units if unit.split == 'train')
    return itertools.islice(enumerate(train), self._rows_of.host, None, self._rows_of.num_hosts)

  def _shuffled(self, unit: pipeline.Unit, epoch: int, number: int) -> list[Row]:
    dataset = self._rows_of.dataset
    rows = pipeline.pack_texts(dataset.tokenizer, dataset.data, unit.texts).rows
    order = np.random.default_rng((dataset.data.seed, epoch, number)).permutation(len(rows))
    return [packing.unpack(rows[index]) for index in order]


class LiveBatches:
  """Iterator over the batches of one host, int32 arrays (B, T), beginning at a position.

  Attributes:
    position: position of the first row after the latest batch.
  """

  def __init__(
    self,
    dataset: LiveDataset,
    schedule: BatchSchedule,
    start_step: int = 0,
    position: dict[str, Any] | None = None,
    host: int = 0,
    num_hosts: int = 1,
  ):
    """Starts at `position`, saved after `start_step` steps, or at the start of the stream if None."""
    rows = LiveRows(dataset, host, num_hosts)
    largest = max(size for _, size in schedule.stages) // num_hosts
    ahead = ThreadPrefetchIterDataset(rows, prefetch_buffer_size=dataset.data.prefetch * largest)
    self._rows, self._schedule, self._step, self._hosts = iter(ahead), schedule, start_step, num_hosts
    self.position = position or dataclasses.asdict(Position())
    if position:
      self._rows.set_state(position)

  def __iter__(self) -> 'LiveBatches':
    return self

  def __next__(self) -> Row:
    count = self._schedule.rows(self._step) // self._hosts
    rows = [next(self._rows) for _ in range(count)]
    self._step += 1
    self.position = self._rows.get_state()
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
