"""Packing: no token is lost or made up, and every token knows its document and its place in it."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mor_jax.data import packing

END = 99
DOCUMENTS = st.lists(st.lists(st.integers(0, 9), max_size=30), max_size=12)


def rows_of(documents, seq_len):
  return [packing.unpack(row) for row in packing.concat_and_split(documents, seq_len, END)]


@settings(deadline=None)
@given(documents=DOCUMENTS, seq_len=st.integers(2, 17))
def test_rows_hold_the_stream_of_documents_exactly(documents, seq_len):
  rows = rows_of(documents, seq_len)
  stream = [token for document in documents for token in [*document, END]]
  assert len(rows) == -(-len(stream) // seq_len)
  flat = {name: np.concatenate([row[name] for row in rows] or [np.zeros(0)]) for name in packing.ROW_ARRAYS}
  assert flat['tokens'].tolist() == stream + [END] * (len(rows) * seq_len - len(stream))
  assert all(array.shape == (seq_len,) and array.dtype == np.int32 for row in rows for array in row.values())

  # Segments and positions token by token: a new segment at a row's start and after each separator.
  for index in range(len(flat['tokens'])):
    segment, position = flat['segment_ids'][index], flat['positions'][index]
    if index >= len(stream):
      assert (segment, position) == (0, 0)
    elif index % seq_len == 0:
      assert (segment, position) == (1, 0)
    elif stream[index - 1] == END:
      assert (segment, position) == (flat['segment_ids'][index - 1] + 1, 0)
    else:
      assert (segment, position) == (flat['segment_ids'][index - 1], flat['positions'][index - 1] + 1)


@settings(deadline=None)
@given(documents=DOCUMENTS, seq_len=st.integers(2, 17))
def test_counts_are_those_of_the_loss(documents, seq_len):
  for row in packing.concat_and_split(documents, seq_len, END):
    segments = packing.unpack(row)['segment_ids']
    assert row.num_tokens == np.sum(segments > 0)
    assert row.num_targets == np.sum((segments[1:] == segments[:-1]) & (segments[1:] > 0))


def test_example():
  rows = rows_of([[1, 2], [3, 4, 5, 6]], seq_len=5)
  assert [row['tokens'].tolist() for row in rows] == [[1, 2, END, 3, 4], [5, 6, END, END, END]]
  assert [row['segment_ids'].tolist() for row in rows] == [[1, 1, 1, 2, 2], [1, 1, 1, 0, 0]]
  assert [row['positions'].tolist() for row in rows] == [[0, 1, 2, 0, 1], [0, 1, 2, 0, 0]]


def test_streams_without_reading_ahead():
  def endless():
    while True:
      yield [1, 2, 3]

  rows = packing.concat_and_split(endless(), 8, END)
  first, second = next(rows), next(rows)
  assert first.tokens_T.tolist() == [1, 2, 3, END, 1, 2, 3, END]
  assert first.tokens_T is not second.tokens_T


@settings(deadline=None)
@given(documents=DOCUMENTS, seq_len=st.integers(2, 17))
def test_first_fit_keeps_documents_whole_and_loses_nothing(documents, seq_len):
  documents = [[*document, END] for document in documents]
  segments = []
  for row in packing.first_fit([document[:-1] for document in documents], seq_len, END):
    row = packing.unpack(row)
    for segment in range(1, row['segment_ids'].max() + 1):
      inside = row['segment_ids'] == segment
      segments.append(row['tokens'][inside].tolist())
      assert row['positions'][inside].tolist() == list(range(inside.sum()))
    padding = row['segment_ids'] == 0
    assert (row['tokens'][padding] == END).all()
    assert not row['positions'][padding].any()
  pieces = [doc[i : i + seq_len] for doc in documents for i in range(0, len(doc), seq_len)]
  assert sorted(segments) == sorted(pieces)


def test_first_fit_fills_gaps():
  documents = [[1] * 5, [2] * 7, [3], [4] * 2, [5] * 13]
  rows = [row.segment_lengths.tolist() for row in packing.first_fit(documents, 10, END)]
  # 6 | 8 | 2 joins 6 | 3 opens the third, 10 fills the fourth, its rest of 4 joins 3
  assert rows == [[6, 2], [8], [3, 4], [10]]
