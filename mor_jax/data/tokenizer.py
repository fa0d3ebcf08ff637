"""Text to token ids and back: a wrapper around the `tokenizers` library, stored as a tokenizer.json.

The two kinds built here are byte-level: they encode every text, and decoding restores it exactly.
"""

import functools
import hashlib
import itertools
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mor_jax.config import ConfigError, DataConfig
from mor_jax.data import corpus, hubs
from mor_jax.data.messages import Conversation
from mor_jax.files import write_atomically

END_OF_TEXT = '<|endoftext|>'
TRAINING_BYTES_PER_ENTRY = (
  1024  # text that a vocabulary is trained on; twice as much saves 0.7% of the tokens
)

MADE_HERE = ('bpe', 'bytes')

AUTO = 'auto'
_UNHEARD_OF = '\U0010fffd'  # of the private use area: no vocabulary of words has it
BYTE_PIECE = re.compile('<0x[0-9A-F]{2}>')
CONTEXT = 8  # tokens before a text that may change how it is written: its first space, a character begun
REPLACEMENT = '\ufffd'  # stands for bytes that do not make a character

_HUB_NAME = re.compile(r'[\w.-]+/[\w.-]+')


class Tokenizer:
  """A vocabulary with a token that separates documents, called end of text regardless of its name."""

  def __init__(self, backend: tokenizers.Tokenizer, separator: str = END_OF_TEXT, begin: str | None = AUTO):
    """Wraps `backend`, whose vocabulary must have the token `separator` and which must not draw its tokens.

    Args:
      begin: token before every text; AUTO: the one that the tokenizer's template puts there, if any; None: nothing.

    Raises:
      ValueError: it cannot be used; the message says why.
    """
    dropout = getattr(backend.model, 'dropout', None)
    if dropout:
      raise ValueError(
        f'the tokenizer has dropout {dropout:g}, so that a text would have other tokens each time it is read; '
        f'set "dropout" to null in its tokenizer.json'
      )
    end_of_text = backend.token_to_id(separator)
    if end_of_text is None:
      raise ValueError(f'the tokenizer has no token {separator}, which separates documents (data.separator)')
    try:
      unknown = backend.encode(_UNHEARD_OF, add_special_tokens=False).ids
    except (KeyboardInterrupt, SystemExit):
      raise
    except BaseException as error:  # as in `read_backend`
      raise ValueError(f'the tokenizer cannot encode words that it does not know ({error})') from None
    # A document that contains the characters '<|endoftext|>' must not end there.
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    self._backend = backend
    self.end_of_text: int = end_of_text
    self.separator = separator
    self.begin_of_text: int | None = None
    """Id of the token before every text; None: there is none."""
    if begin is not None:
      self.begin_of_text = _template_begin(backend) if begin == AUTO else backend.token_to_id(begin)
    if begin not in (AUTO, None) and self.begin_of_text is None:
      raise ValueError(f'the tokenizer has no token {begin}, which begins texts (data.begin)')
    says_all = _UNHEARD_OF in backend.decode(unknown, skip_special_tokens=False)
    self._leaves_out, self._unknown = not unknown, frozenset() if says_all else frozenset(unknown)
    tokens = {self.end_of_text: separator, self.begin_of_text: self.begin}
    # A single character may well be meant: lines as documents, separated by their ends.
    self._guards = {index: token for index, token in tokens.items() if token and len(token) > 1}

  @property
  def begin(self) -> str | None:
    """The token before every text."""
    return None if self.begin_of_text is None else self._backend.id_to_token(self.begin_of_text)

  @functools.cached_property
  def vocab_size(self) -> int:
    """Largest token id + 1: the embeddings that a model needs, more than there are entries if ids have gaps."""
    return max(self._backend.get_vocab().values()) + 1

  @property
  def entries(self) -> int:
    """Number of tokens, including end of text."""
    return self._backend.get_vocab_size()

  @property
  def digest(self) -> str:
    """SHA-256 of the tokenizer's JSON: equal digests mean equal token ids."""
    return hashlib.sha256(self._backend.to_str().encode()).hexdigest()

  def token_to_id(self, token: str) -> int | None:
    """Id of a token by its name in the vocabulary."""
    return self._backend.token_to_id(token)

  def encode(self, text: str) -> list[int]:
    """Token ids of a text. No special tokens are added, and none recognised that would begin or end a document."""
    return self._guarded(text, self._plain(text))

  def _plain(self, text: str) -> list[int]:
    return self._backend.encode(text, add_special_tokens=False).ids

  def _guarded(self, text: str, ids: list[int]) -> list[int]:
    """The ids, without those of the separator that come from a text which spells it."""
    if not self._guards or self._guards.keys().isdisjoint(ids):
      return ids
    cuts = [match.start() + 1 for match in re.finditer('|'.join(map(re.escape, self._guards.values())), text)]
    parts = [text[begin:end] for begin, end in itertools.pairwise([0, *cuts, len(text)])]
    found = itertools.chain.from_iterable(map(self._plain, parts))
    return [index for index in found if index not in self._guards]

  def unsaid(self, texts: Sequence[str], ids: Sequence[Sequence[int]]) -> int:
    """How many characters or words of texts, whose ids are given, the vocabulary has no token for."""
    if self._leaves_out:
      said = self._backend.decode_batch(list(map(list, ids)))
      return sum(max(_signs(text) - _signs(one), 0) for text, one in zip(texts, said, strict=True))
    return sum(index in self._unknown for one in ids for index in one) if self._unknown else 0

  def encode_text(self, text: str) -> list[int]:
    """Token ids of a text from its beginning: as in the rows of training, and as a prompt."""
    return [*self._begins, *self.encode(text)]

  @property
  def _begins(self) -> list[int]:
    return [] if self.begin_of_text is None else [self.begin_of_text]

  def encode_special(self, text: str) -> list[int]:
    """Token ids of a text in which special tokens are spelled out, as chat templates do; none is added."""
    return self._special.encode(text, add_special_tokens=False).ids

  def encode_spelled(self, texts: Sequence[str]) -> list[tokenizers.Encoding]:
    """`encode_special` of several texts, on all cores, with the characters that each token stands for."""
    return self._special.encode_batch(texts, add_special_tokens=False)

  @functools.cached_property
  def specials(self) -> tuple[str, ...]:
    """The special tokens as they are spelled, the longest first."""
    added = self._backend.get_added_tokens_decoder().values()
    names = {token.content for token in added if token.special} | {self.separator}
    return tuple(sorted(names, key=lambda name: (-len(name), name)))

  @functools.cached_property
  def _special(self) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
    backend.encode_special_tokens = False
    return backend

  def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
    """`encode_text` of several texts, on all cores."""
    return [[*self._begins, *ids] for ids in self.encode_batch(texts)]

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of several texts, on all cores."""
    encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
    return [self._guarded(text, one.ids) for text, one in zip(texts, encodings, strict=True)]

  def decode(self, ids: Sequence[int]) -> str:
    """The text of token ids. Special tokens are left out; bytes that are not UTF-8 become U+FFFD."""
    return self._backend.decode(list(ids))

  def spelled(self, token: int) -> str:
    """The text of a single token; of a special one, which texts do not show, its name."""
    return self.decode([token]) or self._backend.id_to_token(token) or ''

  def is_byte(self, token: int) -> bool:
    """Whether a token is one byte of SentencePiece's: one that is no text spoils all of those around it."""
    return BYTE_PIECE.fullmatch(self._backend.id_to_token(token) or '') is not None

  def continuation(self, ids: Sequence[int], before: Sequence[int]) -> str:
    """The text that token ids add to that of the ids before them.

    Not the text of `ids` alone: SentencePiece drops the space before the first word of what it decodes, and a
    character that `before` began may end here.
    """
    start = max(len(before) - CONTEXT, 0)
    while start and self.decode(before[start:]).startswith(REPLACEMENT):
      start -= 1  # within a character, which would spoil those after it
    told, whole = self.decode(before[start:]), self.decode([*before[start:], *ids])
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(told, whole, strict=False))
    return whole[sum(1 for _ in shared) :]

  def save(self, path: str | os.PathLike) -> None:
    """Writes a tokenizer.json, which the `tokenizers` and `transformers` libraries can also read."""
    write_atomically(pathlib.Path(path), self._backend.to_str())

  @classmethod
  def load(
    cls, path: str | os.PathLike, separator: str = END_OF_TEXT, begin: str | None = AUTO
  ) -> 'Tokenizer':
    """Reads a tokenizer.json. Raises OSError if it's missing and ValueError if it cannot be used."""
    return cls(read_backend(path), separator, begin)


