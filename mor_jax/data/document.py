"""What every source yields: documents, and notes of what could not be read."""

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Protocol


@dataclasses.dataclass(frozen=True)
class Document:
  """A text with its name. Documents of one `origin`, by default their text, fall into the same split."""

  name: str
  text: str
  origin: str | None = None


@dataclasses.dataclass(frozen=True)
class Unreadable:
  """A document that cannot be used: where it is (file and line, or record) and why."""

  where: str
  reason: str


class Source(Protocol):
  """Where documents come from."""

  total_bytes: int | None
  """Size of all that will be read, for progress; none: unknown."""
  bytes_read: int
  """How much of it the latest `records` has read."""

  def fingerprint(self) -> str:
    """Names what will be read: equal fingerprints mean equal documents."""

  def records(self) -> Iterator[Document | Unreadable]:
    """Everything there is, in an order that never changes."""


def uniform_hash(purpose: str, text: str) -> float:
  """A number in [0, 1) that depends on nothing but its arguments."""
  digest = hashlib.sha256(f'{purpose}:{text}'.encode()).digest()
  return int.from_bytes(digest[:6], 'big') / 2**48
