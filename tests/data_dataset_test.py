"""Prepared datasets: what was written comes back, and nothing unfinished or damaged is read."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from mor_jax.config import ConfigError, DataConfig
from mor_jax.data import corpus, dataset, packing, shards

ROOT = pathlib.Path(__file__).parents[1]
SETTINGS = {'vocab_size': 400, 'seq_len': 64, 'max_documents': 24}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  return DataConfig(cache_dir=str(tmp_path_factory.mktemp('cache')), **SETTINGS)


@pytest.fixture(scope='module')
def prepared(data):
  return dataset.prepare(data)


def shard_bytes(folder):
  return {path.name: path.read_bytes() for path in folder.glob('*.array_record*')}


def run_python(program, *arguments):
  command = [sys.executable, '-c', program, *arguments]
  return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize('split', corpus.SPLITS)
def test_rows_give_the_documents_back(prepared, data, split):
  tokens = np.concatenate([row['tokens'][row['segment_ids'] > 0] for row in prepared.rows(split)])
  end = prepared.tokenizer.end_of_text
  pieces = np.split(tokens, np.flatnonzero(tokens == end) + 1)
  assert pieces.pop().size == 0  # the last document ends with its separator, too
  texts = [prepared.tokenizer.decode(piece[:-1]) for piece in pieces]
  assert texts == [document.text for document in corpus.documents(data, split)]


@pytest.mark.parametrize('split', corpus.SPLITS)
def test_manifest_counts_what_is_there(prepared, data, split):
  rows, documents = list(prepared.rows(split)), list(corpus.documents(data, split))
  segments = np.stack([row['segment_ids'] for row in rows])
  assert dataclasses.asdict(prepared.manifest.splits[split]) == {
    'documents': len(documents),
    'bytes': sum(len(document.text.encode()) for document in documents),
    'tokens': np.sum(segments > 0),
    'targets': np.sum((segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)),
    'rows': len(rows),
    'cut': sum(len(prepared.tokenizer.encode(document.text)) >= 64 for document in documents),
  }
  assert prepared.manifest.vocab_size == prepared.tokenizer.vocab_size == 400


def test_tfds_opens_the_folder_without_tensorflow(prepared):
  import tensorflow_datasets as tfds

  builder = tfds.builder_from_directory(prepared.folder)
  assert {name: split.num_examples for name, split in builder.info.splits.items()} == {
    name: counts.rows for name, counts in prepared.manifest.splits.items()
  }
  records, rows = builder.as_data_source('validation'), prepared.rows('validation')
  assert records[0]['tokens'].dtype == np.uint16
  for record, row in zip(records, rows, strict=True):
    np.testing.assert_array_equal(record['tokens'], row['tokens'])
    np.testing.assert_array_equal(record['segment_lengths'], np.bincount(row['segment_ids'])[1:][:99])
  assert 'tensorflow' not in sys.modules


def test_rows_are_a_sequence(prepared):
  rows = prepared.rows('train')
  np.testing.assert_array_equal(rows[-1]['tokens'], rows[len(rows) - 1]['tokens'])
  with pytest.raises(IndexError):
    rows[len(rows)]


def test_wide_integers_and_many_shards(tmp_path):
  written = list(packing.concat_and_split([range(65_000, 66_000), range(70)], 100, 70_000))
  row_format = shards.RowFormat(vocab_size=70_001, seq_len=100)
  paths = [tmp_path / f'{i}.shard' for i in range(4)]
  lengths, size = [], 0
  for i, path in enumerate(paths):
    file = shards.ShardFile(path)
    for row in written[3 * i : 3 * i + 3]:
      file.append(row_format.serialize(row))
    file.close()
    lengths, size = [*lengths, file.rows], size + file.num_bytes
  shards.publish(tmp_path, 'train', paths)
  shards.write_tfds_metadata(tmp_path, row_format, {'train': lengths}, {'train': size})
  assert len(shard_bytes(tmp_path)) == 4
  rows = shards.Rows(tmp_path, 'train')
  assert len(rows) == len(written) == 11
  for row, expected in zip(rows, map(packing.unpack, written), strict=True):
    np.testing.assert_array_equal(row['tokens'], expected['tokens'])
    np.testing.assert_array_equal(row['positions'], expected['positions'])


def test_second_call_opens_and_a_second_build_is_identical(prepared, data, tmp_path):
  lines = []
  assert dataset.prepare(data, report=lines.append).folder == prepared.folder
  assert lines == []
  again = dataset.prepare(dataclasses.replace(data, cache_dir=str(tmp_path)), report=lines.append)
  assert any('tokens' in line for line in lines)
  assert again.folder.name == prepared.folder.name
  assert shard_bytes(again.folder) == shard_bytes(prepared.folder)
  assert again.manifest == prepared.manifest


def test_folder_depends_on_what_decides_the_content(data):
  changes = [{'seq_len': 65}, {'vocab_size': 401}, {'tokenizer': 'bytes'}, {'max_documents': None}]
  changes += [{'validation_fraction': 0.06}, {'packing': 'first_fit'}, {'drop_duplicates': True}, {}]
  folders = [dataset.dataset_folder(dataclasses.replace(data, **change)) for change in changes]
  assert len(set(folders)) == len(changes)
  same = dataclasses.replace(data, seed=5, prefetch=0, segment_mask=False)
  assert dataset.dataset_folder(same) == dataset.dataset_folder(data)


def test_default_cache_folder(monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', '/somewhere')
  assert dataset.dataset_folder(DataConfig()).parent == pathlib.Path('/somewhere/mor_jax/datasets')
  monkeypatch.delenv('XDG_CACHE_HOME')
  monkeypatch.setenv('HOME', '/home/someone')
  assert dataset.dataset_folder(DataConfig()).parent == pathlib.Path('/home/someone/.cache/mor_jax/datasets')


@pytest.mark.parametrize('where', [(shards, 'publish'), (shards, 'write_tfds_metadata'), (shutil, 'rmtree')])
def test_interrupted_while_finishing(prepared, data, tmp_path, monkeypatch, where):
  data = dataclasses.replace(data, cache_dir=str(tmp_path))

  def interrupt(*args, **kwargs):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(*where, interrupt)
    with pytest.raises(KeyboardInterrupt):
      dataset.prepare(data)
  folder = dataset.dataset_folder(data)
  with pytest.raises(ConfigError, match='its preparation was interrupted, run it again'):
    dataset.open_dataset(folder)
  lines = []
  assert dataset.prepare(data, lines.append).manifest == prepared.manifest
  assert lines[0].startswith('continuing')
  assert shard_bytes(folder) == shard_bytes(prepared.folder)
  assert sorted(path.name for path in folder.iterdir()) == sorted(p.name for p in prepared.folder.iterdir())


def test_killed_preparation_is_not_read_and_done_again(prepared, data, tmp_path):
  program = """
