"""The live path: rows of a stream as it is read, resumed exactly, refused where it cannot be."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from mor_jax.config import Config, ConfigError, DataConfig, with_changes
from mor_jax.data import corpus, live, loader, pipeline, schedule

SEQ_LEN = 64


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  """Settings of a stream of 400 documents of different length."""
  path = tmp_path_factory.mktemp('stream') / 'stream.jsonl'
  rng = np.random.default_rng(0)
  texts = [
    f'{i} ' + ' '.join(f'word{n}' for n in rng.integers(0, 50, rng.integers(1, 60))) for i in range(400)
  ]
  path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
  return DataConfig(
    source=f'files:{path}',
    tokenizer='bytes',
    seq_len=SEQ_LEN,
    live=True,
    live_validation_rows=8,
    validation_fraction=0.1,
  )


@pytest.fixture(scope='module', autouse=True)
def small_units():
  """Units of a few rows, so that the stream has many."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(live, 'UNIT_CHARACTERS', 4096)
    yield


@pytest.fixture(scope='module')
def dataset(data):
  return loader.open_dataset(data)


def tokens(batches, count: int) -> list[np.ndarray]:
  return [batch['tokens'] for batch in itertools.islice(batches, count)]


def stream(dataset, batch: int = 4, **where):
  return loader.train_batches(dataset, dataset.data, schedule.constant(batch), **where)


def rows_of_a_pass(data) -> list[bytes]:
  """All training rows of the stream, unit by unit, as preparing would pack them."""
  tokenizer = loader.open_dataset(data).tokenizer
  units = pipeline.units(corpus.Reading(data), live.UNIT_CHARACTERS)
  packed = (pipeline.pack_texts(tokenizer, data, unit.texts).rows for unit in units if unit.split == 'train')
  return [row.tokens_T.tobytes() for rows in packed for row in rows]


def test_a_pass_has_every_row_once_and_the_next_has_them_in_another_order(dataset, data):
  expected = rows_of_a_pass(data)
  assert len(expected) > 40
  taken = [batch[0].tobytes() for batch in tokens(stream(dataset, batch=1), 2 * len(expected))]
  first, second = taken[: len(expected)], taken[len(expected) :]
  assert sorted(first) == sorted(second) == sorted(expected)
  assert first != second
  assert first != expected


def test_batches_have_the_form_of_prepared_ones(dataset):
  batch = next(stream(dataset))
  assert {name: (rows.shape, rows.dtype) for name, rows in batch.items()} == dict.fromkeys(
    ('tokens', 'segment_ids', 'positions'), ((4, SEQ_LEN), np.int32)
  )


def test_validation_rows_are_of_documents_that_training_never_sees(dataset, data):
  assert len(dataset.rows('validation')) == 8
  held_out = [doc.text for split, doc in corpus.Reading(data) if split == 'validation']
  text = ''.join(
    dataset.tokenizer.decode(row['tokens'][row['segment_ids'] > 0]) for row in dataset.validation
  )
  assert text.startswith(held_out[0])
  taken = tokens(stream(dataset, batch=1), len(rows_of_a_pass(data)))
  trained = ''.join(dataset.tokenizer.decode(batch[0]) for batch in taken)
  assert not [text for text in held_out if len(text) > 20 and text in trained]
  counts = dataset.manifest.splits['validation']
  assert counts.rows == 8
  assert counts.bytes / counts.tokens == pytest.approx(1, abs=0.02)  # bytes, and separators


@pytest.mark.parametrize('num_hosts', [1, 2])
def test_resuming_continues_with_the_next_row(dataset, data, num_hosts):
  steps = 3 * len(rows_of_a_pass(data)) // 8  # into the second pass
  for host in range(num_hosts):
    batches = stream(dataset, 4, host=host, num_hosts=num_hosts)
    seen, positions = [], []
    for batch in itertools.islice(batches, steps):
      seen.append(batch['tokens'])
      positions.append(json.loads(json.dumps(batches.position)))  # as a checkpoint keeps it
    assert positions[-1]['epoch'] >= 1
    for done in (1, steps // 3, steps - 3):
      where = {'start_step': done, 'position': positions[done - 1], 'host': host, 'num_hosts': num_hosts}
      resumed = tokens(stream(dataset, 4, **where), steps - done)
      np.testing.assert_array_equal(np.concatenate(resumed), np.concatenate(seen[done:]))


def test_hosts_share_the_stream_without_overlap(dataset, data):
  expected = rows_of_a_pass(data)
  parts = [
    [batch[0].tobytes() for batch in tokens(stream(dataset, 2, host=host, num_hosts=2), len(expected) // 3)]
    for host in range(2)
  ]
  assert not set(parts[0]) & set(parts[1])
  assert set(parts[0]) | set(parts[1]) <= set(expected)


def test_growing_batches(dataset):
  growing = schedule.BatchSchedule(((0, 2), (2, 4)), micro_rows=2)
  grown = tokens(loader.train_batches(dataset, dataset.data, growing), 4)
  assert [len(rows) for rows in grown] == [2, 2, 4, 4]
  np.testing.assert_array_equal(np.concatenate(grown), np.concatenate(tokens(stream(dataset, 2), 6)))


def test_a_stream_that_has_changed_is_noticed(dataset, data, tmp_path):
  batches = stream(dataset, batch=1)
  taken = tokens(batches, 30)
  text = Path(data.source.removeprefix('files:')).read_text().replace('word7', 'WORD7')
  changed = tmp_path / 'stream.jsonl'
  changed.write_text(text)
  other = loader.open_dataset(dataclasses.replace(data, source=f'files:{changed}'))
  resumed = stream(other, batch=1, start_step=len(taken), position=batches.position)
  with pytest.raises(ConfigError, match='is not the stream that the run has read so far'):
    next(resumed)


def test_more_hosts_than_units_are_refused(dataset):
  with pytest.raises(ConfigError, match='too small to be read live by 1000 hosts'):
    next(stream(dataset, 1000, host=999, num_hosts=1000))


def test_a_stream_without_a_row_of_validation_is_refused(data):
  with pytest.raises(ConfigError, match=r'not one full row .* raise data\.validation_fraction'):
    loader.open_dataset(dataclasses.replace(data, seq_len=100_000))


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'tokenizer': 'bpe'}, r"data\.tokenizer='bpe' has nothing to be trained on"),
    ({'source': 'prepared:somewhere'}, 'these rows need no live path'),
    ({'validation_fraction': 0.0}, r'data\.validation_fraction'),
    ({'live_validation_rows': 0}, r'data\.live_validation_rows=0'),
  ],
)
def test_settings_that_cannot_work_are_refused(change, message):
  with pytest.raises(ConfigError, match=message):
    with_changes(Config(), data={'live': True, 'tokenizer': 'bytes', **change})