def read_backend(path: str | os.PathLike) -> tokenizers.Tokenizer:
  """What the library makes of a tokenizer.json. Raises OSError if it's missing and ValueError if it cannot be used."""
  text = pathlib.Path(path).read_text(encoding='utf-8')
  try:
    return tokenizers.Tokenizer.from_str(text)
  except (KeyboardInterrupt, SystemExit):
    raise
  except BaseException as error:  # the library raises nothing more specific, and its panics are no Exceptions
    raise ValueError(f'{path} is not a tokenizer.json: {error}') from error


def _signs(text: str) -> int:
  """Characters of a text, spaces left out."""
  return sum(map(len, text.split()))


def _template_begin(backend: tokenizers.Tokenizer) -> int | None:
  """The one token that the tokenizer's template puts before a text; None where it puts none, or several."""
  try:
    alone, whole = (backend.encode('a', add_special_tokens=special).ids for special in (False, True))
  except Exception:  # a vocabulary that cannot say it, whose texts are refused later
    return None
  added = len(whole) - len(alone)
  start = next((i for i in range(added + 1) if whole[i : i + len(alone)] == alone), 0)
  return whole[0] if start == 1 else None


def build(data: DataConfig) -> Tokenizer:
  """Builds the tokenizer of a corpus. Same corpus and settings, same tokenizer.

  `bytes` has 257 entries: token id = byte, then end of text. `bpe` is trained on the first
  documents of the train split, 1 KiB of text per entry of `data.vocab_size`; a small corpus may
  give fewer entries. Any other value names a tokenizer.json (see `existing_file`).

  Raises:
    ConfigError: there is no such tokenizer, or it lacks the token `data.separator`.
  """
  if data.tokenizer not in MADE_HERE:
    path = existing_file(data)
    try:
      return Tokenizer.load(path, data.separator, data.begin)
    except (OSError, ValueError) as error:
      raise ConfigError(f'data.tokenizer={data.tokenizer} cannot be used: {error}') from error
  backend = (
    _byte_vocabulary(data.separator)
    if data.tokenizer == 'bytes'
    else _train_bpe(_documents(data), data.vocab_size, data.separator)
  )
  return Tokenizer(backend, data.separator, data.begin)


