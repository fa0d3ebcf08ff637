"""TFDS and Hugging Face sources, on datasets built here, through the code that opens remote ones."""

import importlib.util
import json
import socket
import sys
import time

import numpy as np
import pytest

from mor_jax.config import ConfigError, DataConfig
from mor_jax.data import corpus, dataset, hubs

TEXTS = [f'Text {i}: ' + 'äöü words ' * i for i in range(60)]


@pytest.fixture(scope='module')
def tfds_builder(tmp_path_factory):
  import tensorflow_datasets as tfds

  class LocalTexts(tfds.core.GeneratorBasedBuilder):
    """A registered dataset that is built without TensorFlow."""

    VERSION = tfds.core.Version('1.0.0')
    pkg_dir_path = tmp_path_factory.mktemp('package')

    def _info(self):
      features = tfds.features.FeaturesDict({'body': tfds.features.Text(), 'n': np.int64})
      return self.dataset_info_from_configs(features=features)

    def _split_generators(self, dl_manager):
      return {'train': self._generate_examples()}

    def _generate_examples(self):
      for i, text in enumerate(TEXTS):
        yield i, {'body': text, 'n': i}

  return LocalTexts


@pytest.fixture(scope='module')
def folder(tfds_builder, tmp_path_factory):
  builder = tfds_builder(data_dir=tmp_path_factory.mktemp('tfds'), file_format='array_record')
  builder.download_and_prepare()
  return builder.data_path


def texts(source, **settings):
  reading = corpus.Reading(DataConfig(source=source, **settings))
  return [document.text for _, document in reading]


def test_prepared_tfds_folder(folder):
  assert sorted(texts(f'tfds:{folder}/train/body')) == sorted(TEXTS)
  assert 'tensorflow' not in sys.modules


def test_tfds_dataset_by_name_is_prepared_when_it_can_be(tfds_builder, tmp_path, monkeypatch):
  import tensorflow_datasets as tfds

  monkeypatch.setattr(tfds.core.constants, 'DATA_DIR', str(tmp_path))
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  asked = []
  monkeypatch.setattr(hubs, 'require_network', lambda *arguments: asked.append(arguments))
  original = tfds.builder
  monkeypatch.setattr(tfds, 'builder', lambda name, **options: original(name, data_dir=tmp_path, **options))
  for _ in range(2):
    assert sorted(texts('tfds:local_texts/train/body')) == sorted(TEXTS)
  assert len(asked) == 1  # the second time it is there


@pytest.mark.parametrize(
  ('spec', 'message'),
  [
    ('{folder}/test/body', "has no split 'test'; its splits are train"),
    ('{folder}/train/text', "has no feature 'text'; its features are body, n"),
    ('no_such_dataset/train/text', 'neither a folder nor a dataset'),
    ('{empty}/train/text', 'cannot be opened'),
  ],
)
def test_tfds_refusals(folder, tmp_path, spec, message):
  with pytest.raises(ConfigError, match=rf'data\.source=tfds:.*{message}'):
    texts('tfds:' + spec.format(folder=folder, empty=tmp_path))


def test_builder_that_needs_tensorflow_is_refused_with_what_it_needs(tfds_builder, tmp_path, monkeypatch):
  import tensorflow_datasets as tfds

  def needs_beam(self, dl_manager):
    raise ModuleNotFoundError("No module named 'apache_beam'", name='apache_beam')

  original = tfds.builder
  monkeypatch.setattr(tfds, 'builder', lambda name, **options: original(name, data_dir=tmp_path, **options))
  monkeypatch.setattr(tfds_builder, '_split_generators', needs_beam)
  monkeypatch.setattr(hubs, 'require_network', lambda *arguments: None)
  with pytest.raises(ConfigError, match=r'local_texts needs apache_beam to be built; prepare it once where'):
    texts('tfds:local_texts/train/body')


def test_builders_of_the_older_kind_are_known_and_those_that_need_beam_are_refused_before_any_download():
  if importlib.util.find_spec('apache_beam'):
    pytest.skip('apache_beam is installed')
  with pytest.raises(ConfigError, match=r'c4 needs apache_beam to be built; prepare it'):
    texts('tfds:c4/train/text')


def test_tfds_source_becomes_rows(folder, tmp_path):
  data = DataConfig(
    source=f'tfds:{folder}/train/body',
    tokenizer='bytes',
    seq_len=32,
    cache_dir=str(tmp_path),
    validation_fraction=0.2,
  )
  prepared = dataset.prepare(data)
  counts = prepared.manifest.splits
  assert sum(split.documents for split in counts.values()) == len(TEXTS)
  assert sum(split.bytes for split in counts.values()) == sum(len(text.encode()) for text in TEXTS)


