"""Prepared datasets: a corpus as packed rows in one folder, built once and opened by name.

The folder holds the rows (shards.py), tokenizer.json, and manifest.json with the counts. It
is built under a temporary name and renamed when it is complete, so a folder with its final
name is finished. The next build continues an interrupted one.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from mor_jax.config import ConfigError, DataConfig
from mor_jax.data import corpus, pipeline, shards
from mor_jax.data import tokenizer as tokenizers
from mor_jax.data.cache import cache_dir
from mor_jax.data.conversations import converter, find_template, open_chats
from mor_jax.data.manifest import FORMAT_VERSION, MANIFEST, PREPARED, Manifest, SplitCounts, check_settings
from mor_jax.files import write_atomically

TOKENIZER = 'tokenizer.json'


@dataclasses.dataclass(frozen=True)
class PreparedDataset:
  """A finished dataset: folder, tokenizer, counts, and the rows of each split."""

  folder: pathlib.Path
  tokenizer: tokenizers.Tokenizer
  manifest: Manifest

  @property
  def extras(self) -> tuple[str, ...]:
    """Arrays that rows have beside tokens, segments and positions."""
    return self.manifest.extras

  def identity(self) -> dict[str, Any]:
    """What all processes of a training must find alike."""
    names = ('documents_digest', 'tokenizer_digest', 'seq_len', 'packing', 'template_digest')
    return {f"the data's {name}": getattr(self.manifest, name) for name in names}

  def rows(self, split: str) -> shards.Rows:
    """The rows of 'train' or 'validation'."""
    return shards.Rows(self.folder, split)


def dataset_folder(data: DataConfig) -> pathlib.Path:
  """The folder of the dataset for these settings. Its name has a digest of everything that determines the content.

  Raises:
    ConfigError: the source or the tokenizer cannot be found.
  """
  if data.source.startswith(PREPARED):
    return pathlib.Path(data.source.removeprefix(PREPARED)).expanduser()
  tokenizer = tokenizers.fingerprint(data)
  content = {
    'format_version': FORMAT_VERSION,
    'source': corpus.open_source(data).fingerprint(),
    'max_documents': data.max_documents,
    'drop_duplicates': data.drop_duplicates,
    'validation_fraction': data.validation_fraction,
    'tokenizer': tokenizers.content_of(tokenizer),
    'separator': data.separator,
    'begin': tokenizers.begin_of(data),
    'packing': data.packing,
    'seq_len': data.seq_len,
  }
  if data.format == 'chat':
    content |= {'format': 'chat', 'template': find_template(data).digest, 'too_long': data.too_long}
  digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:10]
  words = [re.sub(r'[^A-Za-z0-9]+', '_', word).strip('_')[:40] for word in (data.source, tokenizer)]
  return cache_dir(data) / 'datasets' / f'{"-".join(words)}-seq{data.seq_len}-{digest}'


@dataclasses.dataclass(frozen=True)
class Progress:
  """Progress of a preparation. Bytes and documents include those of interrupted runs."""

  done: Counter[str]  # documents, bytes, tokens, rows
  skipped_bytes: int  # prepared before
  fraction: float | None  # of the source that has been read; none: its size is not known


def prepare(
  data: DataConfig,
  report: Callable[[str], None] = lambda line: None,
  progress: Callable[[Progress], None] = lambda state: None,
) -> PreparedDataset:
  """Opens the prepared dataset for these settings and builds it first if it does not exist.

  Several processes may call this at once: one builds while the others wait. An interrupted build,
  even one ended by SIGKILL, is continued and gives the same result as an uninterrupted one.

  Args:
    data: settings; all but `segment_mask`, `seed`, `prefetch` and `workers` determine the content.
    report: called with status lines for the user.
    progress: called every few megabytes while building.

  Raises:
    ConfigError: the cache folder is not writable; the corpus is missing, unreadable or too small
      for one row per split; the prepared folder is damaged; or the folder named by `data.source`
      was prepared with different settings.
  """
  folder = dataset_folder(data)
  if data.source.startswith(PREPARED):
    dataset = open_dataset(folder)
    check_settings(dataset.manifest, data)
    return dataset
  if folder.exists():
    return open_dataset(folder)
  lock = folder.with_name(f'{folder.name}.lock')
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock.touch()
  except OSError as error:
    raise ConfigError(
      f'data.cache_dir={cache_dir(data)} cannot be written to ({error.strerror}); set it to a folder that can'
    ) from error
  with _exclusive(lock, report):
    if not folder.exists():
      _build(data, folder, report, progress)
  return open_dataset(folder)


def open_dataset(folder: str | os.PathLike) -> PreparedDataset:
  """Opens a finished dataset folder.

  Raises:
    ConfigError: the folder is missing or damaged; the message names the folder to delete.
  """
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    unfinished = folder.with_name(f'{folder.name}.partial').is_dir()
    remedy = '; its preparation was interrupted, run it again to continue' if unfinished else ''
    raise ConfigError(f'there is no prepared dataset {folder}{remedy}')
  try:
    manifest = Manifest.from_json((folder / MANIFEST).read_text(encoding='utf-8'))
    for name, size in manifest.files.items():
      if (folder / name).stat().st_size != size:
        raise ValueError(f'{name} does not have its {size} bytes')
    tokenizer = tokenizers.Tokenizer.load(folder / TOKENIZER, manifest.separator, manifest.begin)
    if tokenizer.digest != manifest.tokenizer_digest:
      raise ValueError(f'{TOKENIZER} is not the one that the rows were made with')
    if tokenizer.vocab_size != manifest.vocab_size:
      raise ValueError('its vocabulary has holes, and rows of an earlier version lack ids above its size')
  except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
    raise ConfigError(
      f'the prepared dataset {folder} is damaged or of another version ({error}); '
      f'delete that folder, and it will be prepared again'
    ) from error
  return PreparedDataset(folder, tokenizer, manifest)


@contextlib.contextmanager
def _exclusive(path: pathlib.Path, report: Callable[[str], None]) -> Iterator[None]:
  """Holds a lock on the file `path`. The system releases it even if the process is killed."""
  with path.open('a') as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      report('another process is preparing this dataset; waiting for it')
      fcntl.flock(lock, fcntl.LOCK_EX)
    yield


class _TooSmallError(ConfigError):
  """A split has less than one full row."""


def _build(
  data: DataConfig, folder: pathlib.Path, report: Callable[[str], None], progress: Callable[[Progress], None]
) -> None:
  """Builds the dataset next to `folder` and renames it at the end. The caller holds the lock."""
  partial = folder.with_name(f'{folder.name}.partial')
  report(f'{"continuing" if partial.exists() else "preparing"} the dataset {folder.name}')
  partial.mkdir(exist_ok=True)
  try:
    if not (partial / MANIFEST).exists():
      _write_dataset(data, partial, report, progress)
    shutil.rmtree(partial / pipeline.NOTES, ignore_errors=True)
    partial.rename(folder)
  except _TooSmallError:
    shutil.rmtree(partial, ignore_errors=True)  # other settings mean another folder
    raise
  except ConfigError:
    if not (partial / pipeline.NOTES).exists():  # no shard is finished, so that there is nothing to continue
      shutil.rmtree(partial, ignore_errors=True)
    raise
  except OSError as error:
    raise ConfigError(
      f'data.cache_dir={cache_dir(data)}: writing {partial} failed ({error}); free some space or set '
      f'data.cache_dir to another disk, then run the same command again: finished shards are kept'
    ) from error
  report(f'dataset ready in {folder}')


def _write_dataset(
  data: DataConfig, folder: pathlib.Path, report: Callable[[str], None], progress: Callable[[Progress], None]
) -> None:
  start = time.perf_counter()
  tokenizer = _tokenizer(data, folder / TOKENIZER)
  report(f'tokenizer: {data.tokenizer}, {tokenizer.entries} entries ({time.perf_counter() - start:.1f} s)')

  start = time.perf_counter()
  chats = open_chats(data, tokenizer)
  reading = corpus.Reading(data, converter(chats))
  recipe = pipeline.Recipe(
    str(folder / TOKENIZER),
    data.separator,
    tokenizer.begin,
    data.seq_len,
    data.packing,
    data.format,
    data.too_long,
  )
  workers = data.workers or len(os.sched_getaffinity(0))
  writers = pipeline.write_splits(reading, folder, recipe, workers, _follow(reading, progress))
  splits = {split: _split_counts(data, split, writer.counts) for split, writer in writers.items()}
  for split, counts in splits.items():
    report(
      f'{split}: {counts.documents:,} documents, {counts.bytes / 1e6:.1f} MB, {counts.tokens:,} tokens, '
      f'{counts.rows:,} rows'
    )
  totals: Counter[str] = sum((writer.counts for writer in writers.values()), Counter())
  unsaid = totals['unsaid']
  pipeline.check_unsaid(data, totals, at_least=1)
  if unsaid:
    report(
      f'WARNING: the tokenizer has no token for {unsaid:,} characters or words, which are lost to the model'
    )
  if reading.dropped:
    report('left out: ' + ', '.join(f'{count:,} {reason}' for reason, count in reading.dropped.items()))
  if chats and (totals['cut'] or totals['too_long']):
    report(
      f'longer than data.seq_len={data.seq_len}: {totals["cut"]:,} conversations cut, {totals["too_long"]:,} left out '
      f'(data.too_long={data.too_long})'
    )
  report(f'written in {time.perf_counter() - start:.1f} s')

  for writer in writers.values():
    writer.publish()
  shards.write_tfds_metadata(
    folder,
    shards.RowFormat(tokenizer.vocab_size, data.seq_len, has_mask=chats is not None),
    lengths={split: [note.counts['rows'] for note in writer.notes] for split, writer in writers.items()},
    num_bytes={split: sum(note.num_bytes for note in writer.notes) for split, writer in writers.items()},
  )
  digests = ''.join(note.digest for writer in writers.values() for note in writer.notes)
  manifest = Manifest(
    format_version=FORMAT_VERSION,
    source=data.source,
    documents_digest=hashlib.sha256(digests.encode()).hexdigest(),
    seq_len=data.seq_len,
    packing=data.packing,
    tokenizer=tokenizers.fingerprint(data),
    separator=data.separator,
    begin=tokenizer.begin,
    vocab_size=tokenizer.vocab_size,
    tokenizer_digest=tokenizer.digest,
    dropped=dict(reading.dropped),
    dropped_examples=reading.examples,
    splits=splits,
    unsaid=unsaid,
    extras=('loss_mask',) if chats else (),
    chat=chats.describe() if chats else None,
    too_long=totals['too_long'],
    files={path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()},
  )
  # Last: it says that all is there.
  write_atomically(folder / MANIFEST, json.dumps(dataclasses.asdict(manifest), indent=2) + '\n')


def _tokenizer(data: DataConfig, path: pathlib.Path) -> tokenizers.Tokenizer:
  """Loads the tokenizer of an interrupted build from `path`, or builds one and saves it there."""
  if path.exists():
    return tokenizers.Tokenizer.load(path, data.separator, data.begin)
  tokenizer = tokenizers.build(data)
  tokenizer.save(path)
  return tokenizer


def _follow(reading: corpus.Reading, progress: Callable[[Progress], None]) -> Callable[[Counter[str]], None]:
  """Returns the callback that `pipeline.write_splits` calls after every unit."""
  done: Counter[str] = Counter()
  skipped_bytes = 0

  def after_unit(counts: Counter[str]) -> None:
    nonlocal skipped_bytes
    done.update(counts)
    skipped_bytes += counts['bytes'] if counts['skipped'] else 0
    source = reading.source
    fraction = source.bytes_read / source.total_bytes if source.total_bytes else None
    pipeline.check_unsaid(reading.data, done)
    progress(Progress(done, skipped_bytes, fraction))

  return after_unit


def _split_counts(data: DataConfig, split: str, counts: Counter[str]) -> SplitCounts:
  needed = split == 'validation' or data.validation_fraction < corpus.ALL
  if needed and counts['tokens'] < data.seq_len:
    raise _TooSmallError(_too_small(data, split, counts))
  return SplitCounts(**{field.name: counts[field.name] for field in dataclasses.fields(SplitCounts)})


def _too_small(data: DataConfig, split: str, counts: Counter) -> str:
  if counts['too_long']:
    return (
      f'data.seq_len={data.seq_len} is less than {counts["too_long"]} conversations of the {split} split have tokens, '
      f'and the others do not fill one row; raise it'
    )
  remedies = (
    ['lower data.seq_len']
    if counts['documents']
    else ['give more documents (one document goes to one split as a whole)']
  )
  if data.max_documents:
    remedies.append(f'raise data.max_documents={data.max_documents}')
  if split == 'validation' and data.validation_fraction < corpus.ALL:
    remedies.append(f'raise data.validation_fraction={data.validation_fraction}')
  return (
    f'data.seq_len={data.seq_len} is more than the {counts["tokens"]} tokens of the {split} split, which has '
    f'{counts["documents"]} documents, so there is not one full row; {" or ".join(remedies)}'
  )
