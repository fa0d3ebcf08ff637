"""Conversations as their template wrote them: the text, what of it is learned, and both as tokens."""

import bisect
import dataclasses
import itertools
import json
from collections.abc import Sequence

import numpy as np

from mor_jax.data.tokenizer import Tokenizer

APART = '\ufdd4'
"""Stands within what a message says where it spells a special token: the two parts are read apart, so that it is none.
One of the characters that Unicode reserves for such use within a program."""


@dataclasses.dataclass(frozen=True)
class Rendered:
  """A conversation as text.

  Attributes:
    text: with APART in it.
    learned: (begin, end) of the characters that the assistant says, in order.
  """

  text: str
  learned: list[tuple[int, int]]

  def to_text(self) -> str:
    """The text of its document: all that decides on its tokens."""
    return json.dumps([self.text, self.learned], ensure_ascii=False)

  @classmethod
  def from_text(cls, text: str) -> 'Rendered':
    """As `to_text` wrote it."""
    written, learned = json.loads(text)
    return cls(written, [(begin, end) for begin, end in learned])


@dataclasses.dataclass(frozen=True)
class Encoded:
  """Tokens of a conversation.

  Attributes:
    ids_N: those of its text, special tokens recognised where the template wrote them.
    mask_N: 1 for those that the assistant says.
    ends_N: where the characters of each end in the text.
  """

  ids_N: np.ndarray
  mask_N: np.ndarray
  ends_N: np.ndarray


def encode(tokenizer: Tokenizer, conversations: Sequence[Rendered]) -> list[Encoded]:
  """The tokens of several conversations.

  A token is learned if it has a character of what the assistant says, as `transformers` sees it
  (`return_assistant_tokens_mask`): all tokens from that of the first character to that of the last.
  """
  parts = [one.text.split(APART) for one in conversations]
  encodings = iter(tokenizer.encode_spelled(list(itertools.chain.from_iterable(parts))))
  found = []
  for conversation, texts in zip(conversations, parts, strict=True):
    ids: list[int] = []
    begins: list[int] = []
    ends: list[int] = []
    place = 0
    for text in texts:
      encoding = next(encodings)
      ids += encoding.ids
      begins += (place + begin for begin, _ in encoding.offsets)
      ends += (place + end for _, end in encoding.offsets)
      place += len(text) + len(APART)
    mask_N = np.zeros(len(ids), np.int32)
    for begin, end in conversation.learned:
      mask_N[bisect.bisect_right(ends, begin) : bisect.bisect_left(begins, end)] = 1
    found.append(Encoded(np.array(ids, np.int32), mask_N, np.array(ends, np.int64)))
  return found


def without_specials(tokenizer: Tokenizer, text: str) -> str:
  """The text that is left of a rendered one without special tokens."""
  for name in tokenizer.specials:
    text = text.replace(name, '')
  return text.replace(APART, '')
