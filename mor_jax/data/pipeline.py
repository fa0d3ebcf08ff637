"""Documents to shards: in parallel, in bounded memory, and resumable after an interruption.

Documents are grouped into units of a few megabytes. Any process can encode and pack a unit
independently, and units are written in the order of their documents. The shards therefore
depend neither on the number of processes nor on interruptions. A note next to each finished
shard lists its units. A resumed run reads the documents again, which is fast, and encodes only
the units missing from finished shards.
"""

import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures

from mor_jax.config import ConfigError, DataConfig
from mor_jax.data import corpus, packing, rendered, shards
from mor_jax.data.document import Document
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.files import write_atomically

UNIT_CHARACTERS = 2**21  # 0.2% of a unit of 2,048-token rows is padding at its end
ENCODED_AT_ONCE = 2**20  # characters; the tokenizer needs some 40 bytes for each of them
NOTES = 'notes'  # folder, needed until the dataset is finished
JUDGED_AFTER = 100_000  # tokens
SMALL = 4  # fewer units are done sooner than processes start


@dataclasses.dataclass(frozen=True)
class Unit:
  """Consecutive documents of a split."""

  split: str
  texts: list[str]

  @functools.cached_property
  def digest(self) -> str:
    """Identifies the documents: equal digests mean equal documents."""
    hashed = hashlib.blake2b(digest_size=16)
    for text in self.texts:
      content = text.encode()
      hashed.update(len(content).to_bytes(8))
      hashed.update(content)
    return hashed.hexdigest()


@dataclasses.dataclass(frozen=True)
class PackedTexts:
  """Rows and their counts: documents, bytes, tokens, targets, rows, cut, too_long."""

  rows: list[packing.Row]
  counts: Counter[str]


