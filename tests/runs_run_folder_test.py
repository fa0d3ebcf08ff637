import dataclasses
import json
from pathlib import Path

import pytest
from etils import epath

from mor_jax.config import Config, ConfigError, with_changes
from mor_jax.data import dataset as dataset_lib
from mor_jax.data import manifest as manifest_lib
from mor_jax.errors import RunError
from mor_jax.runs.run_folder import RunFolder, code_version

CONFIG = with_changes(Config(), model={'vocab_size': 257})


class Tokenizer:
  """Stands for a tokenizer, of which the folder only wants a file."""

  def save(self, path):
    path.write_text('{}')


def _dataset(folder, rows=100, digest='digest'):
  splits = {name: manifest_lib.SplitCounts(1, 10, 10, 9, rows, 0) for name in ('train', 'validation')}
  manifest = manifest_lib.Manifest(
    format_version=2,
    source='embedded',
    documents_digest='documents',
    seq_len=64,
    packing='concat',
    tokenizer='bytes',
    separator='<|endoftext|>',
    vocab_size=257,
    tokenizer_digest=digest,
    dropped={},
    dropped_examples=[],
    splits=splits,
    files={'shard': 1},
  )
  return dataset_lib.PreparedDataset(folder, Tokenizer(), manifest)


@pytest.fixture
def folder(tmp_path):
  made = RunFolder(tmp_path / 'runs' / 'name')
  made.check(CONFIG)
  made.create(CONFIG, _dataset(tmp_path))
  return made


def test_checking_makes_nothing(tmp_path):
  RunFolder(tmp_path / 'a' / 'b').check(CONFIG)
  assert list(tmp_path.iterdir()) == []


def test_the_same_run_may_go_on(folder):
  folder.check(CONFIG)
  folder.check(with_changes(CONFIG, model={'vocab_size': None}))  # left to the tokenizer, as in config files
  changed = with_changes(
    CONFIG,
    train={'log_every': 3, 'sample_tokens': 0},
    checkpoint={'keep': 9},
    data={'prefetch': 0, 'cache_dir': '/x'},
  )
  folder.check(changed)
  folder.create(changed, _dataset(folder.path))
  assert json.loads((folder.path / 'config.json').read_text())['train']['log_every'] == 10
  folder.go_on(changed)
  assert json.loads((folder.path / 'config.json').read_text())['train']['log_every'] == 3


@pytest.mark.parametrize(
  ('changes', 'named'),
  [
    ({'model': {'num_layers': 4}}, 'model.num_layers was 32, now 4'),
    ({'model': {'vocab_size': 300}}, 'model.vocab_size was 257, now 300'),
    ({'data': {'seed': 1}}, 'data.seed was 0, now 1'),
    ({'train': {'steps': 20000}}, 'train.steps was 10000, now 20000'),
    ({'train': {'seed': 7}}, 'train.seed was 0, now 7'),
  ],
)
def test_another_run_is_refused_and_left_alone(folder, changes, named):
  before = {path: path.read_bytes() for path in folder.path.rglob('*')}
  with pytest.raises(ConfigError, match=named):
    folder.check(with_changes(CONFIG, **changes))
  assert {path: path.read_bytes() for path in folder.path.rglob('*')} == before


def test_all_differing_settings_are_listed(folder):
  other = with_changes(CONFIG, model={'num_layers': 4, 'd_model': 480}, train={'log_every': 1})
  with pytest.raises(ConfigError) as error:
    folder.check(other)
  assert 'model.num_layers' in str(error.value)
  assert 'model.d_model' in str(error.value)
  assert 'log_every' not in str(error.value)


def test_another_vocabulary_is_refused(folder, tmp_path):
  with pytest.raises(
    ConfigError, match=r'run with another vocabulary: its tokenizer had 257 .*data\.tokenizer'
  ):
    folder.create(CONFIG, _dataset(tmp_path, digest='another'))


def test_other_data_is_refused(folder):
  with pytest.raises(ConfigError, match='holds a run on other data'):
    folder.create(CONFIG, _dataset(folder.path, rows=101))
  rebuilt = _dataset(folder.path)
  folder.create(
    CONFIG, dataclasses.replace(rebuilt, manifest=dataclasses.replace(rebuilt.manifest, files={}))
  )


def test_unusable_folders_are_refused(tmp_path, folder):
  (tmp_path / 'file').write_text('')
  for path in (tmp_path / 'file', tmp_path / 'file' / 'below', tmp_path / ('x' * 300)):
    with pytest.raises(ConfigError, match='cannot be written'):
      RunFolder(path).check(CONFIG)
  with pytest.raises(ConfigError, match='cannot be written'):
    RunFolder(type(tmp_path)('/proc/runs')).check(CONFIG)
  (folder.path / 'config.json').write_text('{"model": {"no_such_setting": 1}}')
  with pytest.raises(ConfigError, match=r'config\.json cannot be read'):
    folder.check(CONFIG)
  (folder.path / 'config.json').unlink()
  (folder.path / 'checkpoints').mkdir()
  with pytest.raises(ConfigError, match=r'no config\.json'):
    folder.check(CONFIG)


@pytest.mark.parametrize(
  ('checkpoints', 'error', 'message'),
  [
    (
      'hdfs://bucket/run',
      ConfigError,
      r'checkpoint\.folder=hdfs://bucket/run: no file system .* mount this one',
    ),
    ('s3://bucket/run', ConfigError, r'install gcsfs.*; pip install s3fs'),
    ('gs://bucket/run', ConfigError, r"install gcsfs.*; pip install 'mor_jax\[cloud\]'"),
    ('gs://bucket/run', RunError, r'cannot be reached \(OSError: no answer\); check the bucket'),
  ],
)
def test_remote_folders_that_cannot_be_used_are_refused(tmp_path, monkeypatch, checkpoints, error, message):
  def fails(path):
    raise ImportError('Please install gcsfs') if error is ConfigError else OSError('no answer')

  monkeypatch.setattr(type(epath.Path('gs://bucket')), 'exists', fails)
  with pytest.raises(error, match=message):
    RunFolder(tmp_path / 'run').check(with_changes(CONFIG, checkpoint={'folder': checkpoints}))


def test_summary_marks_the_run_as_finished(folder):
  assert folder.read_summary() is None
  folder.write_summary({'validation/nll': 1.5})
  assert folder.read_summary() == {'validation/nll': 1.5}


def test_a_change_can_be_allowed_by_name(folder):
  other = with_changes(CONFIG, train={'learning_rate': 0.5, 'beta1': 0.5})
  with pytest.raises(ConfigError, match=r'--allow_change=train\.learning_rate,train\.beta1$'):
    folder.check(other)
  with pytest.raises(ConfigError, match=r'beta1 was 0\.9, now 0\.5.*--allow_change=train\.beta1$'):
    folder.check(other, ['train.learning_rate'])
  folder.check(other, ['train.learning_rate', 'train.beta1'])
  with pytest.raises(ConfigError, match='--allow_change=learning_rate is not a setting'):
    folder.check(other, ['learning_rate'])


@pytest.mark.skipif(not (Path(__file__).parents[1] / '.git').exists(), reason='not a git checkout')
def test_code_version_is_that_of_the_checkout():
  assert len(code_version().rstrip('+')) == 40
