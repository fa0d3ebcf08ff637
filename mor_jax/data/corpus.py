"""Documents of `data.source`: mixed, filtered, limited and split into train and validation.

Every source is read in one pass and in a fixed order. A hash of a document's origin decides
its split, so the split never changes.
"""

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator

from mor_jax.config import ConfigError, DataConfig
from mor_jax.data import readers
from mor_jax.data.cache import cache_dir
from mor_jax.data.document import Document, Source, Unreadable, uniform_hash
from mor_jax.data.embedded import EmbeddedCorpus
from mor_jax.data.files import Files
from mor_jax.data.hubs import HuggingFaceSource, TfdsSource
from mor_jax.data.questions import EmbeddedQuestions

SPLITS = ('train', 'validation')
EXAMPLES_SHOWN = 5

_JUDGED_AFTER = 1000  # documents; fewer say little about the share of bad ones, except at the end
_EMPTY, _DUPLICATE = 'empty', 'duplicate'
_WEIGHTED = re.compile(r'\s*(?:(?P<weight>\d*\.?\d+)\s*\*\s*)?(?P<source>.*\S)\s*', re.DOTALL)

ALL = 1.0
"""`data.validation_fraction` where all text is to be measured and none to be trained on."""


def open_source(data: DataConfig) -> Source:
  """Opens the source that `data.source` names, after some quick checks.

  Raises:
    ConfigError: unknown kind, no matching file, a missing package.
  """
  written = data.source.split(';')
  parts = [match for part in written if (match := _WEIGHTED.fullmatch(part))]
  if len(parts) < len(written):
    raise ConfigError(f'data.source={data.source!r} has an empty part; write it as 0.7*SOURCE;0.3*SOURCE')
  sources = [_open_single(part['source'], data) for part in parts]
  if len(sources) == 1:
    return sources[0]
  weights = [float(part['weight'] or 1) for part in parts]
  if min(weights) <= 0:
    raise ConfigError(f'data.source={data.source!r}: weights must be above 0')
  return Mixture(sources, weights)


def _open_single(spec: str, data: DataConfig) -> Source:
  kind, _, rest = spec.partition(':')
  if spec == 'embedded':
    return EmbeddedQuestions() if data.format == 'chat' else EmbeddedCorpus()
  if kind == 'files' and rest:
    is_divided = data.validation_fraction < ALL
    return Files(rest, readers.form(data), data.validation_fraction if is_divided else None)
  if kind == 'tfds' and rest:
    if data.format == 'chat':
      raise ConfigError(
        f'data.source={spec} with data.format=chat: conversations come from files:, hf: and embedded; write them as '
        f'JSON lines'
      )
    return TfdsSource(rest)
  if kind == 'hf' and rest:
    return HuggingFaceSource(rest, readers.form(data), cache_dir(data) / 'revisions')
  raise ConfigError(
    f'data.source={spec!r} is not one of embedded, files:PATTERN, tfds:NAME/SPLIT/KEY, '
    f'hf:DATASET:CONFIG, or several as 0.7*SOURCE;0.3*SOURCE'
  )


Convert = Callable[[Document], Document | Unreadable]
"""What is made of a document after it was read; it keeps its split."""


class Mixture:
  """Several sources, weighted by characters. Ends when the first of them ends."""

  def __init__(self, sources: list[Source], weights: list[float]):
    self._sources, self._weights = sources, weights
    self.total_bytes: int | None = None  # which source ends first is not known
    self.bytes_read = 0

  def fingerprint(self) -> str:
    """The fingerprints and weights of the sources."""
    parts = (f'{w:g}*{s.fingerprint()}' for w, s in zip(self._weights, self._sources, strict=True))
    return ';'.join(parts)

  def records(self) -> Iterator[Document | Unreadable]:
    """Yields the next document from the source furthest behind its share."""
    streams = [source.records() for source in self._sources]
    taken = [0.0] * len(streams)
    while True:
      index = taken.index(min(taken))
      for record in streams[index]:
        yield record
        if isinstance(record, Document):
          taken[index] += max(1, len(record.text)) / self._weights[index]
          break
      else:
        return


