"""Preparing in parallel: the same shards however many processes, however often it was killed."""

import dataclasses
import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from mor_jax.config import ConfigError, DataConfig
from mor_jax.data import corpus, dataset, pipeline
from mor_jax.data.document import Document

ROOT = pathlib.Path(__file__).parents[1]
PREPARE = """
import json, sys
from mor_jax.config import DataConfig
from mor_jax.data import dataset, pipeline, shards
if __name__ == '__main__':
  pipeline.UNIT_CHARACTERS, shards.SHARD_TOKENS = 20_000, 64 * 600
  dataset.prepare(DataConfig(**json.loads(sys.argv[1])), report=lambda line: print(line, flush=True))
"""


@pytest.fixture(scope='module')
def settings(tmp_path_factory):
  """A corpus of some 30 units in 2 files."""
  folder = tmp_path_factory.mktemp('texts')
  for part in range(2):
    lines = (json.dumps({'text': f'document {part} {i} ' + f'{i * i} words ' * (i % 90)}) for i in range(800))
    (folder / f'{part}.jsonl').write_text('\n'.join(lines))
  return {'source': f'files:{folder}/*.jsonl', 'tokenizer': 'bytes', 'seq_len': 64}


@pytest.fixture(scope='module')
def program(tmp_path_factory):
  path = tmp_path_factory.mktemp('program') / 'prepare.py'  # spawned processes import it again
  path.write_text(PREPARE)
  return path


@pytest.fixture(scope='module')
def alone(settings, program, tmp_path_factory):
  """The dataset made by one process without interruption."""
  return run(program, settings | {'cache_dir': str(tmp_path_factory.mktemp('alone')), 'workers': 1})


def start(program, settings):
  command = [sys.executable, str(program), json.dumps(settings)]
  return subprocess.Popen(
    command,
    cwd=ROOT,
    env={'PYTHONPATH': str(ROOT)},
    stdout=subprocess.PIPE,
    text=True,
    stderr=subprocess.PIPE,
  )


def run(program, settings):
  process = start(program, settings)
  output, errors = process.communicate()
  assert process.returncode == 0, errors
  return dataset.open_dataset(dataset.dataset_folder(DataConfig(**settings))), output


def content(prepared):
  return {path.name: path.read_bytes() for path in prepared.folder.glob('mor_jax-*')}


def test_number_of_processes_changes_nothing(alone, settings, program, tmp_path):
  prepared, _ = run(program, settings | {'cache_dir': str(tmp_path), 'workers': 3})
  assert len(content(prepared)) > 8  # several shards
  assert content(prepared) == content(alone[0])
  assert prepared.manifest == alone[0].manifest


def test_killed_and_continued_gives_identical_shards(alone, settings, program, tmp_path):
  settings = settings | {'cache_dir': str(tmp_path), 'workers': 2}
  folder = dataset.dataset_folder(DataConfig(**settings))
  notes = folder.with_name(f'{folder.name}.partial') / pipeline.NOTES
  process = start(program, settings)
  while not len(list(notes.glob('*.json'))) >= 3:
    assert process.poll() is None, process.communicate()[1]
    time.sleep(0.001)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  if folder.exists():
    pytest.fail('it was finished before it was killed')
  finished = [notes.parent / f'{path.stem}.shard' for path in notes.glob('*.json')]
  kept = {path.stat().st_ino for path in finished}
  assert len(kept) >= 3
  with pytest.raises(ConfigError, match='was interrupted, run it again to continue'):
    dataset.open_dataset(folder)

  process = start(program, settings)
  output, errors = process.communicate()
  assert process.returncode == 0, errors
  assert 'continuing the dataset' in output
  prepared = dataset.open_dataset(folder)
  assert content(prepared) == content(alone[0])
  assert prepared.manifest == alone[0].manifest
  assert kept <= {path.stat().st_ino for path in folder.iterdir()}  # finished shards were not made again
  assert not (folder / pipeline.NOTES).exists()


def test_continuing_encodes_only_what_is_missing(settings, tmp_path, monkeypatch):
  monkeypatch.setattr(pipeline, 'UNIT_CHARACTERS', 20_000)
  monkeypatch.setattr(pipeline.shards, 'SHARD_TOKENS', 64 * 600)
  data = DataConfig(**settings, cache_dir=str(tmp_path), workers=1)
  original, packed = pipeline.pack_unit, []

  def stop_after(limit):
    def pack_unit(recipe, texts):
      if len(packed) == limit:
        raise KeyboardInterrupt
      packed.append(texts)
      return original(recipe, texts)

    return pack_unit

  monkeypatch.setattr(pipeline, 'pack_unit', stop_after(11))
  with pytest.raises(KeyboardInterrupt):
    dataset.prepare(data)
  monkeypatch.setattr(pipeline, 'pack_unit', stop_after(None))
  states = []
  dataset.prepare(data, progress=states.append)
  again = sum(packed.count(texts) - 1 for texts in packed) / 2
  assert 0 < again <= 3  # those of the shards that were open
  assert states[-1].skipped_bytes > 100_000
  assert states[-1].fraction == 1


def test_changed_documents_are_noticed(settings, tmp_path, monkeypatch):
  monkeypatch.setattr(pipeline, 'UNIT_CHARACTERS', 20_000)
  monkeypatch.setattr(pipeline.shards, 'SHARD_TOKENS', 64 * 600)
  data = DataConfig(**settings, cache_dir=str(tmp_path), workers=1)
  with monkeypatch.context() as patch:
    patch.setattr(pipeline.shards, 'publish', lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      dataset.prepare(data)
  original = corpus.Reading.__iter__

  def changed(reading):
    for split, document in original(reading):
      yield split, dataclasses.replace(document, text=document.text.replace('document 0 7 ', 'document 0 8 '))

  monkeypatch.setattr(corpus.Reading, '__iter__', changed)
  with pytest.raises(ConfigError, match=r'documents are not those from which .*train-00000\.shard was made'):
    dataset.prepare(data)


def test_units_keep_the_order_of_every_split(monkeypatch):
  monkeypatch.setattr(pipeline, 'UNIT_CHARACTERS', 10)
  sizes = [('train', 3), ('train', 9), ('validation', 4), ('train', 1), ('train', 12), ('train', 2)]
  documents = [(split, Document(str(i), 'x' * size)) for i, (split, size) in enumerate(sizes)]
  units = [(unit.split, [len(text) for text in unit.texts]) for unit in pipeline.units(documents)]
  assert units == [('train', [3, 9]), ('train', [1, 12]), ('train', [2]), ('validation', [4])]


def test_full_disk_is_a_sentence_and_finished_shards_are_kept(settings, program, tmp_path, alone):
  """A limit on the size of files stands in for the end of the disk."""
  settings = settings | {'cache_dir': str(tmp_path), 'workers': 1}
  path = tmp_path / 'limited.py'
  limit = 'import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n'
  path.write_text(limit + PREPARE)
  process = start(path, settings)
  errors = process.communicate()[1]
  assert process.returncode == 1
  assert 'ConfigError: data.cache_dir=' in errors
  assert 'cannot be written' in errors
  assert 'run the same command again' in errors
  prepared, output = run(program, settings)
  assert 'continuing' in output
  assert content(prepared) == content(alone[0])
