"""Batches: a pure function of seed and step, every row once an epoch, resumable anywhere."""

import dataclasses
import itertools
import types

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mor_jax.config import ConfigError, DataConfig
from mor_jax.data import dataset, loader, schedule


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  cache_dir = str(tmp_path_factory.mktemp('cache'))
  return DataConfig(cache_dir=cache_dir, vocab_size=300, seq_len=512, max_documents=12, seed=3)


@pytest.fixture(scope='module')
def prepared(data):
  return dataset.prepare(data)


def take(batches, count):
  return [batch['tokens'] for batch in itertools.islice(batches, count)]


@settings(deadline=None, max_examples=25)  # Grain's shuffle takes 7 ms a row where there are only two rows
@given(
  num_rows=st.integers(1, 200),
  global_batch=st.integers(1, 300),
  seed=st.integers(0, 2**33),
  epochs=st.integers(1, 3),
)
def test_every_epoch_is_a_permutation_across_batches(num_rows, global_batch, seed, epochs):
  steps = -(-num_rows * epochs // global_batch)
  order = np.concatenate(
    [loader.batch_rows(num_rows, step * global_batch, global_batch, seed) for step in range(steps)]
  )
  for epoch in range(epochs):
    assert sorted(order[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))


def test_orders_differ_between_epochs_and_seeds():
  orders = {tuple(loader.batch_rows(100, 100 * epoch, 100, seed)) for seed in range(5) for epoch in range(5)}
  assert len(orders) == 25
  assert tuple(range(100)) not in orders


def test_shuffle_is_global():
  # In a uniform permutation the rows of a batch of 100 among 10,000 have a mean of 5,000 +- 290.
  means = [loader.batch_rows(10_000, 100 * step, 100, seed=0).mean() for step in range(100)]
  assert abs(np.mean(means) - 4999.5) < 1e-6
  assert 200 < np.std(means) < 400


def test_batches_hold_the_rows_of_the_step(prepared, data):
  rows = prepared.rows('train')
  for step, batch in enumerate(
    itertools.islice(loader.train_batches(prepared, data, schedule.constant(4)), 3)
  ):
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == dict.fromkeys(
      ('tokens', 'segment_ids', 'positions'), ((4, 512), np.dtype('int32'))
    )
    for i, row in enumerate(loader.batch_rows(len(rows), 4 * step, 4, data.seed)):
      for name in batch:
        np.testing.assert_array_equal(batch[name][i], rows[int(row)][name])


def test_resuming_at_any_step_continues_the_same_batches(prepared, data):
  whole = take(loader.train_batches(prepared, data, schedule.constant(7)), 12)
  for start in range(12):
    resumed = take(loader.train_batches(prepared, data, schedule.constant(7), start_step=start), 12 - start)
    np.testing.assert_array_equal(whole[start:], resumed)


@pytest.mark.parametrize('prefetch', [0, 1, 5])
def test_prefetch_changes_nothing(prepared, data, prefetch):
  other = take(
    loader.train_batches(prepared, dataclasses.replace(data, prefetch=prefetch), schedule.constant(4)), 6
  )
  np.testing.assert_array_equal(other, take(loader.train_batches(prepared, data, schedule.constant(4)), 6))


def test_batch_larger_than_an_epoch(prepared, data):
  rows = prepared.rows('train')
  size = 2 * len(rows) + 1
  (batch,) = take(loader.train_batches(prepared, data, schedule.constant(size)), 1)
  seen = sorted(map(bytes, batch[: 2 * len(rows)]))
  assert seen == sorted(2 * [bytes(row['tokens']) for row in rows])


def test_nothing_touches_a_device(prepared, data):
  jax.config.update('jax_transfer_guard', 'disallow')  # for every thread, unlike the context manager
  try:
    with pytest.raises(Exception, match='transfer'):
      jax.device_put(np.ones(3)) + np.ones(3)
    take(loader.train_batches(prepared, data, schedule.constant(4)), 3)
    list(loader.validation_batches(prepared, 4))
  finally:
    jax.config.update('jax_transfer_guard', None)


@pytest.mark.parametrize(('batch_size', 'max_rows'), [(1, None), (4, None), (1000, None), (4, 6), (2, 10**6)])
def test_validation_in_order_with_padding_at_the_end(prepared, batch_size, max_rows):
  rows = list(prepared.rows('validation'))[:max_rows]
  batches = list(loader.validation_batches(prepared, batch_size, max_rows))
  assert len(batches) == -(-len(rows) // batch_size)
  assert all(array.shape == (batch_size, 512) for batch in batches for array in batch.values())
  together = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
  for name, array in together.items():
    np.testing.assert_array_equal(array[: len(rows)], [row[name] for row in rows])
  assert not together['segment_ids'][len(rows) :].any()
  assert (together['tokens'][len(rows) :] == prepared.tokenizer.end_of_text).all()


@pytest.mark.parametrize('accumulation', [1, 2])
@pytest.mark.parametrize('num_hosts', [1, 2, 4])
def test_hosts_together_have_the_same_micro_batches(prepared, data, num_hosts, accumulation):
  """Resuming at step 2 on another number of hosts included."""
  whole = np.stack(take(loader.train_batches(prepared, data, schedule.constant(8)), 4)).reshape(
    4, accumulation, -1, 512
  )
  hosts = [
    np.stack(
      take(loader.train_batches(prepared, data, schedule.constant(8, accumulation), 2, host, num_hosts), 2)
    )
    for host in range(num_hosts)
  ]
  parts = [host.reshape(2, accumulation, -1, 512) for host in hosts]
  np.testing.assert_array_equal(np.concatenate(parts, axis=2), whole[2:])


class RecordedRows(list):
  """Rows that note which of them are read."""

  def __init__(self, rows):
    super().__init__(rows)
    self.read = []

  def __getitem__(self, index):
    self.read.append(int(index))
    return super().__getitem__(int(index))


def test_a_host_reads_only_its_rows(prepared, data):
  rows = RecordedRows(prepared.rows('train'))
  recorded = types.SimpleNamespace(rows=lambda split: rows, extras=())
  still = dataclasses.replace(data, prefetch=0)
  take(loader.train_batches(recorded, still, schedule.constant(8), host=1, num_hosts=4), 3)
  assert rows.read == [
    int(i) for step in range(3) for i in loader.batch_rows(len(rows), 8 * step, 8, data.seed)[2:4]
  ]


def test_batches_that_hosts_cannot_share(prepared, data):
  with pytest.raises(ConfigError, match=r'train\.global_batch=8 .*among 3 hosts; .* multiple of 6'):
    loader.train_batches(prepared, data, schedule.constant(8, 2), num_hosts=3)


def test_growing_batches_cut_the_same_sequence_of_rows(prepared, data):
  growing = schedule.BatchSchedule(((0, 2), (3, 4), (5, 8)), micro_rows=2)
  whole = np.concatenate(take(loader.train_batches(prepared, data, schedule.constant(2)), 15))
  grown = take(loader.train_batches(prepared, data, growing), 7)
  assert [len(rows) for rows in grown] == [2, 2, 2, 4, 4, 8, 8]
  np.testing.assert_array_equal(np.concatenate(grown), whole)
  for start in range(7):
    resumed = take(loader.train_batches(prepared, data, growing, start_step=start), 7 - start)
    np.testing.assert_array_equal(np.concatenate(resumed), np.concatenate(grown[start:]))
