"""Documents from files, local or in a bucket: which files there are, and their documents in order.

The extension, in any case, determines the kind: .txt and .md hold one document per file, .jsonl and .ndjson one per
line, .json a list of them, .parquet one per row. All but .parquet may be compressed as .gz, .zst, .bz2 or .xz.
"""

import glob
import os
from collections.abc import Iterator
from typing import BinaryIO

from etils import epath

from mor_jax.config import ConfigError
from mor_jax.data import decompression, identity, readers
from mor_jax.data.document import Document, Unreadable

_TEXT = ('.txt', '.md')


class Files:
  """All files that match the patterns, in alphabetical order."""

  def __init__(self, patterns: str, form: readers.Form, validation_fraction: float | None = None):
    """Finds the files.

    Args:
      patterns: files, folders and globs separated by commas; what exists under its very name, commas and brackets
        included, is taken literally. `**` matches any folders (not in buckets); `gs://` names a bucket. Of a folder
        all files of a known kind are read, at any depth.
      form: what the records of JSON and Parquet are.
      validation_fraction: a single text is cut in two, the last part for validation; None: it stays whole.

    Raises:
      ConfigError: a pattern matches no file, an unsupported one, or a link to nothing; or a package is missing.
    """
    self._paths = _find(patterns)
    self._form = form
    is_single = len(self._paths) == 1 and readers.kind(self._paths[0]) in _TEXT
    self._held_out = validation_fraction if is_single else None
    self._sizes = [path.stat().length for path in self._paths]
    self.total_bytes, self.bytes_read = sum(self._sizes), 0

  def fingerprint(self) -> str:
    """A digest of the files (`identity.digest_of`) and of what is read from them."""
    read = self._form.key if isinstance(self._form, readers.Texts) else 'chat'
    return f'files-{identity.digest_of(self._paths, read)}'

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
          for record in self._of_file(raw, path):
            self.bytes_read = before + raw.tell()
            yield record
      except OSError as error:
        raise ConfigError(f'{path} cannot be read ({error})') from error
      self.bytes_read = before + size

  def _of_file(self, raw: BinaryIO, path: epath.Path) -> Iterator[Document | Unreadable]:
    records = readers.read(raw, path, self._form)
    if self._held_out is None:
      return records
    first, second = next(records, None), next(records, None)
    if first is None or second is not None or isinstance(first, Unreadable):  # several parts, each in a split
      return iter([*(record for record in (first, second) if record is not None), *records])
    return iter(_cut_in_two(first, self._held_out))


def _cut_in_two(document: Document, held_out: float) -> list[Document]:
  """The beginning of a text for training and its end for validation, cut at a line or else at a word."""
  text = document.text
  place = round(len(text) * (1 - held_out))
  for sign in ('\n', ' '):
    if found := text.rfind(sign, 0, place) + 1:
      place = found
      break
  return [
    Document(f'{document.name}, to character {place}', text[:place], split='train'),
    Document(f'{document.name}, from character {place + 1}', text[place:], split='validation'),
  ]


# ---- which files ----


def _find(patterns: str) -> list[epath.Path]:
  parts = [patterns] if _exists(patterns) else [part.strip() for part in patterns.split(',')]
  found: dict[str, epath.Path] = {}
  for part in parts:
    for path in _matches(part):
      # Two spellings of one file are one file.
      found.setdefault(str(path) if '://' in str(path) else os.path.realpath(path), path)
  return sorted(found.values(), key=str)


def _exists(path: str) -> bool:
  return '://' not in path and os.path.exists(os.path.expanduser(path))


def _matches(pattern: str) -> list[epath.Path]:
  """The files of one file, folder or glob."""
  local = epath.Path(os.path.expanduser(pattern))
  if '://' in pattern:
    paths = _glob_bucket(pattern)
  elif _exists(pattern):
    paths = _in_folder(local) if local.is_dir() else [local]
  else:
    paths = [epath.Path(name) for name in glob.glob(str(local), recursive=True)]
  for path in paths:
    if '://' not in str(path) and os.path.islink(path) and not path.exists():
      raise ConfigError(
        f'data.source=files:{pattern} matches {path}, a link to {os.readlink(path)}, which does not exist; restore '
        f'it, or remove the link'
      )
  paths = [path for path in paths if path.is_file()]
  if not paths:
    raise ConfigError(
      f'data.source=files:{pattern} matches no file; give a path or a pattern such as '
      f'files:texts/**/*.txt, quoted for the shell, or use data.source=embedded'
    )
  for path in paths:
    if readers.kind(path) not in readers.READERS:
      raise ConfigError(
        f'data.source=files:{pattern} matches {path}, which is none of {", ".join(readers.READERS)} '
        f'(all but .parquet also as {", ".join(decompression.EXTENSIONS)}); narrow the pattern'
      )
  return paths


def _in_folder(folder: epath.Path) -> list[epath.Path]:
  """All files of a known kind in a folder, at any depth, but none that is hidden."""
  found = []
  for parent, folders, names in os.walk(folder):
    folders[:] = [name for name in folders if not name.startswith('.')]
    found += [epath.Path(parent) / name for name in names if not name.startswith('.')]
  return [path for path in found if readers.kind(path) in readers.READERS]


def _glob_bucket(pattern: str) -> list[epath.Path]:
  scheme, _, rest = pattern.partition('://')
  parts = rest.split('/')
  fixed = next((i for i, part in enumerate(parts) if any(sign in part for sign in '*?[')), len(parts) - 1)
  try:
    base = epath.Path(f'{scheme}://{"/".join(parts[:fixed])}')
    return list(base.glob('/'.join(parts[fixed:])))
  except Exception as error:  # whatever the bucket's client library raises, or that it isn't installed
    raise ConfigError(
      f'data.source=files:{pattern} cannot be listed ({readers.first_line(error)}); for gs:// install gcsfs and log '
      f'in, or copy the files here'
    ) from error