@dataclasses.dataclass(frozen=True)
class PackedUnit:
  """Serialised rows of a unit and their counts: documents, bytes, tokens, targets, rows, cut, too_long."""

  records: list[bytes]
  counts: Counter[str]


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Everything a worker process needs to make a PackedUnit."""

  tokenizer_file: str
  separator: str
  begin: str | None
  seq_len: int
  packing: str
  format: str = 'text'
  too_long: str = 'cut'


def units(documents: Iterable[tuple[str, Document]], characters: int | None = None) -> Iterator[Unit]:
  """Groups (split, document) pairs into units of `characters` (default UNIT_CHARACTERS), in order within each split."""
  characters = characters or UNIT_CHARACTERS
  texts: dict[str, list[str]] = collections.defaultdict(list)
  sizes: Counter[str] = Counter()
  for split, document in documents:
    texts[split].append(document.text)
    sizes[split] += len(document.text)
    if sizes[split] >= characters:
      yield Unit(split, texts.pop(split))
      del sizes[split]
  for split in corpus.SPLITS:
    if texts[split]:
      yield Unit(split, texts[split])


@functools.cache
def _tools(recipe: Recipe) -> tuple[Tokenizer, shards.RowFormat]:
  tokenizer = Tokenizer.load(recipe.tokenizer_file, recipe.separator, recipe.begin)
  return tokenizer, shards.RowFormat(tokenizer.vocab_size, recipe.seq_len, recipe.format == 'chat')


def pack_unit(recipe: Recipe, texts: list[str]) -> PackedUnit:
  """Encodes, packs and serialises documents."""
  tokenizer, row_format = _tools(recipe)
  packed = pack_texts(tokenizer, recipe, texts)
  return PackedUnit([row_format.serialize(row) for row in packed.rows], packed.counts)


def pack_texts(tokenizer: Tokenizer, settings: Recipe | DataConfig, texts: list[str]) -> PackedTexts:
  """Encodes and packs documents with the `format`, `too_long`, `seq_len` and `packing` of `settings`."""
  counts: Counter[str] = Counter()
  encode = _encoded_chats if settings.format == 'chat' else _encoded_texts
  documents = encode(tokenizer, settings, texts, counts)
  rows = list(packing.PACKINGS[settings.packing](documents, settings.seq_len, tokenizer.end_of_text))
  for row in rows:
    counts.update(rows=1, tokens=row.num_tokens, targets=row.num_targets)
  return PackedTexts(rows, counts)


def _encoded_texts(
  tokenizer: Tokenizer, settings: Recipe | DataConfig, texts: list[str], counts: Counter[str]
) -> Iterator[list[int]]:
  """Yields the token ids of each text; adds to the counts of documents."""
  counts.update(documents=len(texts), bytes=sum(len(text.encode()) for text in texts))
  for batch in _batches(texts, ENCODED_AT_ONCE):
    encoded = tokenizer.encode_texts(batch)
    if unsaid := tokenizer.unsaid(batch, encoded):
      counts['unsaid'] += unsaid
    for ids in encoded:
      counts['cut'] += len(ids) + 1 > settings.seq_len
      yield ids


def _encoded_chats(
  tokenizer: Tokenizer, settings: Recipe | DataConfig, texts: list[str], counts: Counter[str]
) -> Iterator[packing.Scored]:
  """Yields the conversations as tokens, none longer than a row; adds to the counts of documents."""
  for batch in _batches(texts, ENCODED_AT_ONCE):
    conversations = [rendered.Rendered.from_text(text) for text in batch]
    encoded = rendered.encode(tokenizer, conversations)
    said = [rendered.without_specials(tokenizer, one.text) for one in conversations]
    if unsaid := tokenizer.unsaid(said, [one.ids_N.tolist() for one in encoded]):
      counts['unsaid'] += unsaid
    for conversation, one in zip(conversations, encoded, strict=True):
      is_long = len(one.ids_N) > settings.seq_len
      ids_N, mask_N, ends_N = (of_all[: settings.seq_len] for of_all in (one.ids_N, one.mask_N, one.ends_N))
      if is_long and (settings.too_long == 'skip' or not mask_N[1:].any()):
        counts['too_long'] += 1
        continue
      text = conversation.text[: ends_N[-1]].replace(rendered.APART, '')
      counts.update(documents=1, bytes=len(text.encode()), cut=int(is_long))
      yield packing.Scored(ids_N, mask_N)


def check_unsaid(data: DataConfig, counts: Counter[str], at_least: int = JUDGED_AFTER) -> None:
  """Raises ConfigError if the tokenizer cannot say more of the documents than `data.max_unknown_fraction` allows.

  Args:
    counts: of the documents so far, as `pack_texts` makes them.
    at_least: tokens, or what would have been tokens; fewer say little.
  """
  unsaid, whole = counts['unsaid'], max(counts['tokens'], counts['unsaid'])
  if whole >= at_least and unsaid > data.max_unknown_fraction * whole:
    raise ConfigError(
      f'data.tokenizer={data.tokenizer} has no token for {unsaid:,} characters or words of data.source={data.source}, '
      f'beside {counts["tokens"]:,} tokens: more than data.max_unknown_fraction={data.max_unknown_fraction:g}; use a '
      f'tokenizer for this language, or raise that share to lose such text'
    )


def _batches(texts: Iterable[str], characters: int) -> Iterator[list[str]]:
  """Yields lists of texts with at least `characters` characters in total (the last may have fewer)."""
  batch, size = [], 0
  for text in texts:
    batch.append(text)
    size += len(text)
    if size >= characters:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


# ---- processes ----


def packed(stream: Iterable[Unit], recipe: Recipe, workers: int) -> Iterator[tuple[Unit, PackedUnit]]:
  """Packs units in `workers` processes and yields them in order, with a few in memory at a time."""
  stream = iter(stream)
  head = list(itertools.islice(stream, SMALL))
  if workers == 1 or len(head) < SMALL:
    for unit in itertools.chain(head, stream):
      yield unit, pack_unit(recipe, unit.texts)
    return
  # Not fork: the threads of JAX and of the tokenizer do not survive it.
  context = multiprocessing.get_context('spawn')
  pool = futures.ProcessPoolExecutor(workers, context, initializer=_start_worker)
  pending: collections.deque[tuple[Unit, futures.Future[PackedUnit]]] = collections.deque()
  try:
    for unit in itertools.chain(head, stream):
      pending.append((unit, pool.submit(pack_unit, recipe, unit.texts)))
      while len(pending) > workers + 2 or (pending and pending[0][1].done()):
        yield _result(*pending.popleft())
    while pending:
      yield _result(*pending.popleft())
  finally:
    pool.shutdown(wait=True, cancel_futures=True)


def _result(unit: Unit, future: futures.Future[PackedUnit]) -> tuple[Unit, PackedUnit]:
  try:
    return unit, future.result()
  except futures.process.BrokenProcessPool as error:
    raise RuntimeError(
      'a process that tokenises has died, most likely because memory ran out; lower data.workers and run the '
      'same command again: it continues where it stopped'
    ) from error


def _start_worker() -> None:
  # The processes are the parallelism. The tokenizer's own single thread allocates faster than the main one:
  # encoding there takes four fifths of the time of TOKENIZERS_PARALLELISM=false (glibc).
  os.environ.update(TOKENIZERS_PARALLELISM='true', RAYON_NUM_THREADS='1')
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent ends its workers
  parent = multiprocessing.parent_process()

  def end_with_parent() -> None:
    if parent is not None:
      parent.join()
    os._exit(1)

  threading.Thread(target=end_with_parent, daemon=True).start()


# ---- shards ----


@dataclasses.dataclass(frozen=True)
class ShardNote:
  """The contents of a finished shard."""

  units: int
  digest: str  # of the documents
  num_bytes: int  # of the records
  counts: dict[str, int]


class SplitWriter:
  """Writes the shards of a split, each but the last with at least `rows_per_shard` rows. Resumes earlier writes."""

  def __init__(self, folder: pathlib.Path, split: str, rows_per_shard: int):
    self._folder, self._split, self._rows_per_shard = folder, split, rows_per_shard
    self.notes: list[ShardNote] = []
    while (note := self._note_path(len(self.notes))).exists():
      self.notes.append(ShardNote(**json.loads(note.read_text())))
    self._left_to_skip = [note.units for note in self.notes]
    self._start_shard()

  def _start_shard(self) -> None:
    self._file: shards.ShardFile | None = None
    self._units, self._hash = 0, hashlib.blake2b(digest_size=16)
    self._counts: Counter[str] = Counter()

  def shard_path(self, shard: int) -> pathlib.Path:
    """Path of a shard until it is published."""
    return self._folder / f'{self._split}-{shard:05d}.shard'

  def _note_path(self, shard: int) -> pathlib.Path:
    return self._folder / NOTES / f'{self._split}-{shard:05d}.json'

  @property
  def counts(self) -> Counter[str]:
    """Total counts of all finished shards."""
    return sum((Counter(note.counts) for note in self.notes), Counter())

  def has(self, unit: Unit) -> bool:
    """Whether the next unit is already in a finished shard. Call it once per unit, in order.

    Raises:
      ConfigError: the documents differ from those in the shard.
    """
    if not self._left_to_skip:
      return False
    self._hash.update(unit.digest.encode())
    self._left_to_skip[0] -= 1
    if self._left_to_skip[0] == 0:
      shard = len(self.notes) - len(self._left_to_skip)
      if self._hash.hexdigest() != self.notes[shard].digest:
        raise ConfigError(
          f'the documents are not those from which {self.shard_path(shard)} was made before preparation was '
          f'interrupted; delete {self._folder}, and all will be prepared anew'
        )
      self._left_to_skip.pop(0)
      self._start_shard()
    return True

  def append(self, unit: Unit, packed_unit: PackedUnit) -> None:
    """Adds the rows of a unit. Raises OSError if writing fails."""
    file = self._file = self._file or shards.ShardFile(self.shard_path(len(self.notes)))
    for record in packed_unit.records:
      file.append(record)
    self._units += 1
    self._hash.update(unit.digest.encode())
    self._counts.update(packed_unit.counts)
    if file.rows >= self._rows_per_shard:
      self._finish_shard(file)

  def _finish_shard(self, file: shards.ShardFile) -> None:
    file.close()
    note = ShardNote(self._units, self._hash.hexdigest(), file.num_bytes, dict(self._counts))
    path = self._note_path(len(self.notes))
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, json.dumps(dataclasses.asdict(note)))  # now the shard counts as finished
    self.notes.append(note)
    self._start_shard()

  def finish(self) -> None:
    """Finishes the last shard."""
    if self._file is not None:
      self._finish_shard(self._file)

  def publish(self) -> None:
    """Gives all shards their final names. Safe to repeat after an interruption."""
    shards.publish(self._folder, self._split, [self.shard_path(i) for i in range(len(self.notes))])


def write_splits(
  reading: Iterable[tuple[str, Document]],
  folder: pathlib.Path,
  recipe: Recipe,
  workers: int,
  progress: Callable[[Counter[str]], None],
) -> dict[str, SplitWriter]:
  """Encodes, packs and writes all documents. Returns the writers, with all shards finished.

  Args:
    reading: (split, document) pairs.
    folder: folder of the shards, including those of an interrupted call.
    recipe: how to make rows.
    workers: number of processes.
    progress: called after every unit with its counts, and `skipped=1` if it was in a finished shard.
  """
  rows_per_shard = max(1, shards.SHARD_TOKENS // recipe.seq_len)
  writers = {split: SplitWriter(folder, split, rows_per_shard) for split in corpus.SPLITS}

  def missing() -> Iterator[Unit]:
    for unit in units(reading):
      if not writers[unit.split].has(unit):
        yield unit
      else:
        progress(Counter(skipped=1, documents=len(unit.texts), bytes=sum(map(len, unit.texts))))

  for unit, packed_unit in packed(missing(), recipe, workers):
    writers[unit.split].append(unit, packed_unit)
    progress(packed_unit.counts)
  for writer in writers.values():
    writer.finish()
  return writers
