"""Documents from files: text, Markdown, JSON lines and Parquet, local or in a bucket.

The extension determines the format: .txt and .md hold one document per file, .jsonl one per
line, .parquet one per row. All but .parquet may be compressed as .gz or .zst.
"""

import glob
import gzip
import io
import os
import types
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from etils import epath

from mor_jax.config import ConfigError
from mor_jax.data import identity
from mor_jax.data.document import Document, Unreadable
from mor_jax.files import parse_json

LONGEST_DOCUMENT = 2**24  # bytes; a longer text file is cut into documents at line ends

_COMPRESSED = ('.gz', '.zst')
_KINDS = ('.txt', '.md', '.jsonl', '.parquet')


class Files:
  """All files that match the patterns, in alphabetical order."""

  def __init__(self, patterns: str, text_key: str):
    """Finds the files.

    Args:
      patterns: globs separated by commas; `**` matches any folders (not in buckets); `gs://` names a bucket.
      text_key: key of the text in JSON lines, column of the text in Parquet files.

    Raises:
      ConfigError: a pattern matches no file or an unsupported one, or a package is missing.
    """
    found = {str(path): path for pattern in patterns.split(',') for path in _glob(pattern.strip())}
    self._paths = [found[name] for name in sorted(found)]
    self._text_key = text_key
    self._sizes = [path.stat().length for path in self._paths]
    self.total_bytes, self.bytes_read = sum(self._sizes), 0

  def fingerprint(self) -> str:
    """A digest of the files (`identity.digest_of`) and the key."""
    return f'files-{identity.digest_of(self._paths, self._text_key)}'

  def records(self) -> Iterator[Document | Unreadable]:
    """Yields the documents of all files.

    Raises:
      ConfigError: a file is truncated, damaged or unreadable; the message names it.
    """
    self.bytes_read = 0
    for path, size in zip(self._paths, self._sizes, strict=True):
      before = self.bytes_read
      try:
        with path.open('rb') as raw:
          for record in _READERS[_kind(path)](raw, path, self._text_key):
            self.bytes_read = before + raw.tell()
            yield record
      except OSError as error:
        raise ConfigError(f'{path} cannot be read ({error})') from error
      self.bytes_read = before + size


def _glob(pattern: str) -> list[epath.Path]:
  """The files that match one pattern."""
  if '://' in pattern:
    paths = _glob_bucket(pattern)
  else:
    paths = [epath.Path(name) for name in glob.glob(os.path.expanduser(pattern), recursive=True)]
  paths = [path for path in paths if path.is_file()]
  if not paths:
    raise ConfigError(
      f'data.source=files:{pattern} matches no file; give a path or a pattern such as '
      f'files:texts/**/*.txt, quoted for the shell, or use data.source=embedded'
    )
  for path in paths:
    if _kind(path) not in _KINDS:
      raise ConfigError(
        f'data.source=files:{pattern} matches {path}, which is none of {", ".join(_KINDS)} '
        f'(all but .parquet also as .gz or .zst); narrow the pattern'
      )
  return paths


def _glob_bucket(pattern: str) -> list[epath.Path]:
  scheme, _, rest = pattern.partition('://')
  parts = rest.split('/')
  fixed = next((i for i, part in enumerate(parts) if any(sign in part for sign in '*?[')), len(parts) - 1)
  try:
    base = epath.Path(f'{scheme}://{"/".join(parts[:fixed])}')
    return list(base.glob('/'.join(parts[fixed:])))
  except Exception as error:  # whatever the bucket's client library raises, or that it isn't installed
    raise ConfigError(
      f'data.source=files:{pattern} cannot be listed ({_first_line(error)}); for gs:// install gcsfs and log '
      f'in, or copy the files here'
    ) from error


def _kind(path: epath.Path) -> str:
  suffixes = path.suffixes
  if suffixes and suffixes[-1] in _COMPRESSED and suffixes[-2:-1] != ['.parquet']:
    suffixes = suffixes[:-1]
  return suffixes[-1] if suffixes else ''


def _first_line(error: Exception) -> str:
  return f'{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}'


# ---- decompression ----


