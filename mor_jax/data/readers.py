"""Documents of one file, by its kind: text, JSON, JSON lines, Parquet; each compressed or not."""

import dataclasses
import itertools
import types
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from etils import epath

from mor_jax.config import ConfigError, DataConfig
from mor_jax.data import decompression, messages
from mor_jax.data.document import Document, Unreadable
from mor_jax.files import parse_json

LONGEST_DOCUMENT = 2**24  # bytes; a longer text file is cut into documents at line ends
LONGEST_ARRAY = 2**30  # bytes of JSON that is parsed in one piece
_BOM = b'\xef\xbb\xbf'

Records = Iterator[Document | Unreadable]


@dataclasses.dataclass(frozen=True)
class Texts:
  """Records are texts under a key."""

  key: str

  def of_record(self, where: str, record: Any) -> Document | Unreadable:
    """The document of an object."""
    return of_record(where, record, self.key)

  def columns(self, path: epath.Path, there: list[str]) -> list[str]:
    """The columns that a record is made of, out of those that there are. Raises ConfigError."""
    column = self.key if self.key in there else self.key.split('.')[0]
    if column not in there:
      raise ConfigError(
        f'{path} has no column data.text_key={self.key!r}; its columns are {", ".join(there)}'
      )
    return [self.key]


class Chats:
  """Records are conversations."""

  def of_record(self, where: str, record: Any) -> Document | Unreadable:
    """The document of an object."""
    return messages.of_record(where, record)

  def columns(self, path: epath.Path, there: list[str]) -> list[str]:
    """The columns that a record is made of, out of those that there are. Raises ConfigError."""
    found = [name for name in (*messages.COLUMNS, *messages.MEANT) if name in there]
    if not any(set(found).issuperset(keys) for keys in messages.FORMS.values()):
      raise ConfigError(
        f'{path} has no conversations: none of {", or ".join(messages.FORMS)}; its columns are {", ".join(there)}'
      )
    return found


Form = Texts | Chats
"""What records are."""


def form(data: DataConfig) -> Form:
  """What records are, as `data.format` says."""
  return Chats() if data.format == 'chat' else Texts(data.text_key)


def read(raw: BinaryIO, path: epath.Path, form: Form) -> Records:
  """The documents of an open file, whose kind its extension says.

  Raises:
    ConfigError: the file is truncated or damaged, or holds no such records; the message names it.
  """
  return READERS[kind(path)](raw, path, form)


def kind(path: epath.Path) -> str:
  """Extension of a file without that of its compression, in small letters."""
  suffixes = [suffix.lower() for suffix in path.suffixes]
  if suffixes and suffixes[-1] in decompression.EXTENSIONS and suffixes[-2:-1] != ['.parquet']:
    suffixes = suffixes[:-1]
  return suffixes[-1] if suffixes else ''


def document(where: str, text: Any, text_key: str) -> Document | Unreadable:
  """The document that a record's text makes: bytes are UTF-8, and null is an empty text."""
  if text is None:
    return Document(where, '')
  if isinstance(text, bytes):
    try:
      text = text.decode()
    except UnicodeDecodeError:
      return Unreadable(where, 'not UTF-8')
  if not isinstance(text, str):
    return Unreadable(where, f'{text_key!r} (data.text_key) is not a text')
  try:
    text.encode()
  except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell and UTF-8 cannot
    return Unreadable(where, 'not UTF-8')
  return Document(where, text)


def of_record(where: str, record: Any, text_key: str) -> Document | Unreadable:
  """The document of an object; a key may lead into objects within it, 'meta.text'."""
  value = record
  for key in (text_key,) if isinstance(record, dict) and text_key in record else text_key.split('.'):
    if not isinstance(value, dict) or key not in value:
      return Unreadable(where, f'no key {text_key!r} (data.text_key)')
    value = value[key]
  return document(where, value, text_key)


def damaged(path: epath.Path, place: str, error: Exception) -> ConfigError:
  """What to raise for a file that cannot be read further."""
  return ConfigError(
    f'{path} is truncated or damaged after {place} ({first_line(error)}); fetch it again or leave it out '
    f'of data.source'
  )


def first_line(error: Exception) -> str:
  """Class and first line of an error."""
  return f'{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}'


# ---- text ----


