"""Batches of rows by step, prefetched on threads with Grain.

The batch of a step is a pure function of (data.seed, step). There is no iterator state: a
resumed run simply starts at a later step.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from grain.experimental import index_shuffle

from mor_jax.config import ConfigError, DataConfig
from mor_jax.data import dataset as dataset_lib
from mor_jax.data import live, packing, synthetic
from mor_jax.data.dataset import PreparedDataset
from mor_jax.data.schedule import BatchSchedule

_ENDLESS = 2**62
_ROWS_NAMED = 64  # of a batch, in a message
Dataset = PreparedDataset | live.LiveDataset | synthetic.SyntheticDataset

Batch = dict[str, np.ndarray]
"""'tokens', 'segment_ids' and 'positions', each int32 (B, T); of some data also 'loss_mask', of which tokens are
scored, and for evaluation 'difficulty'."""
_ONLY_EVALUATED = ('difficulty',)


def open_dataset(data: DataConfig, report: Callable[[str], None] = lambda line: None) -> Dataset:
  """Opens the dataset for these settings and prepares it if necessary; with `data.live`, opens the stream.

  Raises:
    ConfigError: see `dataset.prepare` and `live.open_dataset`.
  """
  if data.source.startswith(synthetic.PREFIX):
    return synthetic.open_dataset(data)
  return live.open_dataset(data, report) if data.live else dataset_lib.prepare(data, report)


def train_arrays(dataset: Dataset) -> tuple[str, ...]:
  """Names of the arrays that training batches have."""
  return tuple(name for name in (*packing.ROW_ARRAYS, *dataset.extras) if name not in _ONLY_EVALUATED)


def batch_rows(num_rows: int, first: int, count: int, seed: int) -> np.ndarray:
  """Indices (count,) of the rows in the global batch that follows the first `first` rows.

  The epochs, each shuffled differently, form one endless sequence of rows, and batches are
  consecutive pieces of it. Every row occurs once per epoch, and a batch may span two epochs.
  Each host reads its `host_rows` of the result.
  """
  epochs, places = np.divmod(np.arange(first, first + count), num_rows)
  seeds = {
    epoch: int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0]) for epoch in np.unique(epochs)
  }
  shuffled = [
    index_shuffle(int(place), max_index=num_rows - 1, seed=seeds[epoch], rounds=4)
    for epoch, place in zip(epochs, places, strict=True)
  ]
  return np.array(shuffled)


def describe_batch(dataset: Dataset, schedule: BatchSchedule, seed: int, step: int) -> str:
  """Which rows of the dataset the batch of a step has; steps count from 1."""
  first, count = schedule.rows_before(step - 1), schedule.rows(step - 1)
  if isinstance(dataset, live.LiveDataset):
    return f'rows {first} to {first + count - 1} of the stream'
  rows = batch_rows(dataset.manifest.splits['train'].rows, first, count, seed)
  named = ', '.join(map(str, rows[:_ROWS_NAMED])) + (', ...' if count > _ROWS_NAMED else '')
  return f'{count} rows of the training split: {named}'


def host_rows(rows: np.ndarray, accumulation: int, host: int, num_hosts: int) -> np.ndarray:
  """The part (B / num_hosts,) of a global batch `rows` (B,) that a host reads: its slice of every micro-batch.

  This way each micro-batch has the same rows for any number of hosts.

  Raises:
    ConfigError: a micro-batch cannot be split equally among the hosts.
  """
  if len(rows) % (accumulation * num_hosts):
    raise ConfigError(
      f'train.global_batch={len(rows)} in train.accumulation={accumulation} micro-batches does not divide '
      f'among {num_hosts} hosts; set train.global_batch to a multiple of {accumulation * num_hosts}'
    )
  return rows.reshape(accumulation, num_hosts, -1)[:, host].ravel()


def train_batches(
  dataset: Dataset,
  data: DataConfig,
  schedule: BatchSchedule,
  start_step: int = 0,
  host: int = 0,
  num_hosts: int = 1,
  position: dict[str, Any] | None = None,
) -> Iterator[Batch]:
  """Returns the endless training batches, beginning at `start_step`: int32 arrays of shape (B, T).

  B is the schedule's rows / `num_hosts`: a host reads only the rows of its own devices. The global batch
  depends neither on the number of hosts nor on `start_step`, so a run may resume on more or fewer hosts.

  Args:
    position: for a live dataset, the position of this host after `start_step` steps; otherwise unused.

  Raises:
    ConfigError: the batch does not divide evenly among the hosts.
  """
  for first, size in schedule.stages:  # now, not at the first batch
    host_rows(np.arange(size), schedule.micro_batches(first), host, num_hosts)

  if isinstance(dataset, live.LiveDataset):
    return live.LiveBatches(dataset, schedule, start_step, position, host, num_hosts)
  rows, arrays = dataset.rows('train'), train_arrays(dataset)

  def load(step: int) -> Batch:
    order = batch_rows(len(rows), schedule.rows_before(step), schedule.rows(step), data.seed)
    return _stack([rows[i] for i in host_rows(order, schedule.micro_batches(step), host, num_hosts)], arrays)

  steps = grain.MapDataset.range(start_step, _ENDLESS).map(load)
  options = grain.ReadOptions(num_threads=data.prefetch, prefetch_buffer_size=data.prefetch)
  return iter(steps.to_iter_dataset(options))


def validation_batches(
  dataset: Dataset, batch_size: int, max_rows: int | None = None, host: int = 0, num_hosts: int = 1
) -> Iterator[Batch]:
  """Yields at most `max_rows` validation rows in order: int32 arrays of shape (batch_size / num_hosts, T).

  The last batch is filled with padding rows, whose segment ids are all 0. Each host reads its part of
  every batch; `batch_size` must be a multiple of the number of hosts.
  """
  rows = dataset.rows('validation')
  count = len(rows) if max_rows is None else min(max_rows, len(rows))
  padding = packing.padding_row(rows[0], dataset.tokenizer.end_of_text) if count else {}
  for first in range(0, count, batch_size):
    own = host_rows(np.arange(first, first + batch_size), 1, host, num_hosts)
    yield _stack([rows[i] if i < count else padding for i in own], tuple(padding))


def _stack(rows: Sequence[dict[str, np.ndarray]], arrays: Sequence[str]) -> Batch:
  return {name: np.stack([row[name] for row in rows]) for name in arrays}
