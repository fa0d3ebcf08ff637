"""Where the time of a run goes, over all the processes that worked on it."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mor_jax.files import write_atomically

START_UP, COMPILE, DATA_WAIT, STEPS = 'start_up', 'compile', 'data_wait', 'steps'
VALIDATION, CHECKPOINT, LOST = 'validation', 'checkpoint', 'lost'
KINDS = (START_UP, COMPILE, DATA_WAIT, STEPS, VALIDATION, CHECKPOINT, LOST)
WRITE_EVERY = 5.0  # seconds; what a killed process did after its last note is lost from the ledger, too

MARKS = 50  # newest saves of a process whose times are kept


class Ledger:
  """Seconds by kind of work. Each moment of a process counts for one kind, the innermost `measure`, so they add up.

  Every process keeps a note in the run folder: its seconds, and those it had when it saved. Once another
  process goes on from an older step, the seconds behind that step become `lost`: their work is done again.

  Args:
    path: file of the notes; None: keep none.
  """

  def __init__(self, path: Path | None = None):
    self._path = path
    self._earlier = _read(path) if path is not None else []
    self._own = {'seconds': dict.fromkeys(KINDS, 0.0), 'saved': []}
    self._kind, self._since, self._written = START_UP, time.perf_counter(), 0.0

  @contextlib.contextmanager
  def measure(self, kind: str) -> Iterator[None]:
    """The time within counts for `kind`."""
    outer = self._switch(kind)
    try:
      yield
    finally:
      self._switch(outer)

  def resume(self, step: int) -> None:
    """This process goes on from `step` (0: from the beginning); what was done after it is lost."""
    for note in self._earlier:
      _lose_after(note, step)
    self.saved(step)

  def saved(self, step: int) -> None:
    """The state of `step` is about to be saved: the work until now is lost only if that fails."""
    self._switch(self._kind)
    self._own['saved'] = [*self._own['saved'][-MARKS:], [step, dict(self._own['seconds'])]]
    self.write()

  def seconds(self) -> dict[str, float]:
    """Seconds by kind, of all processes until now."""
    self._switch(self._kind)
    notes = [*self._earlier, self._own]
    return {kind: sum(note['seconds'][kind] for note in notes) for kind in KINDS}

  def note_memory(self, device_bytes: int) -> None:
    """Keeps what a compiled step takes of a device, the most of all programs, for the report."""
    self._own['device_bytes'] = max(device_bytes, self._own.get('device_bytes', 0))

  def record(self) -> dict[str, float]:
    """`goodput/KIND`: seconds, and `goodput/share`: that of the steps in all of them."""
    seconds = self.seconds()
    share = seconds[STEPS] / max(sum(seconds.values()), 1e-9)
    return {f'goodput/{kind}': value for kind, value in seconds.items()} | {'goodput/share': share}

  def restarts(self) -> int:
    """Processes that worked on the run before this one."""
    return len(self._earlier)

  def tick(self) -> None:
    """Writes the note if the last one is a few seconds old."""
    if time.perf_counter() - self._written > WRITE_EVERY:
      self._switch(self._kind)
      self.write()

  def write(self) -> None:
    """Writes the notes; a full disk costs the note, not the training."""
    self._written = time.perf_counter()
    if self._path is not None:
      with contextlib.suppress(OSError):
        write_atomically(self._path, json.dumps([*self._earlier, self._own]) + '\n')

  def _switch(self, kind: str) -> str:
    """Ends the current kind of work and begins another; returns the former."""
    now = time.perf_counter()
    self._own['seconds'][self._kind] += now - self._since
    outer, self._kind, self._since = self._kind, kind, now
    return outer


def _read(path: Path) -> list[dict[str, Any]]:
  try:
    return json.loads(path.read_text())
  except (OSError, json.JSONDecodeError):  # missing or damaged: train without it
    return []


def _lose_after(note: dict[str, Any], step: int) -> None:
  """Moves the seconds that an earlier process spent after `step` to `lost`: those of work that is done again."""
  seconds, kept = note['seconds'], [entry for entry in note['saved'] if entry[0] <= step]
  before = kept[-1][1] if kept else dict.fromkeys(KINDS, 0.0)
  for kind in (DATA_WAIT, STEPS, VALIDATION):
    seconds[LOST] += seconds[kind] - before[kind]
    seconds[kind] = before[kind]
  note['saved'] = kept
