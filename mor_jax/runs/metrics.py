"""Stores the metrics of a run as JSON lines and TensorBoard events."""

import contextlib
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mor_jax.errors import RunError
from mor_jax.files import parse_json, write_atomically
from mor_jax.runs.board import Board

Record = dict[str, float]


class MetricsLog:
  """metrics.jsonl and tensorboard/ of a run folder, with one line per step. Use as a context manager.

  A disk that is full does not end the training: lines wait until they can be written.

  Args:
    folder: the run folder.
    last_step: step that the run resumes from. Records of later steps and an incomplete last
      line are dropped.
    writes: whether this process writes files; the others only keep records in memory.
    report: shows a line to the user.

  Raises:
    RunError: the files cannot be written at the beginning.
  """

  def __init__(
    self, folder: Path, last_step: int, writes: bool = True, report: Callable[[str], None] = print
  ):
    path = folder / 'metrics.jsonl'
    self.records = [record for record in read(path) if record['step'] <= last_step]
    self._writes, self._report, self._folder = writes, report, folder
    self._pending, self._is_failing = b'', False
    self._board: Board | None = None
    if writes:
      try:
        write_atomically(path, ''.join(json.dumps(record) + '\n' for record in self.records))
        self._file = path.open('r+b', buffering=0)
        self._board = Board(folder / 'tensorboard', last_step + 1)
      except OSError as error:
        raise RunError(f'workdir={folder} cannot be written ({error.strerror}); make room there') from None
      self._size = self._file.seek(0, 2)

  def __enter__(self) -> 'MetricsLog':
    return self

  def __exit__(self, *_) -> None:
    if self._writes:
      with contextlib.suppress(OSError):
        self._write_pending()
      with contextlib.suppress(OSError):
        self._file.close()
      if self._board is not None:
        with contextlib.suppress(OSError):
          self._board.close()

  def write(self, step: int, record: Record) -> None:
    """Writes the record of a step."""
    record = {'step': step, **record}
    self.records.append(record)
    if not self._writes:
      return
    self._pending += (json.dumps(record) + '\n').encode()
    try:
      self._write_pending()
      if self._board is None:
        self._board = Board(self._folder / 'tensorboard', step)
      self._board.write(step, {name: value for name, value in record.items() if name != 'step'})
    except OSError as error:
      self._board = None  # its last event may be cut off, and nothing after such a one is ever read
      if not self._is_failing:
        self._report(
          f'WARNING: metrics cannot be written to {self._folder} ({error.strerror}); training goes on, and '
          f'metrics.jsonl gets the missing lines once there is room'
        )
    self._is_failing = self._board is None

  def _write_pending(self) -> None:
    """Appends what is not on disk yet; a line that got there in part is written anew. Raises OSError."""
    while self._pending:
      self._file.seek(self._size)
      written = self._file.write(self._pending)
      if not written:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
      self._size += written
      self._pending = self._pending[written:]


def read(path: Path) -> list[dict[str, Any]]:
  """The records of a metrics.jsonl, in order, without lines that are none; [] if the file is missing."""
  return read_and_judge(path)[0]


def read_and_judge(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
  """The records of a metrics.jsonl, and the numbers, from 1, of lines that are none.

  A record is an object with a step that is not before that of the line before.
  """
  records: list[dict[str, Any]] = []
  damaged = []
  text = path.read_text(encoding='utf-8', errors='replace') if path.exists() else ''
  for number, line in enumerate(text.split('\n'), start=1):
    if not line.strip():
      continue
    try:
      record = parse_json(line)
    except ValueError:
      record = None
    if _is_record(record, records[-1]['step'] if records else 0):
      records.append(record)
    else:
      damaged.append(number)
  return records, damaged


def _is_record(record: Any, last_step: int) -> bool:
  return isinstance(record, dict) and type(record.get('step')) is int and record['step'] >= last_step