import os, sys
from mor_jax.config import DataConfig
from mor_jax.data import dataset, shards
kill = lambda *args, **kwargs: os.kill(os.getpid(), 9)
shards.write_tfds_metadata = kill
dataset.prepare(DataConfig(cache_dir=sys.argv[1], vocab_size=400, seq_len=64, max_documents=24))
"""
  process = run_python(program, str(tmp_path))
  process.communicate()
  assert process.returncode == -signal.SIGKILL
  data = dataclasses.replace(data, cache_dir=str(tmp_path))
  folder = dataset.dataset_folder(data)
  assert shard_bytes(folder.with_name(f'{folder.name}.partial'))  # it was killed in the middle
  assert not folder.exists()
  assert shard_bytes(dataset.prepare(data).folder) == shard_bytes(prepared.folder)
  assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name, f'{folder.name}.lock']


def test_processes_that_prepare_at_once_share_one_build(prepared, tmp_path):
  program = """
import sys
from mor_jax.config import DataConfig
from mor_jax.data import dataset
data = DataConfig(cache_dir=sys.argv[1], vocab_size=400, seq_len=64, max_documents=24)
print('imported', flush=True)
sys.stdin.readline()
result = dataset.prepare(data, report=print)
print(len(result.rows('train')), 'rows')
"""
  command = [sys.executable, '-c', program, str(tmp_path)]
  processes = [
    subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for _ in range(3)
  ]
  for process in processes:
    assert process.stdout.readline() == 'imported\n'
  for process in processes:
    process.stdin.write('go\n')
    process.stdin.flush()
  outputs = [process.communicate()[0] for process in processes]
  assert [process.returncode for process in processes] == [0, 0, 0]
  assert ''.join(outputs).count('preparing the dataset') == 1
  assert all(output.endswith(f'{len(prepared.rows("train"))} rows\n') for output in outputs)


def remove_manifest(folder):
  (folder / 'manifest.json').unlink()


def halve_manifest(folder):
  text = (folder / 'manifest.json').read_text()
  (folder / 'manifest.json').write_text(text[: len(text) // 2])


def truncate_shard(folder):
  os.truncate(next(folder.glob('*-train.*')), 1000)


def remove_shard(folder):
  next(folder.glob('*-validation.*')).unlink()


def exchange_tokenizer(folder):
  path = folder / 'tokenizer.json'
  content = json.loads(path.read_text())
  vocabulary = content['model']['vocab']
  vocabulary['a'], vocabulary['b'] = vocabulary['b'], vocabulary['a']
  path.write_text(json.dumps(content, ensure_ascii=False, separators=(',', ':')))
  assert path.stat().st_size == json.loads((folder / 'manifest.json').read_text())['files']['tokenizer.json']


@pytest.mark.parametrize(
  'damage', [remove_manifest, halve_manifest, truncate_shard, remove_shard, exchange_tokenizer]
)
def test_damaged_folder_is_refused_by_name(prepared, tmp_path, damage):
  folder = shutil.copytree(prepared.folder, tmp_path / 'copy')
  dataset.open_dataset(folder)
  damage(folder)
  with pytest.raises(ConfigError, match=rf'{folder} is damaged .*delete that folder'):
    dataset.open_dataset(folder)


def test_flipped_bit_is_an_error_that_names_the_folder(prepared, tmp_path):
  folder = shutil.copytree(prepared.folder, tmp_path / 'copy')
  path = next(folder.glob('*-train.*'))
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)
  with pytest.raises(RuntimeError, match=rf'prepared dataset {folder} \(train\) is damaged on disk; delete'):
    list(dataset.open_dataset(folder).rows('train'))


def test_unwritable_cache_is_refused(data, tmp_path):
  (tmp_path / 'file').write_text('not a folder')
  data = dataclasses.replace(data, cache_dir=str(tmp_path / 'file'))
  with pytest.raises(ConfigError, match=r'data\.cache_dir=.*file cannot be written to \(Not a directory\)'):
    dataset.prepare(data)


@pytest.mark.parametrize(('split', 'documents'), [('train', 1), ('validation', 1)])
def test_too_little_text_is_refused(data, tmp_path, split, documents):
  sizes = {name: len(next(corpus.documents(DataConfig(), name)).text.encode()) for name in corpus.SPLITS}
  seq_len = 1_000_000 if split == 'train' else sizes['validation'] + 2
  limit = 2 if split == 'train' else 10
  settings = {'tokenizer': 'bytes', 'seq_len': seq_len, 'max_documents': limit, 'cache_dir': str(tmp_path)}
  with pytest.raises(
    ConfigError, match=rf'data\.seq_len={seq_len} is more than the \d+ tokens of the {split} split'
  ):
    dataset.prepare(dataclasses.replace(data, **settings))
  assert [path for path in (tmp_path / 'datasets').iterdir() if path.is_dir()] == []
