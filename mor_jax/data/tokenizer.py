"""Text to token ids and back: one class over the `tokenizers` library, stored as a tokenizer.json.

Both kinds are byte-level, so every text can be encoded and comes back unchanged.
"""

import hashlib
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mor_jax.config import DataConfig
from mor_jax.data import corpus

END_OF_TEXT = '<|endoftext|>'
TRAINING_BYTES_PER_ENTRY = (
  1024  # text that a vocabulary is trained on; twice as much saves 0.7% of the tokens
)


class Tokenizer:
  """A byte-level vocabulary with one special token, end of text, which separates documents."""

  def __init__(self, backend: tokenizers.Tokenizer):
    """Wraps `backend`, whose vocabulary must have the token `<|endoftext|>`."""
    end_of_text = backend.token_to_id(END_OF_TEXT)
    if end_of_text is None:
      raise ValueError(f'the tokenizer has no token {END_OF_TEXT}, which separates documents')
    # A document that contains the characters '<|endoftext|>' must not end there.
    backend.encode_special_tokens = True
    self._backend = backend
    self.end_of_text: int = end_of_text

  @property
  def vocab_size(self) -> int:
    """Entries of the vocabulary, end of text included."""
    return self._backend.get_vocab_size()

  @property
  def digest(self) -> str:
    """SHA-256 of the tokenizer's JSON: equal digests mean equal token ids."""
    return hashlib.sha256(self._backend.to_str().encode()).hexdigest()

  def encode(self, text: str) -> list[int]:
    """Token ids of a text; no special token is added."""
    return self._backend.encode(text, add_special_tokens=False).ids

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of several texts, on all cores."""
    return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

  def decode(self, ids: Sequence[int]) -> str:
    """The text of token ids. Special tokens are left out; bytes that are no UTF-8 become U+FFFD."""
    return self._backend.decode(list(ids))

  def save(self, path: str | os.PathLike) -> None:
    """Writes the tokenizer.json, which the `tokenizers` and `transformers` libraries can also read."""
    pathlib.Path(path).write_text(self._backend.to_str(), encoding='utf-8')

  @classmethod
  def load(cls, path: str | os.PathLike) -> 'Tokenizer':
    """Reads a tokenizer.json. Raises OSError if it's missing and ValueError if it cannot be used."""
    text = pathlib.Path(path).read_text(encoding='utf-8')
    try:
      backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more specific
      raise ValueError(f'{path} is not a tokenizer.json: {error}') from error
    return cls(backend)


def build(data: DataConfig) -> Tokenizer:
  """The tokenizer of a corpus, the same for the same corpus and settings.

  `bytes` has 257 entries: token id = byte, then end of text. `bpe` is trained on the first
  documents of the train split, 1 KiB of text for each of `data.vocab_size` entries; a small
  corpus may give fewer entries.
  """
  if data.tokenizer == 'bytes':
    return Tokenizer(_byte_vocabulary())
  return Tokenizer(_train_bpe(corpus.documents(data, 'train'), data.vocab_size))


def _byte_level(model: models.BPE, split_words: bool) -> tokenizers.Tokenizer:
  backend = tokenizers.Tokenizer(model)
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split_words)
  backend.decoder = decoders.ByteLevel()
  return backend


def _byte_vocabulary() -> tokenizers.Tokenizer:
  backend = _byte_level(models.BPE(vocab=_byte_symbols(), merges=[]), split_words=False)
  backend.add_special_tokens([END_OF_TEXT])
  return backend


def _byte_symbols() -> dict[str, int]:
  """Byte of each character by which byte-level tokenizers represent bytes.

  Printable Latin-1 characters stand for themselves; the other bytes, in order, have the
  characters from U+0100 on.
  """
  symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
  themselves = {symbol: ord(symbol) for symbol in symbols if ord(symbol) < 256}
  others = (byte for byte in range(256) if byte not in themselves.values())
  return themselves | dict(zip(symbols[len(themselves) :], others, strict=True))


def _train_bpe(documents: Iterable[corpus.Document], vocab_size: int) -> tokenizers.Tokenizer:
  backend = _byte_level(models.BPE(), split_words=True)
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[END_OF_TEXT],
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  backend.train_from_iterator(_texts(documents, vocab_size * TRAINING_BYTES_PER_ENTRY), trainer)
  return backend


def _texts(documents: Iterable[corpus.Document], max_bytes: int) -> Iterator[str]:
  read = 0
  for document in documents:
    yield document.text
    read += len(document.text.encode())
    if read >= max_bytes:
      return
