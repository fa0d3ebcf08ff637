"""Faults that use brought to light, of data: ids that were lost, corpora taken for others, texts misread."""

import dataclasses
import json
import os
import pathlib

import pytest
import tokenizers as hugging_face

from mor_jax.config import Config, ConfigError, DataConfig, with_changes
from mor_jax.data import corpus, dataset, revisions, tokenizer
from mor_jax.runs import summary
from mor_jax.runs.run_folder import RunFolder

# ---- vocabularies with holes ----


def word_level(path: pathlib.Path, words: dict[str, int]) -> pathlib.Path:
  """A tokenizer.json of whole words with these ids."""
  backend = hugging_face.Tokenizer(hugging_face.models.WordLevel(words, unk_token='<unk>'))
  backend.pre_tokenizer = hugging_face.pre_tokenizers.WhitespaceSplit()
  path.parent.mkdir(parents=True, exist_ok=True)
  backend.save(str(path))
  return path


@pytest.fixture
def holed(tmp_path):
  """Settings of a corpus whose tokenizer has 4 entries and ids up to 70000."""
  path = word_level(tmp_path / 'holed' / 'tokenizer.json', {'<unk>': 0, '</s>': 1, 'low': 2, 'high': 70000})
  for number in range(40):
    (tmp_path / f'{number}.txt').write_text(f'low high {"low " * number}')
  return DataConfig(
    source=f'files:{tmp_path}/*.txt',
    tokenizer=str(path),
    separator='</s>',
    seq_len=8,
    cache_dir=str(tmp_path / 'cache'),
    validation_fraction=0.2,
  )


def test_ids_above_the_number_of_entries_are_kept(holed):
  prepared = dataset.prepare(holed)
  assert prepared.manifest.vocab_size == prepared.tokenizer.vocab_size == 70001
  assert prepared.tokenizer.entries == 4
  assert max(row['tokens'].max() for row in prepared.rows('train')) == 70000


def test_rows_that_lost_ids_to_an_earlier_version_are_refused(holed):
  folder = dataset.prepare(holed).folder
  manifest = json.loads((folder / 'manifest.json').read_text())
  (folder / 'manifest.json').write_text(json.dumps(manifest | {'vocab_size': 4}))
  with pytest.raises(ConfigError, match='its vocabulary has holes'):
    dataset.open_dataset(folder)


def test_a_vocabulary_that_cannot_say_unknown_words_is_refused(tmp_path):
  backend = hugging_face.Tokenizer(hugging_face.models.WordLevel({'a': 0, '</s>': 1}, unk_token='<unk>'))
  backend.save(str(tmp_path / 'tokenizer.json'))
  with pytest.raises(ConfigError, match='cannot encode words that it does not know'):
    tokenizer.build(DataConfig(tokenizer=str(tmp_path / 'tokenizer.json'), separator='</s>'))


# ---- which corpus, which tokenizer ----


def fingerprint(path: os.PathLike, **settings) -> str:
  return corpus.open_source(DataConfig(source=f'files:{path}', **settings)).fingerprint()