class Reading:
  """One pass over the documents of both splits. Counts the dropped ones. Iterate it once.

  Attributes:
    data: the settings.
    source: knows how much has been read.
    dropped: number of dropped documents by reason.
    examples: location and problem of the first unreadable documents.
  """

  def __init__(self, data: DataConfig, convert: Convert | None = None):
    """Opens the source, whose documents go through `convert` once they are known to be wanted; None: they do not.

    Raises:
      ConfigError: see `open_source`.
    """
    self.source, self._convert = open_source(data), convert
    self.dropped: Counter[str] = Counter()
    self.examples: list[str] = []
    self.data = data
    self._seen = self._unreadable = 0

  def __iter__(self) -> Iterator[tuple[str, Document]]:
    """Yields (split, document).

    Raises:
      ConfigError: more than `data.max_bad_fraction` of the documents are unreadable, or a whole
        file or dataset is.
    """
    room = {split: _limit(self.data, split) for split in SPLITS}
    for document in self._usable():
      split = split_of(document, self.data.validation_fraction)
      left = room[split]
      if left is not None:
        room[split] = left - 1
        if left <= 0:
          continue
      yield split, document
      if all(left is not None and left <= 0 for left in room.values()):
        return
    self._judge(at_least=0)

  def _usable(self) -> Iterator[Document]:
    texts: set[bytes] = set()
    for record in self.source.records():
      self._seen += 1
      if isinstance(record, Unreadable):
        self._note_unreadable(record)
      elif not record.text.strip():
        self.dropped[_EMPTY] += 1
      elif self.data.drop_duplicates and _seen_before(record.text, texts):
        self.dropped[_DUPLICATE] += 1
      else:
        converted = self._convert(record) if self._convert else record
        if isinstance(converted, Unreadable):
          self._note_unreadable(converted)
        else:
          yield converted

  def _note_unreadable(self, record: Unreadable) -> None:
    self.dropped[record.reason] += 1
    self._unreadable += 1
    if len(self.examples) < EXAMPLES_SHOWN:
      self.examples.append(f'{record.where}: {record.reason}')
    self._judge(at_least=_JUDGED_AFTER)

  def _judge(self, at_least: int) -> None:
    allowed = self.data.max_bad_fraction * max(self._seen, at_least)
    if self._unreadable > allowed:
      raise ConfigError(
        f'{self._unreadable} of {self._seen} documents cannot be read, more than '
        f'data.max_bad_fraction={self.data.max_bad_fraction:g} allows: {"; ".join(self.examples)}; '
        f'repair or leave out these files, or raise data.max_bad_fraction to skip such documents'
      )


def documents(data: DataConfig, split: str) -> Iterator[Document]:
  """Yields the documents of a split, 'train' or 'validation', always in the same order.

  `data.max_documents` is divided between the splits by `data.validation_fraction`, with at
  least one document in each.

  Raises:
    ConfigError: the source cannot be read.
  """
  if split not in SPLITS:
    raise ValueError(f'split={split!r} is not one of {", ".join(SPLITS)}')
  found = (document for side, document in Reading(data) if side == split)
  return itertools.islice(found, _limit(data, split))


def split_of(document: Document, validation_fraction: float) -> str:
  """The split of a document."""
  if document.split is not None:
    return document.split
  origin = document.text if document.origin is None else document.origin
  return 'validation' if uniform_hash('split', origin) < validation_fraction else 'train'


def _limit(data: DataConfig, split: str) -> int | None:
  if data.max_documents is None:
    return None
  validation = max(1, round(data.max_documents * data.validation_fraction))
  validation = min(validation, data.max_documents - 1)
  return validation if split == 'validation' else data.max_documents - validation


def _seen_before(text: str, texts: set[bytes]) -> bool:
  digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
  seen = digest in texts
  texts.add(digest)
  return seen
