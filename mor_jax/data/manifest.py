"""What a prepared dataset says of itself."""

import dataclasses
import hashlib
import json
from typing import Any

from mor_jax.config import ConfigError, DataConfig
from mor_jax.data import tokenizer as tokenizers
from mor_jax.data.conversations import find_template
from mor_jax.files import parse_json

FORMAT_VERSION = 3  # raise it when the same settings would give another folder content
MANIFEST = 'manifest.json'
PREPARED = 'prepared:'  # data.source=prepared:FOLDER


@dataclasses.dataclass(frozen=True)
class SplitCounts:
  """Counts of a split. Bits per byte are nats per target / `bytes_per_token` / ln 2."""

  documents: int
  bytes: int  # of the documents in UTF-8, without separators
  tokens: int  # one end of text per document included, padding left out
  targets: int  # tokens that the loss predicts: all but the first of each segment
  rows: int
  cut: int  # documents longer than a row, which are in several; conversations lose their end

  @property
  def bytes_per_token(self) -> float:
    """Average bytes of text per token."""
    return self.bytes / self.tokens


@dataclasses.dataclass(frozen=True)
class Manifest:
  """The contents of a prepared dataset, as stored in manifest.json."""

  format_version: int
  source: str
  documents_digest: str  # of all texts
  seq_len: int
  packing: str
  tokenizer: str
  separator: str
  vocab_size: int
  tokenizer_digest: str
  dropped: dict[str, int]  # documents left out, by reason
  dropped_examples: list[str]  # where the first unreadable ones are
  splits: dict[str, SplitCounts]
  files: dict[str, int]  # size in bytes of every file that is needed to read the dataset
  begin: str | None = None  # token before every document
  unsaid: int = 0  # characters or words that the tokenizer has no token for
  extras: tuple[str, ...] = ()  # arrays of every row beside its tokens and segments
  chat: dict[str, Any] | None = None  # of conversations, `Chats.describe`
  too_long: int = 0  # conversations left out because they are longer than a row

  @property
  def template_digest(self) -> str | None:
    """SHA-256 of what conversations went through; None: documents are texts."""
    if self.chat is None:
      return None
    return hashlib.sha256(json.dumps(self.chat, sort_keys=True).encode()).hexdigest()

  @classmethod
  def from_json(cls, text: str) -> 'Manifest':
    """Reads what `json.dumps(dataclasses.asdict(manifest))` wrote."""
    fields = parse_json(text)
    splits = {name: SplitCounts(**counts) for name, counts in fields.pop('splits').items()}
    return cls(splits=splits, **fields | {'extras': tuple(fields.get('extras', ()))})


def check_settings(manifest: Manifest, data: DataConfig) -> None:
  """Raises ConfigError unless the dataset matches these settings."""
  is_chat = manifest.chat is not None
  if is_chat != (data.format == 'chat'):
    raise ConfigError(
      f'data.source={data.source} was prepared with format={"chat" if is_chat else "text"}, and data.format asks for '
      f'{data.format}; change data.format, or prepare the documents again'
    )
  if manifest.chat is not None and data.chat_template:
    found = manifest.chat['template'], manifest.chat['tokens']
    template = find_template(data)
    if found != (template.source, template.tokens):
      raise ConfigError(
        f'data.source={data.source} was prepared with another template than '
        f'data.chat_template={data.chat_template}; leave that unset, or prepare the conversations again'
      )
  wanted: dict[str, Any] = {
    'seq_len': data.seq_len,
    'tokenizer': tokenizers.fingerprint(data),
    'separator': data.separator,
  }
  for name, value in wanted.items():
    found = getattr(manifest, name)
    if found != value and not (name == 'tokenizer' and tokenizers.same_content(found, value)):
      raise ConfigError(
        f'data.source={data.source} was prepared with {name}={found}, and data.{name} asks '
        f'for {value}; change data.{name}, or prepare the documents again'
      )
  if data.begin not in (tokenizers.AUTO, manifest.begin):
    raise ConfigError(
      f'data.source={data.source} was prepared with begin={manifest.begin or "none"}, and data.begin asks for '
      f'{data.begin or "none"}; leave it at auto, or prepare the documents again'
    )
