"""Compressed files as streams: what is truncated, damaged or empty raises instead of ending early."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

from etils import epath

from mor_jax.config import ConfigError

PIECE = 2**20  # bytes read at a time
LARGEST_WINDOW = 2**31  # of zstd; what `zstd --long=31` makes

Stream = BinaryIO | io.BufferedIOBase


def decompressed(raw: BinaryIO, path: epath.Path) -> Stream:
  """The content of a file by its extension; `raw` itself where that names no compression.

  Raises:
    ConfigError: a package is missing.
    EOFError: the file is empty, which no compressed file is.
  """
  opener = _OPENERS.get(path.suffix.lower())
  if opener is None:
    return raw
  if not path.stat().length:
    raise EOFError('it is empty')
  return opener(raw, path)


def errors() -> tuple[type[Exception], ...]:
  """What reading a damaged stream may raise."""
  try:
    import zstandard
  except ImportError:
    return EOFError, OSError, zlib.error, lzma.LZMAError
  return EOFError, OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError


def _open_zstd(raw: BinaryIO, path: epath.Path) -> Stream:
  try:
    import zstandard
  except ImportError as error:
    raise ConfigError(f'reading {path} needs zstandard; run: pip install zstandard') from error
  return io.BufferedReader(_Frames(raw, zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW)), PIECE)


class _Frames(io.RawIOBase):
  """Frames of zstd, one after the other; unlike the library's own reader it notices if the last one is cut off."""

  def __init__(self, raw: BinaryIO, decompressor: Any):
    super().__init__()
    self._raw, self._decompressor = raw, decompressor
    self._frame: Any = None
    self._input = self._output = b''

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    while not self._output:
      self._input = self._input or self._raw.read(PIECE)
      if not self._input:
        if self._frame is not None:
          raise EOFError('it ends within a frame')
        return 0
      self._frame = self._frame or self._decompressor.decompressobj()
      self._output = self._frame.decompress(self._input)
      self._input = self._frame.unused_data
      if self._frame.eof:
        self._frame = None
    part, self._output = self._output[: len(buffer)], self._output[len(buffer) :]
    buffer[: len(part)] = part
    return len(part)


_OPENERS: dict[str, Callable[[BinaryIO, epath.Path], Stream]] = {
  '.gz': lambda raw, path: gzip.GzipFile(fileobj=raw),
  '.bz2': lambda raw, path: bz2.BZ2File(raw),
  '.xz': lambda raw, path: lzma.LZMAFile(raw),  # noqa: SIM115 (it closes nothing)
  '.zst': _open_zstd,
}
EXTENSIONS = tuple(_OPENERS)
