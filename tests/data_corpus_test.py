"""The embedded corpus: what it contains, how it is split, and that it never changes."""

import hashlib
import pathlib
import subprocess
import sys
import sysconfig

import pytest

from mor_jax.config import ConfigError, DataConfig
from mor_jax.data import corpus, embedded

PROSE = 'Words that a reader can read, one after the other, on several lines.\n' * 5


@pytest.fixture(scope='module')
def splits():
  return {split: list(corpus.documents(DataConfig(), split)) for split in corpus.SPLITS}


def digest(documents):
  return hashlib.sha256('\0'.join(f'{d.name}\0{d.text}' for d in documents).encode()).hexdigest()


def test_holds_topics_docstrings_and_sources_of_reasonable_size(splits):
  documents = {document.name: document.text for split in splits.values() for document in split}
  assert len(documents) == sum(map(len, splits.values()))  # no name twice
  assert 8e6 < sum(len(text.encode()) for text in documents.values()) < 20e6
  assert 'with_stmt' in documents['topics/with']
  assert documents['docstrings/json/decoder.py'].startswith(
    'Module json.decoder\n\nImplementation of JSONDecoder'
  )
  assert 'class JSONDecoder(object):' in documents['source/json/decoder.py']
  assert min(map(len, documents.values())) >= 200


def test_leaves_out_tests_tables_and_other_peoples_packages(splits):
  names = ' '.join(document.name for split in splits.values() for document in split)
  for unwanted in (
    '/test/',
    '/tests/',
    'site-packages',
    'encodings/',
    'pydoc_data',
    'idlelib',
    '_sysconfigdata',
  ):
    assert unwanted not in names
  assert 'source/html/entities.py' not in names  # a table of 2,000 codes
  assert 'source/unittest/case.py' in names


def test_splits_share_no_file_and_have_the_asked_sizes(splits):
  # 'docstrings/json/decoder.py' and 'source/json/decoder.py' are both of json/decoder.py.
  files = {
    split: {document.name.removeprefix('docstrings/').removeprefix('source/') for document in documents}
    for split, documents in splits.items()
  }
  assert not files['train'] & files['validation']
  share = len(files['validation']) / len(files['train'] | files['validation'])
  assert 0.02 < share < 0.09


@pytest.mark.slow
def test_raising_validation_fraction_only_moves_documents_over(splits):
  more = {d.name for d in corpus.documents(DataConfig(validation_fraction=0.2), 'validation')}
  assert {d.name for d in splits['validation']} < more


def test_is_the_same_in_another_process():
  data = DataConfig(max_documents=30)
  program = (
    'import data_corpus_test as t; '
    'print(t.digest(t.corpus.documents(t.DataConfig(max_documents=30), "train")))'
  )
  tests = pathlib.Path(__file__).parent
  environment = {'PYTHONHASHSEED': '7', 'PYTHONPATH': f'{tests}:{tests.parent}'}
  result = subprocess.run([sys.executable, '-c', program], env=environment, capture_output=True, text=True)
  assert result.stdout.strip() == digest(corpus.documents(data, 'train')), result.stderr


@pytest.mark.parametrize(('limit', 'train', 'validation'), [(2, 1, 1), (10, 9, 1), (100, 95, 5)])
def test_max_documents_counts_both_splits_and_takes_the_first(splits, limit, train, validation):
  limited = {split: list(corpus.documents(DataConfig(max_documents=limit), split)) for split in corpus.SPLITS}
  assert limited == {'train': splits['train'][:train], 'validation': splits['validation'][:validation]}


def test_reads_only_what_is_readable_text(tmp_path, monkeypatch):
  files = {
    'good.py': f'"""{PROSE}"""\n'.encode(),
    'package/__init__.py': f'"""{PROSE}"""\n'.encode(),
    'latin.py': ('# caf\xe9 ' + PROSE.replace('\n', ' ')).encode('latin-1'),
    'table.py': b'TABLE = (\n' + b'0x1f, 0x20, 123, 4567,\n' * 50 + b')\n',
    'short.py': b'from good import *\n',
    'broken.py': f'def (:  # {PROSE}'.encode(),
    'test/test_good.py': f'"""{PROSE}"""\n'.encode(),
    'site-packages/other.py': f'"""{PROSE}"""\n'.encode(),
  }
  for name, content in files.items():
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
  monkeypatch.setattr(sysconfig, 'get_path', lambda name: str(tmp_path))
  documents = [d for split in corpus.SPLITS for d in corpus.documents(DataConfig(), split)]
  assert {d.name for d in documents if not d.name.startswith('topics/')} == {
    'docstrings/good.py',
    'source/good.py',
    'docstrings/package/__init__.py',
    'source/package/__init__.py',
    'source/broken.py',
  }


def test_docstrings_read_as_prose():
  source = '''
"""What the module does."""
import os

class Shape(Base, metaclass=Meta):
  """A shape.

  With an area.
  """
  def area(self, unit: str = 'm') -> float:
    """The area in `unit`."""
    def helper():
      """Hidden."""

  def undocumented(self): ...

async def load(*paths, strict=True):
  """Loads shapes."""
'''
  assert embedded.docstrings(source, 'shapes') == (
    'Module shapes\n\nWhat the module does.\n\n'
    'class Shape(Base)\n\nA shape.\n\nWith an area.\n\n'
    "Shape.area(self, unit: str='m')\n\nThe area in `unit`.\n\n"
    'load(*paths, strict=True)\n\nLoads shapes.\n'
  )


def test_stripped_python_is_refused(tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(sysconfig, 'get_path', lambda name: str(tmp_path))
    with pytest.raises(ConfigError, match=r"data\.source='embedded' needs the sources .* complete Python"):
      next(corpus.documents(DataConfig(), 'train'))
  monkeypatch.setitem(sys.modules, 'pydoc_data', None)
  with pytest.raises(ConfigError, match=r"data\.source='embedded' needs .* topics"):
    next(corpus.documents(DataConfig(), 'train'))
