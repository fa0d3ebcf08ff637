"""Rows on disk: the ArrayRecord shards of a TFDS dataset, written and read without TensorFlow.

A record is a tf.Example with the features `tokens` (T,), `segment_lengths` and, where not all tokens are scored,
`loss_mask` (T,), raw integers of the smallest sufficient width. `tfds.builder_from_directory(folder).as_data_source()` opens the
same files.
"""

import operator
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from array_record.python import array_record_module

from mor_jax.data import foreign, packing

SHARD_TOKENS = 2**26  # 128 MiB of 16-bit tokens

_DATASET_NAME = 'mor_jax'


class RowFormat:
  """Serialises rows to records. Vocabulary size and row length determine the integer widths."""

  def __init__(self, vocab_size: int, seq_len: int, has_mask: bool = False):
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import example_serializer

    tokens = tfds.features.Tensor(shape=(seq_len,), dtype=_smallest_uint(vocab_size - 1), encoding='bytes')
    lengths = tfds.features.Tensor(shape=(None,), dtype=_smallest_uint(seq_len), encoding='bytes')
    features = {'tokens': tokens, 'segment_lengths': lengths}
    if has_mask:
      features['loss_mask'] = tfds.features.Tensor(shape=(seq_len,), dtype=np.uint8, encoding='bytes')
    self.features = tfds.features.FeaturesDict(features)
    self._serializer = example_serializer.ExampleSerializer(self.features.get_serialized_info())

  def serialize(self, row: packing.Row) -> bytes:
    """Serialises a row; the bytes are the same in every process."""
    values = {'tokens': row.tokens_T, 'segment_lengths': row.segment_lengths}
    if row.loss_mask_T is not None:
      values['loss_mask'] = row.loss_mask_T > 0
    encoded = self.features.encode_example(
      {name: value.astype(self.features[name].np_dtype) for name, value in values.items()}
    )
    # A tf.Example is a map, whose order differs between processes unless it is asked for.
    return self._serializer.get_tf_example(encoded).SerializeToString(deterministic=True)


def _smallest_uint(largest: int) -> type[np.unsignedinteger]:
  return np.uint16 if largest <= np.iinfo(np.uint16).max else np.uint32


class ShardFile:
  """An ArrayRecord file that is being written."""

  def __init__(self, path: pathlib.Path):
    self.path, self.rows, self.num_bytes = path, 0, 0
    # Grain reads single rows in random order; larger groups would be decompressed for each of them.
    self._writer = array_record_module.ArrayRecordWriter(os.fspath(path), 'group_size:1')

  def append(self, record: bytes) -> None:
    """Appends a record. Raises OSError if the file cannot be written, e.g. because the disk is full."""
    try:
      self._writer.write(record)
    except RuntimeError as error:
      raise OSError(f'{self.path} cannot be written ({error})') from error
    self.rows += 1
    self.num_bytes += len(record)

  def close(self) -> None:
    """Closes the file. Raises OSError unless it contains every record."""
    try:
      self._writer.close()
      reader = array_record_module.ArrayRecordReader(os.fspath(self.path))
      found = reader.num_records()
      reader.close()
    except RuntimeError as error:
      raise OSError(f'{self.path} cannot be written ({error})') from error
    if found != self.rows:
      raise OSError(f'{self.path} cannot be written: it holds {found} of {self.rows} rows')


def publish(folder: pathlib.Path, split: str, shards: Sequence[pathlib.Path]) -> None:
  """Renames the finished shards of a split, in order, as TFDS expects. Skips those already renamed."""
  for index, path in enumerate(shards):
    if path.exists():
      path.rename(folder / f'{_DATASET_NAME}-{split}.array_record-{index:05d}-of-{len(shards):05d}')


def write_tfds_metadata(
  folder: pathlib.Path, row_format: RowFormat, lengths: dict[str, list[int]], num_bytes: dict[str, int]
) -> None:
  """Writes the metadata that makes a folder of published shards a TFDS dataset.

  Args:
    folder: folder of the shards.
    row_format: format of the records.
    lengths: rows of each shard, by split.
    num_bytes: total size of the records, by split.
  """
  import tensorflow_datasets as tfds

  splits = [
    tfds.core.SplitInfo(name=split, shard_lengths=lengths[split], num_bytes=num_bytes[split])
    for split in lengths
    if lengths[split]  # a split without rows has no file, and none is known of it
  ]
  tfds.folder_dataset.write_metadata(
    data_dir=folder,
    features=row_format.features,
    split_infos=splits,
    description='Packed rows for mor_jax; see manifest.json.',
    check_data=False,  # its check reads through TensorFlow
  )


class Rows(Sequence):
  """The rows of a split by index, read from disk on demand. Thread-safe.

  `rows[i]` is a dict of 'tokens', 'segment_ids' and 'positions', int32 arrays of shape (T,).
  """

  def __init__(self, folder: pathlib.Path, split: str):
    """Opens the split of a finished dataset folder."""
    import tensorflow_datasets as tfds

    self._name = f'{folder} ({split})'
    foreign.check_features(folder)
    self._source = tfds.builder_from_directory(folder).as_data_source(split)

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:  # type: ignore[override]  # slices are not needed
    index = range(len(self))[operator.index(index)]
    try:
      record = self._source[index]
    except RuntimeError as error:  # ArrayRecord found a wrong checksum or the end of the file
      raise RuntimeError(
        f'row {index} of the prepared dataset {self._name} is damaged on disk; delete the folder, and it '
        f'will be prepared again ({error})'
      ) from error
    return packing.unpack(packing.Row(record['tokens'], record['segment_lengths'], record.get('loss_mask')))