def _documents(data: DataConfig) -> Iterator[str]:
  """Texts of the train split; of conversations, what was said."""
  for document in corpus.documents(data, 'train'):
    if data.format == 'chat':
      yield '\n'.join(Conversation.from_text(document.text).contents)
    else:
      yield document.text


def begin_of(data: DataConfig) -> str | None:
  """The token before every document, as `build` finds it. Raises ConfigError as `build`."""
  if data.begin != AUTO:
    return data.begin
  return None if data.tokenizer in MADE_HERE else build(data).begin


def fingerprint(data: DataConfig) -> str:
  """Identifies the tokenizer that `build` returns for a corpus: equal fingerprints mean equal tokenizers."""
  if data.tokenizer == 'bytes':
    return 'bytes'
  if data.tokenizer == 'bpe':
    return f'bpe{data.vocab_size}'
  content = existing_file(data).read_bytes()
  return f'{_name(data.tokenizer)}-{hashlib.sha256(content).hexdigest()[:16]}'


def content_of(fingerprint: str) -> str:
  """The part of a fingerprint that its tokenizer's content decides; the rest is the name of its folder."""
  return fingerprint.rpartition('-')[2]


def same_content(fingerprint: str, other: str) -> bool:
  """Whether two fingerprints are of equal tokenizers, wherever they lie."""
  return content_of(fingerprint) == content_of(other)


