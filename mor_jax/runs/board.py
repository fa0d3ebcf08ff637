"""TensorBoard events of a run, written at once and on the caller's thread.

tensorboardX's own `SummaryWriter` hands events to a thread through a short queue. Where the disk is full that thread
dies, and the next event but ten waits for it for ever; here the caller gets the error.
"""

import sys
import time
from pathlib import Path
from typing import Any


class Board:
  """One file of events. Raises OSError, from all it does, if the file cannot be written.

  Args:
    folder: where the file is made, beside those of earlier processes.
    first_step: events of this step and later ones in earlier files are to be forgotten.
  """

  def __init__(self, folder: Path, first_step: int):
    self._parts = _parts()
    folder.mkdir(parents=True, exist_ok=True)
    self._writer = self._parts.EventsWriter(str(folder / 'events'), f'.{time.time_ns()}')
    started = self._parts.SessionLog(status=self._parts.SessionLog.START)
    self._add(step=first_step, file_version='brain.Event:2')
    self._add(step=first_step, session_log=started)
    self._writer.flush()

  def write(self, step: int, values: dict[str, float]) -> None:
    """Adds the values of a step by name."""
    for name, value in values.items():
      self._add(step=step, summary=self._parts.scalar(name, value))
    self._writer.flush()

  def close(self) -> None:
    """Closes the file."""
    self._writer.close()

  def _add(self, **content: Any) -> None:
    self._writer.write_event(self._parts.Event(wall_time=time.time(), **content))


def _parts() -> Any:
  """What is needed of tensorboardX, imported lazily and without PyTorch.

  tensorboardX imports PyTorch if it is installed, which takes three seconds and 200 MB. It needs it for PyTorch
  tensors only, and there are none here.
  """
  hides = 'torch' not in sys.modules
  if hides:
    sys.modules['torch'] = None  # type: ignore[assignment]  # an import of it fails
  try:
    from tensorboardX import event_file_writer, summary
    from tensorboardX.proto import event_pb2
  finally:
    if hides:
      del sys.modules['torch']

  class Parts:
    EventsWriter = event_file_writer.EventsWriter
    Event, SessionLog = event_pb2.Event, event_pb2.SessionLog
    scalar = staticmethod(summary.scalar)

  return Parts
