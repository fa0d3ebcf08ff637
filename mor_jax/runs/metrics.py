"""Stores the metrics of a run as JSON lines and TensorBoard events."""

import json
import sys
from pathlib import Path
from typing import Any

from mor_jax.files import write_atomically

Record = dict[str, float]


class MetricsLog:
  """metrics.jsonl and tensorboard/ of a run folder, with one line per step. Use as a context manager.

  Args:
    folder: the run folder.
    last_step: step that the run resumes from. Records of later steps and an incomplete last
      line are dropped.
    writes: whether this process writes files; the others only keep records in memory.
  """

  def __init__(self, folder: Path, last_step: int, writes: bool = True):
    path = folder / 'metrics.jsonl'
    self.records = [record for record in read(path) if record['step'] <= last_step]
    self._writes = writes
    if writes:
      write_atomically(path, ''.join(json.dumps(record) + '\n' for record in self.records))
      self._file = path.open('a')
      self._board = _summary_writer()(str(folder / 'tensorboard'), purge_step=last_step + 1)

  def __enter__(self) -> 'MetricsLog':
    return self

  def __exit__(self, *_) -> None:
    if self._writes:
      self._file.close()
      self._board.close()

  def write(self, step: int, record: Record) -> None:
    """Writes the record of a step."""
    record = {'step': step, **record}
    self.records.append(record)
    if not self._writes:
      return
    self._file.write(json.dumps(record) + '\n')
    self._file.flush()
    for name, value in record.items():
      if name != 'step':
        self._board.add_scalar(name, value, step)


def _summary_writer() -> type:
  """tensorboardX's writer, imported lazily and without PyTorch.

  tensorboardX imports PyTorch if it is installed, which takes three seconds and 200 MB. It needs it
  for PyTorch tensors only, and there are none here.
  """
  hides = 'torch' not in sys.modules
  if hides:
    sys.modules['torch'] = None  # an import of it fails
  try:
    from tensorboardX import SummaryWriter
  finally:
    if hides:
      del sys.modules['torch']
  return SummaryWriter


def read(path: Path) -> list[dict[str, Any]]:
  """The records of a metrics.jsonl, in order. Skips an incomplete last line; [] if the file is missing."""
  if not path.exists():
    return []
  records = []
  for line in path.read_text(errors='replace').splitlines():
    try:
      records.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return records
