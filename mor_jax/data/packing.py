"""Packing: token ids of documents to rows of equal length. Pure functions over numpy.

A row consists of its tokens and the lengths of its consecutive segments; the remainder of the
row is padding. Segment ids and positions are derived from the lengths.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

ROW_ARRAYS = ('tokens', 'segment_ids', 'positions')  # what every row has


@dataclasses.dataclass(frozen=True)
class Row:
  """A packed row: `tokens_T` of any integer type, `segment_lengths` with a sum of at most T.

  `loss_mask_T`, where not all tokens are scored, is above 0 for those that are when they are predicted.
  """

  tokens_T: np.ndarray
  segment_lengths: np.ndarray
  loss_mask_T: np.ndarray | None = None

  @property
  def num_tokens(self) -> int:
    """Tokens in the row without padding, end-of-text tokens included."""
    return int(self.segment_lengths.sum(dtype=np.int64))

  @property
  def num_targets(self) -> int:
    """Tokens to predict: all but the first of each segment, or those of them that are scored."""
    if self.loss_mask_T is None:
      return self.num_tokens - len(self.segment_lengths)
    scored_T = self.loss_mask_T[: self.num_tokens] > 0
    scored_T[np.cumsum(self.segment_lengths[:-1]).astype(int)] = False
    return int(scored_T[1:].sum())


class Scored(NamedTuple):
  """A document that is complete as it is: its token ids, and a mask, 1 for those that are scored."""

  ids: Sequence[int] | np.ndarray
  mask: Sequence[int] | np.ndarray


def concat_and_split(
  documents: Iterable[Sequence[int] | Scored], seq_len: int, end_of_text: int
) -> Iterator[Row]:
  """Concatenates documents, each followed by an end-of-text token unless it is `Scored`, and cuts the result into rows.

  No token is lost: a document that doesn't fit continues in the next row as a new segment,
  and the last row is filled with padding (`end_of_text`, in no segment).

  Args:
    documents: token ids of each document, or all `Scored`; may be a stream, since only one row is held in memory.
    seq_len: tokens T in a row.
    end_of_text: id of the separator.

  Yields:
    rows with int32 tokens of shape (T,).
  """
  pieces: list[np.ndarray] = []
  room = seq_len
  for document in documents:
    remaining_NK = _columns(document, end_of_text)
    while len(remaining_NK):
      piece_NK, remaining_NK = remaining_NK[:room], remaining_NK[room:]
      pieces.append(piece_NK)
      room -= len(piece_NK)
      if not room:
        yield _row(pieces, seq_len, end_of_text)
        pieces, room = [], seq_len
  if pieces:
    yield _row(pieces, seq_len, end_of_text)


def first_fit(documents: Iterable[Sequence[int] | Scored], seq_len: int, end_of_text: int) -> Iterator[Row]:
  """Puts every document, followed by an end-of-text token unless it is `Scored`, into the first row with room for it.

  Only documents longer than a row are cut: into full rows and a remainder, which is placed like
  a document. No token is lost; the unused end of a row is padding.

  Args:
    documents: token ids of each document, or all `Scored`; all are held in memory.
    seq_len: tokens T in a row.
    end_of_text: id of the separator.

  Yields:
    rows with int32 tokens of shape (T,), in the order of their first documents.
  """
  pieces: list[np.ndarray] = []
  for document in documents:
    tokens_NK = _columns(document, end_of_text)
    pieces += np.split(tokens_NK, range(seq_len, len(tokens_NK), seq_len))
  room = np.full(len(pieces), seq_len)
  rows: list[list[np.ndarray]] = [[] for _ in pieces]  # at worst a row for each piece
  begun = 0
  for piece in pieces:
    row = int(np.argmax(room[: begun + 1] >= len(piece)))
    begun = max(begun, row + 1)
    room[row] -= len(piece)
    rows[row].append(piece)
  for members in rows[:begun]:
    yield _row(members, seq_len, end_of_text)


def _columns(document: Sequence[int] | Scored, end_of_text: int) -> np.ndarray:
  """What is packed of a document: ids (N, 1), or ids and mask (N, 2)."""
  if isinstance(document, Scored):
    return np.stack([np.asarray(document.ids, np.int32), np.asarray(document.mask, np.int32)], axis=1)
  return np.append(np.asarray(document, np.int32), np.int32(end_of_text))[:, None]


def _row(pieces: Sequence[np.ndarray], seq_len: int, end_of_text: int) -> Row:
  filled_NK = np.concatenate(pieces)
  row_TK = np.zeros((seq_len, filled_NK.shape[1]), np.int32)
  row_TK[:, 0] = end_of_text
  row_TK[: len(filled_NK)] = filled_NK
  tokens_T, *mask = row_TK.T
  return Row(tokens_T, np.array([len(piece) for piece in pieces]), *mask)


PACKINGS = {'concat': concat_and_split, 'first_fit': first_fit}
"""The functions by `data.packing`."""


def unpack(row: Row) -> dict[str, np.ndarray]:
  """Converts a row to model input: 'tokens', 'segment_ids', 'positions', perhaps 'loss_mask', each int32 (T,).

  Segment ids start at 1 in every row, positions at 0 in every segment. Both are 0 in padding.
  """
  lengths = row.segment_lengths.astype(np.int64)
  starts = np.cumsum(lengths) - lengths
  used = int(lengths.sum())
  segment_ids_T = np.zeros(len(row.tokens_T), np.int32)
  segment_ids_T[:used] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
  positions_T = np.zeros(len(row.tokens_T), np.int32)
  positions_T[:used] = np.arange(used) - np.repeat(starts, lengths)
  arrays = {'tokens': row.tokens_T.astype(np.int32), 'segment_ids': segment_ids_T, 'positions': positions_T}
  if row.loss_mask_T is not None:
    arrays['loss_mask'] = row.loss_mask_T.astype(np.int32)
  return arrays


def padding_row(like: dict[str, np.ndarray], end_of_text: int) -> dict[str, np.ndarray]:
  """A row of padding only, with the arrays of another row."""
  return {name: np.full_like(row_T, end_of_text if name == 'tokens' else 0) for name, row_T in like.items()}