def _decompressed(raw: BinaryIO, path: epath.Path) -> BinaryIO | io.BufferedIOBase:
  if path.suffix == '.gz':
    return gzip.GzipFile(fileobj=raw)
  if path.suffix == '.zst':
    return io.BufferedReader(_pyarrow(path).CompressedInputStream(raw, 'zstd'))
  return raw


def _pyarrow(path: epath.Path) -> types.ModuleType:
  try:
    import pyarrow.parquet
  except ImportError as error:
    raise ConfigError(f'reading {path} needs pyarrow; run: pip install pyarrow') from error
  return pyarrow


def _truncated(path: epath.Path, place: str, error: Exception) -> ConfigError:
  return ConfigError(
    f'{path} is truncated or damaged after {place} ({_first_line(error)}); fetch it again or leave it out '
    f'of data.source'
  )


# ---- kinds of files ----


def _read_text(raw: BinaryIO, path: epath.Path, text_key: str) -> Iterator[Document | Unreadable]:
  stream, rest, part = _decompressed(raw, path), b'', 0
  while True:
    try:
      piece = stream.read(LONGEST_DOCUMENT)
    except (EOFError, OSError, zlib.error) as error:
      raise _truncated(path, f'{part} parts of its text', error) from error
    content = rest + piece
    if not content and part:
      return
    last = len(piece) < LONGEST_DOCUMENT
    end = len(content) if last else _last_line_end(content)
    content, rest = content[:end], content[end:]
    part += 1
    where = str(path) if last and part == 1 else f'{path}, part {part}'
    try:
      yield Document(where, content.decode())
    except UnicodeDecodeError as error:
      yield Unreadable(f'{where}, line {content[: error.start].count(10) + 1}', 'not UTF-8')
    if last:
      return


def _last_line_end(content: bytes) -> int:
  """Where to split: after the last line or, within a single line, before an incomplete character."""
  end = content.rfind(b'\n') + 1
  if not end:
    end = len(content) - 1
    while end > len(content) - 4 and content[end] & 0xC0 == 0x80:
      end -= 1
  return end


def _read_json_lines(raw: BinaryIO, path: epath.Path, text_key: str) -> Iterator[Document | Unreadable]:
  lines, number = _decompressed(raw, path), 0
  while True:
    try:
      line = lines.readline()
    except (EOFError, OSError, zlib.error) as error:
      raise _truncated(path, f'line {number}', error) from error
    if not line:
      return
    number += 1
    if line.strip():
      yield _parse_line(line, f'{path}, line {number}', text_key)


def _parse_line(line: bytes, where: str, text_key: str) -> Document | Unreadable:
  try:
    text = parse_json(line.decode())[text_key]
  except UnicodeDecodeError:
    return Unreadable(where, 'not UTF-8')
  except ValueError:
    return Unreadable(
      where, 'not JSON' if line.endswith(b'\n') else 'not JSON, cut off at the end of the file'
    )
  except (KeyError, TypeError, IndexError):
    return Unreadable(where, f'no key {text_key!r} (data.text_key)')
  return _document(where, text, text_key)


def _document(where: str, text: object, text_key: str) -> Document | Unreadable:
  if not isinstance(text, str):
    return Unreadable(where, f'{text_key!r} (data.text_key) is not a text')
  try:
    text.encode()
  except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell and UTF-8 cannot
    return Unreadable(where, 'not UTF-8')
  return Document(where, text)


def _read_parquet(raw: BinaryIO, path: epath.Path, text_key: str) -> Iterator[Document | Unreadable]:
  pyarrow, row = _pyarrow(path), 0
  try:
    file = pyarrow.parquet.ParquetFile(raw)
    columns = file.schema_arrow.names
    if text_key not in columns:
      raise ConfigError(
        f'{path} has no column data.text_key={text_key!r}; its columns are {", ".join(columns)}'
      )
    for batch in file.iter_batches(batch_size=256, columns=[text_key]):
      for value in batch.column(0):
        row += 1
        try:
          yield _document(f'{path}, row {row}', value.as_py(), text_key)
        except UnicodeDecodeError:
          yield Unreadable(f'{path}, row {row}', 'not UTF-8')
  except (pyarrow.ArrowException, OSError) as error:
    raise _truncated(path, f'row {row}', error) from error


_READERS = {'.txt': _read_text, '.md': _read_text, '.jsonl': _read_json_lines, '.parquet': _read_parquet}
