"""Rows on disk: ArrayRecord shards that are a TFDS dataset, written and read without TensorFlow.

A record is a tf.Example with the features `tokens` (T,) and `segment_lengths`, raw integers
of the smallest width that fits. `tfds.builder_from_directory(folder).as_data_source()` opens
the same files.
"""

import operator
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from array_record.python import array_record_module

from mor_jax.data import packing

SHARD_TOKENS = 2**26  # 128 MiB of 16-bit tokens

_DATASET_NAME = 'mor_jax'


class ShardWriter:
  """Writes the rows of a split to ArrayRecord shards, named as TFDS expects when it is closed."""

  def __init__(self, folder: pathlib.Path, split: str, vocab_size: int, seq_len: int):
    """Starts a split in `folder`; vocabulary and row length decide the widths of the integers."""
    import tensorflow_datasets as tfds

    self.split, self.shard_lengths, self.num_bytes = split, [], 0
    tokens = tfds.features.Tensor(shape=(seq_len,), dtype=_smallest_uint(vocab_size - 1), encoding='bytes')
    lengths = tfds.features.Tensor(shape=(None,), dtype=_smallest_uint(seq_len), encoding='bytes')
    self.features = tfds.features.FeaturesDict({'tokens': tokens, 'segment_lengths': lengths})
    self._template = tfds.core.ShardedFileTemplate(
      data_dir=folder, dataset_name=_DATASET_NAME, split=split, filetype_suffix='array_record'
    )
    self._rows_per_shard = max(1, SHARD_TOKENS // seq_len)
    self._open_shard = None

  def write(self, row: packing.Row) -> None:
    """Appends a row."""
    if self._open_shard is None or self.shard_lengths[-1] == self._rows_per_shard:
      self._start_shard()
    values = {'tokens': row.tokens_T, 'segment_lengths': row.segment_lengths}
    record = self.features.serialize_example(
      {name: value.astype(self.features[name].np_dtype) for name, value in values.items()}
    )
    self._open_shard.write(record)
    self.shard_lengths[-1] += 1
    self.num_bytes += len(record)

  def _start_shard(self) -> None:
    self._close_shard()
    path = self._unfinished(len(self.shard_lengths))
    # Grain reads single rows in random order; larger groups would be decompressed for each of them.
    self._open_shard = array_record_module.ArrayRecordWriter(os.fspath(path), 'group_size:1')
    self.shard_lengths.append(0)

  def _close_shard(self) -> None:
    if self._open_shard is not None:
      self._open_shard.close()
      self._open_shard = None

  def _unfinished(self, shard: int) -> pathlib.Path:
    return pathlib.Path(self._template.data_dir) / f'{self.split}-{shard:05d}.unfinished'

  def __enter__(self) -> 'ShardWriter':
    return self

  def __exit__(self, *exception: object) -> None:
    self._close_shard()
    if exception[0] is not None:
      return
    total = len(self.shard_lengths)  # part of every shard's name, and known only now
    for shard in range(total):
      self._unfinished(shard).rename(self._template.sharded_filepath(shard_index=shard, num_shards=total))


def _smallest_uint(largest: int) -> type[np.unsignedinteger]:
  return np.uint16 if largest <= np.iinfo(np.uint16).max else np.uint32


def write_tfds_metadata(folder: pathlib.Path, writers: Sequence[ShardWriter]) -> None:
  """Makes `folder` a TFDS dataset of the splits that the closed `writers` wrote."""
  import tensorflow_datasets as tfds

  splits = [
    tfds.core.SplitInfo(name=w.split, shard_lengths=w.shard_lengths, num_bytes=w.num_bytes) for w in writers
  ]
  tfds.folder_dataset.write_metadata(
    data_dir=folder,
    features=writers[0].features,
    split_infos=splits,
    description='Packed rows for mor_jax; see manifest.json.',
    check_data=False,  # its check reads through TensorFlow
  )


class Rows(Sequence):
  """The rows of a split by index, read from disk on demand; may be read from several threads.

  `rows[i]` is a dict of 'tokens', 'segment_ids' and 'positions', int32 arrays of shape (T,).
  """

  def __init__(self, folder: pathlib.Path, split: str):
    """Opens the split of a finished dataset folder."""
    import tensorflow_datasets as tfds

    self._name = f'{folder} ({split})'
    self._source = tfds.builder_from_directory(folder).as_data_source(split)

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    index = range(len(self))[operator.index(index)]
    try:
      record = self._source[index]
    except RuntimeError as error:  # ArrayRecord found a wrong checksum or the end of the file
      raise RuntimeError(
        f'row {index} of the prepared dataset {self._name} is damaged on disk; delete the folder, and it '
        f'will be prepared again ({error})'
      ) from error
    return packing.unpack(packing.Row(record['tokens'], record['segment_lengths']))
