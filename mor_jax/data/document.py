"""The items that every source yields: documents, and records of unreadable ones."""

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Protocol


@dataclasses.dataclass(frozen=True)
class Document:
  """A text and its name. Documents with the same `origin` (by default the text) are in the same split.

  Attributes:
    split: 'train' or 'validation', where the source decides; else a hash of the origin does.
  """

  name: str
  text: str
  origin: str | None = None
  split: str | None = None


@dataclasses.dataclass(frozen=True)
class Unreadable:
  """A document that cannot be used: its location (file and line, or record) and the reason."""

  where: str
  reason: str


class Source(Protocol):
  """A source of documents."""

  total_bytes: int | None
  """Size of all that will be read, for progress; none: unknown."""
  bytes_read: int
  """How much of it the latest `records` has read."""

  def fingerprint(self) -> str:
    """Identifies the content: equal fingerprints mean equal documents."""

  def records(self) -> Iterator[Document | Unreadable]:
    """Yields all records, always in the same order."""


def uniform_hash(purpose: str, text: str) -> float:
  """A number in [0, 1) that depends only on the arguments."""
  digest = hashlib.sha256(f'{purpose}:{text}'.encode()).digest()
  return int.from_bytes(digest[:6], 'big') / 2**48
