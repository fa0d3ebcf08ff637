"""Texts of tokens that come one after another: whatever the cut, they join to the text of all."""

import random
from unittest import mock

import numpy as np
import pytest
import tokenizers as hugging_face

from mor_jax.config import DataConfig
from mor_jax.data.token_texts import token_texts
from mor_jax.data.tokenizer import REPLACEMENT, Tokenizer, build
from mor_jax.inference import continuation
from mor_jax.inference.requests import Request, Result
from mor_jax.inference.scheduler import Scheduler

PIECES = [
  '</s>',
  '\u2581import',
  '\u2581json',
  '\u2581as',
  '\u2581x',
  ',',
  's',
  *(f'<0x{byte:02X}>' for byte in range(256)),
]


@pytest.fixture(scope='module')
def sentence_pieces():
  """A tokenizer as SentencePiece makes them: words with their space, bytes for what has no piece."""
  model = hugging_face.models.BPE({piece: i for i, piece in enumerate(PIECES)}, [], byte_fallback=True)
  backend = hugging_face.Tokenizer(model)
  backend.decoder = hugging_face.decoders.Sequence(
    [
      hugging_face.decoders.Replace('\u2581', ' '),
      hugging_face.decoders.ByteFallback(),
      hugging_face.decoders.Fuse(),
      hugging_face.decoders.Strip(' ', 1, 0),
    ]
  )
  return Tokenizer(backend, '</s>')


def pieces(*texts: str) -> list[int]:
  """Ids of pieces; other texts are given by their bytes."""
  found = []
  for text in texts:
    found += [PIECES.index(text)] if text in PIECES else [PIECES.index(f'<0x{b:02X}>') for b in text.encode()]
  return found


def test_a_continuation_keeps_the_space_before_its_first_word(sentence_pieces):
  before, after = pieces('\u2581import', '\u2581json'), pieces('\u2581as', '\u2581x')
  assert sentence_pieces.decode(before) + sentence_pieces.continuation(after, before) == 'import json as x'
  assert sentence_pieces.continuation(before, []) == 'import json'


@pytest.mark.parametrize('cut', range(27))
def test_a_text_cut_anywhere_joins_to_itself(sentence_pieces, cut):
  ids = pieces(
    '\u2581import', '\u20ac\U0001f600\xe9\u20ac\U0001f600', ',', '\u2581as', '\xe9\u20ac', 's', '\u2581x'
  )
  told = sentence_pieces.decode(ids[:cut]).rstrip(REPLACEMENT)
  assert told + sentence_pieces.continuation(ids[cut:], ids[:cut]) == sentence_pieces.decode(ids)


def test_the_texts_of_tokens_join_to_the_text(sentence_pieces):
  ids = pieces('\u2581import', '\u2581json', '\u20ac' * 9, '\u2581as', ',', '\u2581x', '\U0001f600')
  texts = token_texts(sentence_pieces, np.array(ids))
  assert len(texts) == len(ids)
  assert ''.join(texts) == sentence_pieces.decode(ids) == 'import json' + '\u20ac' * 9 + ' as, x\U0001f600'


def test_a_stop_string_that_begins_with_a_space_is_found(sentence_pieces):
  before, after = pieces('\u2581import', '\u2581json'), pieces('s', '\u2581as', '\u2581x')
  scheduler = Scheduler(mock.MagicMock(), sentence_pieces)
  result = Result(Request(tuple(before), stop_strings=(' as',)), tokens=after)
  assert scheduler._update_text(result)
  assert (result.text, result.tokens) == ('s', pieces('s'))


@pytest.mark.parametrize('kind', ['bytes', 'pieces'])
def test_a_growing_text_is_that_of_its_tokens(kind, sentence_pieces, monkeypatch):
  """Characters of several bytes, halves of them, and what is no text, in updates of any size."""
  made = build(DataConfig(tokenizer='bytes')) if kind == 'bytes' else sentence_pieces
  words = ['\u2581import', '\u2581json', '\u20ac', '\U0001f600', ',', '\xe9', 's']
  drawn = random.Random(0)
  monkeypatch.setattr(continuation, 'WINDOW', 4)
  settled = 0
  for _ in range(60):
    texts = drawn.choices(words, k=30)
    ids = made.encode(''.join(texts)) if kind == 'bytes' else pieces(*texts)
    for _ in range(drawn.choice((0, 3))):
      del ids[drawn.randrange(len(ids))]  # halves of characters
    cut = drawn.randrange(12)
    grown, count = continuation.Continuation(made, ids[:cut]), cut
    while count < len(ids):
      count = min(count + drawn.randrange(1, 9), len(ids))
      assert grown.update(ids[cut:count]) == made.continuation(ids[cut:count], ids[:cut])
    settled += grown._count > 0
  assert settled > 30, 'all was decoded every time'
