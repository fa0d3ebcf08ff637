"""Prepared datasets: a corpus as packed rows in one folder, built once and opened by name.

The folder holds the rows (shards.py), tokenizer.json, and manifest.json with the counts. It
is built under another name and renamed when it is complete, so a folder that has its final
name is finished.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from mor_jax.config import ConfigError, DataConfig
from mor_jax.data import corpus, packing, shards
from mor_jax.data import tokenizer as tokenizers

FORMAT_VERSION = 1  # raise it when the same settings would give another folder content
ENCODED_AT_ONCE = 2**22  # characters of text given to the tokenizer's threads together

_MANIFEST, _TOKENIZER = 'manifest.json', 'tokenizer.json'


@dataclasses.dataclass(frozen=True)
class SplitCounts:
  """What a split holds. Bits per byte: nats per target / `bytes_per_token` / ln 2."""

  documents: int
  bytes: int  # of the documents in UTF-8, without separators
  tokens: int  # one end of text per document included, padding left out
  targets: int  # tokens that the loss predicts: all but the first of each segment
  rows: int

  @property
  def bytes_per_token(self) -> float:
    """Bytes of text that a token stands for, on average."""
    return self.bytes / self.tokens


@dataclasses.dataclass(frozen=True)
class Manifest:
  """The table of contents of a prepared dataset, as manifest.json has it."""

  format_version: int
  source: str
  seq_len: int
  vocab_size: int
  tokenizer_digest: str
  splits: dict[str, SplitCounts]
  files: dict[str, int]  # size in bytes of every file that is needed to read the dataset

  @classmethod
  def from_json(cls, text: str) -> 'Manifest':
    """Reads what `json.dumps(dataclasses.asdict(manifest))` wrote."""
    fields = json.loads(text)
    splits = {name: SplitCounts(**counts) for name, counts in fields.pop('splits').items()}
    return cls(splits=splits, **fields)


@dataclasses.dataclass(frozen=True)
class PreparedDataset:
  """A finished dataset: its folder, tokenizer and counts, and the rows of its splits."""

  folder: pathlib.Path
  tokenizer: tokenizers.Tokenizer
  manifest: Manifest

  def rows(self, split: str) -> shards.Rows:
    """The rows of 'train' or 'validation'."""
    return shards.Rows(self.folder, split)


def dataset_folder(data: DataConfig) -> pathlib.Path:
  """Where the dataset of these settings lives; its name has a digest of all that decides its content."""
  content = {
    'format_version': FORMAT_VERSION,
    'source': corpus.fingerprint(data),
    'max_documents': data.max_documents,
    'validation_fraction': data.validation_fraction,
    'tokenizer': data.tokenizer if data.tokenizer == 'bytes' else f'{data.tokenizer}{data.vocab_size}',
    'seq_len': data.seq_len,
  }
  digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:10]
  return _cache_dir(data) / 'datasets' / f'{data.source}-{content["tokenizer"]}-seq{data.seq_len}-{digest}'


def _cache_dir(data: DataConfig) -> pathlib.Path:
  if data.cache_dir:
    return pathlib.Path(data.cache_dir).expanduser()
  return pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache') / 'mor_jax'


def prepare(data: DataConfig, report: Callable[[str], None] = lambda line: None) -> PreparedDataset:
  """Opens the prepared dataset of these settings, after building it if there is none.

  Several processes may call this at once: one builds, the others wait for it.

  Args:
    data: settings; all but `segment_mask`, `seed`, `prefetch` decide the content.
    report: called with lines that tell a user what is going on.

  Raises:
    ConfigError: the cache folder cannot be written to, the corpus is missing or too small for
      a row in each split, or the prepared folder is damaged.
  """
  folder = dataset_folder(data)
  if folder.exists():
    return open_dataset(folder)
  lock = folder.with_name(f'{folder.name}.lock')
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock.touch()
  except OSError as error:
    raise ConfigError(
      f'data.cache_dir={_cache_dir(data)} cannot be written to ({error.strerror}); '
      f'set it to a folder that can'
    ) from error
  with _exclusive(lock, report):
    if not folder.exists():
      _build(data, folder, report)
  return open_dataset(folder)


def open_dataset(folder: str | os.PathLike) -> PreparedDataset:
  """Opens a finished dataset folder.

  Raises:
    ConfigError: there is none, or it is damaged; names the folder to delete.
  """
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise ConfigError(f'there is no prepared dataset {folder}')
  try:
    manifest = Manifest.from_json((folder / _MANIFEST).read_text(encoding='utf-8'))
    for name, size in manifest.files.items():
      if (folder / name).stat().st_size != size:
        raise ValueError(f'{name} does not have its {size} bytes')
    tokenizer = tokenizers.Tokenizer.load(folder / _TOKENIZER)
    if tokenizer.digest != manifest.tokenizer_digest:
      raise ValueError(f'{_TOKENIZER} is not the one that the rows were made with')
  except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
    raise ConfigError(
      f'the prepared dataset {folder} is damaged or of another version ({error}); '
      f'delete that folder, and it will be prepared again'
    ) from error
  return PreparedDataset(folder, tokenizer, manifest)


@contextlib.contextmanager
def _exclusive(path: pathlib.Path, report: Callable[[str], None]) -> Iterator[None]:
  """Holds a lock on the file `path`, which ends with the process, however that ends."""
  with path.open('a') as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      report('another process is preparing this dataset; waiting for it')
      fcntl.flock(lock, fcntl.LOCK_EX)
    yield


def _build(data: DataConfig, folder: pathlib.Path, report: Callable[[str], None]) -> None:
  """Makes the dataset beside `folder` and renames it last. Only the holder of the lock gets here."""
  partial = folder.with_name(f'{folder.name}.partial')
  shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
  partial.mkdir()
  report(f'preparing the dataset {folder.name}')
  try:
    _write_dataset(data, partial, report)
    partial.rename(folder)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise
  report(f'dataset ready in {folder}')


def _write_dataset(data: DataConfig, folder: pathlib.Path, report: Callable[[str], None]) -> None:
  start = time.perf_counter()
  tokenizer = tokenizers.build(data)
  tokenizer.save(folder / _TOKENIZER)
  report(f'tokenizer: {data.tokenizer}, {tokenizer.vocab_size} entries ({time.perf_counter() - start:.1f} s)')
  writers, splits = [], {}
  for split in corpus.SPLITS:
    start = time.perf_counter()
    writer = shards.ShardWriter(folder, split, tokenizer.vocab_size, data.seq_len)
    counts = splits[split] = _write_split(data, split, tokenizer, writer)
    writers.append(writer)
    report(
      f'{split}: {counts.documents:,} documents, {counts.bytes / 1e6:.1f} MB, {counts.tokens:,} tokens, '
      f'{counts.rows:,} rows ({time.perf_counter() - start:.1f} s)'
    )
  shards.write_tfds_metadata(folder, writers)
  manifest = Manifest(
    format_version=FORMAT_VERSION,
    source=corpus.fingerprint(data),
    seq_len=data.seq_len,
    vocab_size=tokenizer.vocab_size,
    tokenizer_digest=tokenizer.digest,
    splits=splits,
    files={path.name: path.stat().st_size for path in sorted(folder.iterdir())},
  )
  (folder / _MANIFEST).write_text(json.dumps(dataclasses.asdict(manifest), indent=2) + '\n', encoding='utf-8')


def _write_split(
  data: DataConfig, split: str, tokenizer: tokenizers.Tokenizer, writer: shards.ShardWriter
) -> SplitCounts:
  """Encodes, packs and writes a split, a few documents in memory at a time."""
  counts = Counter()

  def token_ids() -> Iterator[list[int]]:
    for texts in _batches(corpus.documents(data, split), ENCODED_AT_ONCE):
      counts.update(documents=len(texts), bytes=sum(len(text.encode()) for text in texts))
      yield from tokenizer.encode_batch(texts)

  with writer:
    for row in packing.concat_and_split(token_ids(), data.seq_len, tokenizer.end_of_text):
      writer.write(row)
      counts.update(rows=1, tokens=row.num_tokens, targets=row.num_targets)
  if counts['tokens'] < data.seq_len:
    raise ConfigError(_too_small(data, split, counts))
  return SplitCounts(**counts)


def _too_small(data: DataConfig, split: str, counts: Counter) -> str:
  remedies = ['lower data.seq_len']
  if data.max_documents:
    remedies.append(f'raise data.max_documents={data.max_documents}')
  if split == 'validation':
    remedies.append(f'raise data.validation_fraction={data.validation_fraction}')
  return (
    f'data.seq_len={data.seq_len} is more than the {counts["tokens"]} tokens of the {split} split, which has '
    f'{counts["documents"]} documents, so there is not one full row; {" or ".join(remedies)}'
  )


def _batches(documents: Iterable[corpus.Document], characters: int) -> Iterator[list[str]]:
  """Texts in lists of at least `characters` together (the last one may have fewer)."""
  texts, size = [], 0
  for document in documents:
    texts.append(document.text)
    size += len(document.text)
    if size >= characters:
      yield texts
      texts, size = [], 0
  if texts:
    yield texts