@pytest.fixture
def hub_folder(tmp_path):
  lines = [json.dumps({'content': text}) for text in TEXTS] + [json.dumps({'content': None})]
  (tmp_path / 'hub').mkdir()
  (tmp_path / 'hub' / 'train.jsonl').write_text('\n'.join(lines))
  return tmp_path / 'hub'


def test_hugging_face_folder_is_streamed(hub_folder):
  pytest.importorskip('datasets')
  reading = corpus.Reading(DataConfig(source=f'hf:{hub_folder}', text_key='content'))
  assert [document.text for _, document in reading] == TEXTS
  assert dict(reading.dropped) == {'empty': 1}, 'null is an empty text'


@pytest.mark.parametrize('several', [False, True])
def test_what_save_to_disk_wrote_is_read(tmp_path, several):
  datasets = pytest.importorskip('datasets')
  saved = datasets.Dataset.from_dict({'body': TEXTS})
  saved = datasets.DatasetDict({'test': saved}) if several else saved
  saved.save_to_disk(tmp_path / 'saved')
  assert texts(f'hf:{tmp_path}/saved' + (':default:test' if several else ''), text_key='body') == TEXTS
  if several:
    with pytest.raises(ConfigError, match="it has no split 'train'; its splits are test"):
      texts(f'hf:{tmp_path}/saved', text_key='body')


def test_hugging_face_refusals(hub_folder):
  pytest.importorskip('datasets')
  with pytest.raises(ConfigError, match=r'data\.source=hf:.*::nosplit cannot be opened'):
    texts(f'hf:{hub_folder}::nosplit')
  with pytest.raises(ConfigError, match=r'HF_HUB_OFFLINE is set; .*files:PATTERN.*embedded'):
    texts('hf:some/dataset')


class Breaking:
  """A stream of which every opening breaks off after some records, as a lost connection does."""

  def __init__(self, texts: list[str], records_each: list[int]):
    self._texts, self._records_each, self._start = texts, iter(records_each), 0

  def skip(self, count: int) -> 'Breaking':
    self._start = count
    return self

  def __iter__(self):
    end = self._start + next(self._records_each)
    yield from ({'text': text} for text in self._texts[self._start : end])
    if end < len(self._texts):
      raise ConnectionError('connection reset')


def test_lost_connection_is_taken_up_where_it_broke(monkeypatch):
  stream, waits = Breaking(TEXTS, [7, 0, 0, 20, 1, 100]), []
  monkeypatch.setattr(hubs.HuggingFaceSource, '_open', lambda _: stream)
  monkeypatch.setattr(hubs.time, 'sleep', waits.append)
  assert texts('hf:some/dataset') == TEXTS
  assert waits == [1, 5, 15, 1, 1], 'it waits longer while nothing comes, and starts anew when something did'


def test_connection_that_stays_away_is_reported_with_what_to_do(monkeypatch):
  stream = Breaking(TEXTS, [7, *[0] * 20])
  monkeypatch.setattr(hubs.HuggingFaceSource, '_open', lambda _: stream)
  monkeypatch.setattr(hubs.time, 'sleep', lambda seconds: None)
  with pytest.raises(
    ConfigError, match=r'after 7 records, 5 attempts \(ConnectionError: .* run the same command'
  ):
    texts('hf:some/dataset')


def test_missing_package_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, 'datasets', None)
  with pytest.raises(
    ConfigError, match=r'hf:some/dataset needs the package datasets; run: pip install datasets'
  ):
    texts('hf:some/dataset')


def test_no_network_is_said_in_time(monkeypatch):
  with socket.socket() as closed:
    closed.bind(('127.0.0.1', 0))
    port = closed.getsockname()[1]
  for name in ('http_proxy', 'HTTP_PROXY'):
    monkeypatch.delenv(name, raising=False)
  with pytest.raises(ConfigError, match=r'flag=1 needs the network, and .* Connection refused.*embedded'):
    hubs.require_network(f'http://127.0.0.1:{port}', 'flag=1')


def test_silent_network_is_given_up(monkeypatch):
  for name in ('http_proxy', 'HTTP_PROXY'):
    monkeypatch.delenv(name, raising=False)
  with socket.socket() as silent:
    silent.bind(('127.0.0.1', 0))
    silent.listen()
    begin = time.perf_counter()
    with pytest.raises(ConfigError, match='cannot be reached'):
      hubs.require_network(f'http://127.0.0.1:{silent.getsockname()[1]}', 'flag=1', patience=0.5)
    assert time.perf_counter() - begin < 5