def _read_text(raw: BinaryIO, path: epath.Path, form: Form) -> Records:
  if isinstance(form, Chats):
    raise ConfigError(
      f'{path} is a text, and data.format=chat reads conversations from .jsonl, .json and .parquet'
    )
  rest, part, stream = b'', 0, None
  while True:
    try:
      stream = stream or decompression.decompressed(raw, path)
      piece = stream.read(LONGEST_DOCUMENT)
    except decompression.errors() as error:
      raise damaged(path, f'{part} parts of its text', error) from error
    content = rest + (piece if part else piece.removeprefix(_BOM))
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


# ---- JSON ----


def _read_json_lines(raw: BinaryIO, path: epath.Path, form: Form) -> Records:
  return _parse_lines(_lines(raw, path), path, form)


def _lines(raw: BinaryIO, path: epath.Path) -> Iterator[bytes]:
  number, stream = 0, None
  while True:
    try:
      stream = stream or decompression.decompressed(raw, path)
      line = stream.readline()
    except decompression.errors() as error:
      raise damaged(path, f'line {number}', error) from error
    if not line:
      return
    number += 1
    yield line if number > 1 else line.removeprefix(_BOM)


def _parse_lines(lines: Iterator[bytes], path: epath.Path, form: Form) -> Records:
  for number, line in enumerate(lines, start=1):
    if line.strip():
      yield _parse_line(line, f'{path}, line {number}', form)


def _parse_line(line: bytes, where: str, form: Form) -> Document | Unreadable:
  try:
    record = parse_json(line.decode())
  except UnicodeDecodeError:
    return Unreadable(where, 'not UTF-8')
  except ValueError:
    cut_off = '' if line.endswith(b'\n') else ', cut off at the end of the file'
    return Unreadable(where, f'not JSON{cut_off}')
  return form.of_record(where, record)


def _read_json(raw: BinaryIO, path: epath.Path, form: Form) -> Records:
  """A file that holds one list of objects, one object, or, as many do in spite of its name, JSON lines."""
  lines = _lines(raw, path)
  head = next((line for line in lines if line.strip()), b'')
  try:
    first = parse_json(head.decode())
  except ValueError:  # the beginning of something longer
    yield from _whole(path, itertools.chain([head], lines), form)
    return
  if isinstance(first, list):
    yield from _elements(path, first, form)
    return
  yield from _parse_lines(itertools.chain([head], lines), path, form)


def _whole(path: epath.Path, lines: Iterator[bytes], form: Form) -> Records:
  content, size = [], 0
  for line in lines:
    content.append(line)
    size += len(line)
    if size > LONGEST_ARRAY:
      raise ConfigError(
        f'{path} is a list of more than {LONGEST_ARRAY:,} bytes; write it as JSON lines (.jsonl)'
      )
  try:
    found = parse_json(b''.join(content).decode())
  except UnicodeDecodeError:
    yield Unreadable(str(path), 'not UTF-8')
    return
  except ValueError as error:
    raise damaged(path, 'its beginning', error) from error
  yield from _elements(path, found if isinstance(found, list) else [found], form)


def _elements(path: epath.Path, records: list[Any], form: Form) -> Records:
  for number, record in enumerate(records, start=1):
    yield form.of_record(f'{path}, element {number}', record)


# ---- Parquet ----


def _read_parquet(raw: BinaryIO, path: epath.Path, form: Form) -> Records:
  pyarrow, row = _pyarrow(path), 0
  try:
    file = pyarrow.parquet.ParquetFile(raw, page_checksum_verification=True)
    columns = form.columns(path, file.schema_arrow.names)
    for batch in file.iter_batches(batch_size=256, columns=columns):
      for values in zip(*batch.columns, strict=True):
        row += 1
        where = f'{path}, row {row}'
        try:
          record = {name: value.as_py() for name, value in zip(batch.schema.names, values, strict=True)}
          yield form.of_record(where, record)
        except UnicodeDecodeError:
          yield Unreadable(where, 'not UTF-8')
  except (pyarrow.ArrowException, OSError) as error:
    raise damaged(path, f'row {row}', error) from error


def _pyarrow(path: epath.Path) -> types.ModuleType:
  try:
    import pyarrow.parquet
  except ImportError as error:
    raise ConfigError(f'reading {path} needs pyarrow; run: pip install pyarrow') from error
  return pyarrow


READERS: dict[str, Callable[[BinaryIO, epath.Path, Form], Records]] = {
  '.txt': _read_text,
  '.md': _read_text,
  '.jsonl': _read_json_lines,
  '.ndjson': _read_json_lines,
  '.json': _read_json,
  '.parquet': _read_parquet,
}