def existing_file(data: DataConfig) -> pathlib.Path:
  """The tokenizer.json of `data.tokenizer`: a file, a folder that contains one, or a name on the Hub.

  Files from the Hub are downloaded once. Raises ConfigError if there is none.
  """
  path = pathlib.Path(data.tokenizer).expanduser()
  if path.is_dir():
    path = path / 'tokenizer.json'
  if path.is_file():
    return path
  if not _HUB_NAME.fullmatch(data.tokenizer):
    raise ConfigError(
      f'data.tokenizer={data.tokenizer} is neither bpe nor bytes, and there is no such tokenizer.json'
    )
  return _from_hub(data.tokenizer)


def _from_hub(name: str) -> pathlib.Path:
  flag = f'data.tokenizer={name}'
  try:
    import huggingface_hub
  except ImportError as error:
    raise ConfigError(f'{flag} is not a file, and the hub needs: pip install huggingface_hub') from error
  cached = huggingface_hub.try_to_load_from_cache(name, 'tokenizer.json')
  if isinstance(cached, str):
    return pathlib.Path(cached)
  remedy = 'give the path of a tokenizer.json, or use data.tokenizer=bpe'
  if huggingface_hub.constants.HF_HUB_OFFLINE:
    raise ConfigError(
      f'{flag} is not a file and would have to be downloaded, but HF_HUB_OFFLINE is set; {remedy}'
    )
  hubs.require_network(huggingface_hub.constants.ENDPOINT, flag, remedy)
  try:
    return pathlib.Path(huggingface_hub.hf_hub_download(name, 'tokenizer.json'))
  except Exception as error:  # not found, gated, cut off: the library's text says which
    raise ConfigError(f'{flag} cannot be downloaded ({type(error).__name__}: {error}); {remedy}') from error


def _name(tokenizer: str) -> str:
  """A short name, for folders."""
  path = pathlib.PurePath(tokenizer)
  return path.parent.name or path.stem if path.name == 'tokenizer.json' else path.stem


def _byte_level(model: models.BPE, split_words: bool) -> tokenizers.Tokenizer:
  backend = tokenizers.Tokenizer(model)
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split_words)
  backend.decoder = decoders.ByteLevel()
  return backend


def _byte_vocabulary(separator: str) -> tokenizers.Tokenizer:
  backend = _byte_level(models.BPE(vocab=_byte_symbols(), merges=[]), split_words=False)
  backend.add_special_tokens([separator])
  return backend


def _byte_symbols() -> dict[str, int]:
  """Maps each character that byte-level tokenizers use for a byte to that byte.

  Printable Latin-1 characters represent themselves. The other bytes, in order, use the
  characters from U+0100 upwards.
  """
  symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
  themselves = {symbol: ord(symbol) for symbol in symbols if ord(symbol) < 256}
  others = (byte for byte in range(256) if byte not in themselves.values())
  return themselves | dict(zip(symbols[len(themselves) :], others, strict=True))


def _train_bpe(documents: Iterable[str], vocab_size: int, separator: str) -> tokenizers.Tokenizer:
  backend = _byte_level(models.BPE(), split_words=True)
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[separator],
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  backend.train_from_iterator(_texts(documents, vocab_size * TRAINING_BYTES_PER_ENTRY), trainer)
  return backend


def _texts(documents: Iterable[str], max_bytes: int) -> Iterator[str]:
  read = 0
  for text in documents:
    yield text
    read += len(text.encode())
    if read >= max_bytes:
      return