def test_a_file_rewritten_within_a_second_is_another_corpus(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_text('one text')
  before, times = fingerprint(path), path.stat()
  path.write_text('two text')
  os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
  assert fingerprint(path) != before


def test_a_file_replaced_with_its_times_kept_is_another_corpus(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_text('one text')
  before, times = fingerprint(path), path.stat()
  path.write_text('two text')
  os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
  assert fingerprint(path) != before


def test_equal_names_in_two_folders_are_two_corpora(tmp_path):
  for version, text in (('v1', 'one text'), ('v2', 'two text')):
    (tmp_path / version).mkdir()
    (tmp_path / version / 'a.txt').write_text(text)
    os.utime(tmp_path / version / 'a.txt', ns=(0, 0))
  assert fingerprint(tmp_path / 'v1' / '*.txt') != fingerprint(tmp_path / 'v2' / '*.txt')


@pytest.mark.parametrize('kind', ['hf:{}', 'tfds:{}/train/text'])
def test_a_changed_folder_of_a_library_is_another_corpus(tmp_path, kind):
  def found():
    return corpus.open_source(DataConfig(source=kind.format(tmp_path))).fingerprint()

  (tmp_path / 'train.jsonl').write_text('{"text": "one"}')
  before = found()
  assert found() == before
  (tmp_path / 'train.jsonl').write_text('{"text": "two"}')
  assert found() != before


def test_a_new_revision_on_the_hub_is_another_corpus_and_the_last_one_serves_without_a_network(
  tmp_path, monkeypatch
):
  def found(spec='some/dataset'):
    return corpus.open_source(DataConfig(source=f'hf:{spec}', cache_dir=str(tmp_path))).fingerprint()

  answers = {'some/dataset': 'aaaa'}
  monkeypatch.setattr(revisions, '_ask', answers.get)
  first = found()
  answers['some/dataset'] = 'bbbb'
  second = found()
  answers.clear()
  assert first != second == found()
  assert found('some/dataset@aaaa') == found('some/dataset@aaaa') != second


def test_a_tokenizer_that_draws_its_tokens_is_refused(tmp_path):
  backend = hugging_face.Tokenizer(
    hugging_face.models.BPE({'a': 0, 'b': 1, 'ab': 2, '</s>': 3}, [('a', 'b')])
  )
  backend.model.dropout = 0.5
  backend.save(str(tmp_path / 'tokenizer.json'))
  with pytest.raises(ConfigError, match=r'cannot be used: the tokenizer has dropout 0\.5'):
    tokenizer.build(DataConfig(tokenizer=str(tmp_path / 'tokenizer.json'), separator='</s>'))


def test_the_same_tokenizer_in_another_folder_is_the_same(holed, tmp_path):
  folder = dataset.prepare(holed).folder
  copy = tmp_path / 'copy' / 'tokenizer.json'
  copy.parent.mkdir()
  copy.write_bytes(pathlib.Path(holed.tokenizer).read_bytes())
  elsewhere = dataclasses.replace(holed, tokenizer=str(copy))
  assert dataset.dataset_folder(elsewhere).name.rpartition('-')[2] == folder.name.rpartition('-')[2]
  assert dataset.prepare(dataclasses.replace(elsewhere, source=f'prepared:{folder}')).folder == folder
  other = word_level(copy, {'<unk>': 0, '</s>': 1, 'low': 3, 'high': 2})
  with pytest.raises(ConfigError, match='was prepared with tokenizer='):
    dataset.prepare(dataclasses.replace(elsewhere, source=f'prepared:{folder}', tokenizer=str(other)))


def test_a_run_goes_on_with_its_tokenizer_from_another_folder(holed, tmp_path):
  config = with_changes(Config(), data=dataclasses.asdict(holed), model={'vocab_size': 70001})
  prepared, folder = dataset.prepare(holed), RunFolder(tmp_path / 'run')
  folder.create(config, prepared)
  moved = with_changes(config, data={'tokenizer': str(folder.tokenizer)})
  folder.check(moved)
  folder.create(moved, dataset.prepare(moved.data))
  with pytest.raises(ConfigError, match=r'data\.tokenizer was .*, now bytes'):
    folder.check(with_changes(config, data={'tokenizer': 'bytes'}))


def test_a_corpus_repeated_too_often_is_told(holed):
  prepared = dataset.prepare(holed)
  rows = prepared.manifest.splits['train'].rows
  few, many = (with_changes(Config(), train={'steps': 500, 'global_batch': size}) for size in (1, rows))
  assert summary.warn_of_repetition(many, prepared).startswith('WARNING: the run goes 500 times over the')
  assert (summary.warn_of_repetition(few, prepared) is None) == (4 * rows >= 500)


# ---- texts that a tokenizer takes for something else, or cannot take ----


@pytest.mark.parametrize('kind', ['added', 'unigram', 'word'])
def test_a_text_that_spells_the_separator_does_not_end_its_document(tmp_path, kind):
  if kind == 'added':
    backend = hugging_face.Tokenizer(
      hugging_face.models.BPE({sign: i for i, sign in enumerate('abc<>/s')}, [])
    )
    backend.add_tokens([hugging_face.AddedToken('</s>', special=False)])
  elif kind == 'unigram':
    pieces = [('<unk>', 0.0), ('</s>', -1.0), *((sign, -3.0) for sign in 'abc<>/s')]
    backend = hugging_face.Tokenizer(hugging_face.models.Unigram(pieces, 0))
  else:
    backend = hugging_face.Tokenizer(
      hugging_face.models.WordLevel({'<unk>': 0, '</s>': 1, 'a': 2}, unk_token='<unk>')
    )
    backend.pre_tokenizer = hugging_face.pre_tokenizers.WhitespaceSplit()
  backend.save(str(tmp_path / 'tokenizer.json'))
  made = tokenizer.Tokenizer.load(tmp_path / 'tokenizer.json', '</s>')
  text = 'ab</s>c</s>' if kind != 'word' else 'a </s> a'
  assert made.end_of_text not in made.encode(text)
  assert made.encode_batch([text, 'a']) == [made.encode(text), made.encode('a')]
  if kind == 'added':
    assert made.decode(made.encode(text)).replace(' ', '') == text
  assert made.encode('a') == [made.token_to_id('a')]


@pytest.mark.parametrize('leaves_out', [False, True])
def test_text_that_a_tokenizer_cannot_say_is_counted_and_refused_above_a_share(tmp_path, leaves_out):
  signs = {sign: i for i, sign in enumerate(['</s>', '<unk>', *'abcdefgh '])}
  model = hugging_face.models.BPE(signs, [], **({} if leaves_out else {'unk_token': '<unk>'}))
  hugging_face.Tokenizer(model).save(str(tmp_path / 'tokenizer.json'))
  for number in range(40):
    (tmp_path / f'{number}.txt').write_text('abc def ' * (9 + number) + '\u0416')
  data = DataConfig(
    source=f'files:{tmp_path}/*.txt',
    tokenizer=str(tmp_path / 'tokenizer.json'),
    separator='</s>',
    seq_len=16,
    cache_dir=str(tmp_path / 'cache'),
    validation_fraction=0.2,
  )
  told = []
  prepared = dataset.prepare(data, report=told.append)
  assert prepared.manifest.unsaid == 40
  assert any('has no token for 40 characters or words' in line for line in told)
  for number in range(40):
    (tmp_path / f'{number}.txt').write_text('\u0416\u4e2d' * 30 + ' abcdefgh' * number)
  with pytest.raises(ConfigError, match=r'has no token for 2,400 .*data\.max_unknown_fraction=0\.05; use'):
    dataset.prepare(data)
