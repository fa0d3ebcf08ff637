"""Tokenizers: nothing is lost, nothing in a text can end a document."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mor_jax.config import ConfigError, DataConfig
from mor_jax.data import corpus, tokenizer

TEXTS = st.text() | st.lists(st.sampled_from(['<|endoftext|>', ' ', '\n', 'é', '🙂', 'def f', '\x00'])).map(
  ''.join
)
SMALL = DataConfig(vocab_size=600, max_documents=20)


@pytest.fixture(scope='module')
def built(tmp_path_factory):
  """Both kinds, as they come back from disk."""
  result = {}
  for kind in ('bytes', 'bpe'):
    path = tmp_path_factory.mktemp(kind) / 'tokenizer.json'
    original = tokenizer.build(DataConfig(tokenizer=kind, vocab_size=600, max_documents=20))
    original.save(path)
    result[kind] = tokenizer.Tokenizer.load(path)
    assert result[kind].digest == original.digest
  return result


@pytest.mark.parametrize('kind', ['bytes', 'bpe'])
@settings(deadline=None)
@given(text=TEXTS)
def test_round_trip_and_no_special_token_from_text(built, kind, text):
  ids = built[kind].encode(text)
  assert built[kind].decode(ids) == text
  assert built[kind].end_of_text not in ids
  assert all(0 <= token < built[kind].vocab_size for token in ids)


@settings(deadline=None)
@given(text=TEXTS)
def test_bytes_are_bytes(built, text):
  assert built['bytes'].encode(text) == list(text.encode())


def test_vocabularies(built):
  assert (built['bytes'].vocab_size, built['bytes'].end_of_text) == (257, 256)
  assert built['bpe'].vocab_size == 600
  assert built['bpe'].decode([built['bpe'].end_of_text]) == ''
  text = next(corpus.documents(SMALL, 'validation')).text
  assert len(built['bpe'].encode(text)) < 0.6 * len(text)


def test_batch_is_each_text_alone(built):
  texts = ['', 'one', 'two words', 'é\n\n  <|endoftext|>']
  for built_tokenizer in built.values():
    assert built_tokenizer.encode_batch(texts) == [built_tokenizer.encode(text) for text in texts]


def test_training_is_deterministic_and_reads_the_train_split_only(built, monkeypatch):
  assert tokenizer.build(SMALL).digest == built['bpe'].digest
  read = []
  original = corpus.documents
  monkeypatch.setattr(corpus, 'documents', lambda data, split: read.append(split) or original(data, split))
  tokenizer.build(SMALL)
  assert read == ['train']


def test_small_corpus_gives_the_entries_that_it_has():
  data = DataConfig(vocab_size=100_000, max_documents=2)
  size = tokenizer.build(data).vocab_size
  assert 257 < size < 20_000


def test_unusable_files_are_refused(built, tmp_path):
  path = tmp_path / 'tokenizer.json'
  path.write_text('{"half')
  with pytest.raises(ValueError, match=r'tokenizer\.json is not a tokenizer\.json'):
    tokenizer.Tokenizer.load(path)
  built['bytes'].save(path)
  content = json.loads(path.read_text())
  path.write_text(json.dumps(content | {'added_tokens': []}))
  with pytest.raises(ValueError, match=r'no token <\|endoftext\|>'):
    tokenizer.Tokenizer.load(path)


def test_any_tokenizer_file_by_path_or_folder(built, tmp_path):
  path = tmp_path / 'tokenizer.json'
  built['bpe'].save(path)
  for place in (path, tmp_path):
    assert tokenizer.build(DataConfig(tokenizer=str(place))).digest == built['bpe'].digest
  data = DataConfig(tokenizer=str(tmp_path))
  fingerprint = tokenizer.fingerprint(data)
  path.write_text(path.read_text() + ' ')
  assert tokenizer.fingerprint(data) != fingerprint
  with pytest.raises(ConfigError, match=r'data\.tokenizer=.*no token </s>.*data\.separator'):
    tokenizer.build(DataConfig(tokenizer=str(path), separator='</s>'))


def test_separator_of_another_name():
  made = tokenizer.build(DataConfig(tokenizer='bytes', separator='</s>'))
  assert (made.end_of_text, made.vocab_size) == (256, 257)
  assert made.encode('</s>') == list(b'</s>')


def test_no_such_tokenizer():
  with pytest.raises(ConfigError, match=r'data\.tokenizer=none\.json is neither bpe nor bytes'):
    tokenizer.build(DataConfig(tokenizer='none.json'))
  with pytest.raises(
    ConfigError, match=r'some/model is not a file .* HF_HUB_OFFLINE is set; .*tokenizer=bpe'
  ):
    tokenizer.build(DataConfig(tokenizer='some/model'))
