"""The command that prepares and inspects, as a user runs it."""

import json
import pathlib
import subprocess
import sys

import pytest

from mor_jax.config import ConfigError, DataConfig
from mor_jax.data import dataset

ROOT = pathlib.Path(__file__).parents[1]


def prepare(*flags):
  command = [sys.executable, '-m', 'mor_jax.prepare', *flags]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  """(folder, output) of a run on 300 documents, one of them bad, one empty, one twice."""
  tmp_path = tmp_path_factory.mktemp('prepare')
  lines = [json.dumps({'text': f'Document {i} says ' + 'word ' * i}) for i in range(300)]
  lines += ['{"text": ', json.dumps({'text': '\n'}), lines[5]]
  (tmp_path / 'a.jsonl').write_text('\n'.join(lines))
  settings = {
    'source': f'files:{tmp_path}/*.jsonl',
    'tokenizer': 'bytes',
    'seq_len': 256,
    'cache_dir': tmp_path / 'cache',
    'packing': 'first_fit',
    'drop_duplicates': 'true',
    'max_bad_fraction': 0.01,
  }
  result = prepare(*(f'--config.data.{name}={value}' for name, value in settings.items()))
  assert result.returncode == 0, result.stderr
  return pathlib.Path(result.stdout.rpartition(dataset.PREPARED)[2].strip()), result.stdout


def test_says_what_was_made_and_left_out(prepared):
  folder, output = prepared
  assert 'left out: 1 not JSON, 1 empty, 1 duplicate' in output
  manifest = dataset.open_dataset(folder).manifest
  assert sum(split.documents for split in manifest.splits.values()) == 300
  assert manifest.dropped == {'not JSON': 1, 'empty': 1, 'duplicate': 1}
  assert manifest.dropped_examples[0].endswith('a.jsonl, line 301: not JSON')
  assert 'Traceback' not in output


def test_inspect_shows_rows(prepared):
  result = prepare(f'--inspect={prepared[0]}', '--rows=2')
  assert result.returncode == 0, result.stderr
  assert result.stdout.count('── row ') == 2
  assert 'Document' in result.stdout
  assert 'tokens per byte' in result.stdout
  assert 'packing first_fit' in result.stdout
  assert '1 duplicate' in result.stdout
  assert '── padding: ' in result.stdout


def test_prepared_folder_is_a_source(prepared):
  source = f'{dataset.PREPARED}{prepared[0]}'
  again = dataset.prepare(DataConfig(source=source, tokenizer='bytes', seq_len=256))
  assert len(again.rows('train')) == again.manifest.splits['train'].rows
  for changes, message in (
    ({'seq_len': 128}, r'prepared with seq_len=256, and data\.seq_len asks for 128'),
    ({'tokenizer': 'bpe'}, r'prepared with tokenizer=bytes, and data\.tokenizer asks for bpe4096'),
  ):
    settings = {'source': source, 'tokenizer': 'bytes', 'seq_len': 256} | changes
    with pytest.raises(ConfigError, match=message):
      dataset.prepare(DataConfig(**settings))


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--config.data.source=files:/nowhere/*.txt'], 'matches no file'),
    (['--inspect=/nowhere'], 'no prepared dataset /nowhere'),
    (['--config.data.source=c4'], "data.source='c4' is not one of"),
  ],
)
def test_mistakes_are_one_sentence(flags, message):
  result = prepare(*flags)
  assert result.returncode == 2
  assert message in result.stderr
  assert result.stderr.count('\n') == 1
