"""What tells whether files are those of before, without reading all of them."""

import hashlib
import os
from collections.abc import Iterable

from etils import epath

SAMPLE = 4096  # bytes read at the start, in the middle and at the end of a local file


def digest_of(paths: Iterable[epath.PathLike], *more: object) -> str:
  """A digest (16 hex digits) of where files are, their sizes, when they were written, and a sample of each.

  The sample finds a file that was replaced by a tool which restores times. Files in buckets are not sampled: there
  a request takes longer than all the rest, and their times are set by the server.

  Args:
    paths: the files.
    more: what else is to be told apart.
  """
  files = [_identity(epath.Path(path)) for path in paths]
  return hashlib.sha256(repr((files, more)).encode()).hexdigest()[:16]


def digest_of_folder(folder: epath.PathLike, *more: object) -> str:
  """`digest_of` all files in a local folder, at any depth, in alphabetical order."""
  found = [os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names]
  return digest_of(sorted(path for path in found if os.path.isfile(path)), *more)


def _identity(path: epath.Path) -> tuple:
  if '://' in str(path):
    stat = path.stat()
    return str(path), stat.length, stat.mtime
  found = os.stat(path)
  with open(path, 'rb') as file:
    sample = hashlib.blake2b(digest_size=16)
    for start in sorted({0, max(0, found.st_size // 2), max(0, found.st_size - SAMPLE)}):
      file.seek(start)
      sample.update(file.read(SAMPLE))
  return os.path.realpath(path), found.st_size, found.st_mtime_ns, sample.hexdigest()
