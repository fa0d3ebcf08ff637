"""Goodput: the wall-clock time of a run by kind of work, summed over all its processes."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mor_jax.files import parse_json, write_atomically

START_UP, COMPILE, DATA_WAIT, STEPS = 'start_up', 'compile', 'data_wait', 'steps'
VALIDATION, CHECKPOINT, LOST = 'validation', 'checkpoint', 'lost'
KINDS = (START_UP, COMPILE, DATA_WAIT, STEPS, VALIDATION, CHECKPOINT, LOST)
WRITE_EVERY = 5.0  # seconds; what a killed process did after its last note is lost from the ledger, too

MARKS = 50  # newest saves of a process whose times are kept


class Ledger:
  """Seconds by kind of work.

  Every moment counts for exactly one kind, that of the innermost `measure`, so the kinds add up to the
  total. Each process keeps a note in the run folder with its seconds now and at each save. When another
  process resumes from an earlier step, the seconds spent after that step become `lost`, because the work
  is repeated.

  Args:
    path: file of the notes; None: no file.
  """

  def __init__(self, path: Path | None = None):
    self._path = path
    self._earlier = _read(path) if path is not None else []
    self._own = {'seconds': dict.fromkeys(KINDS, 0.0), 'saved': []}
    self._kind, self._since, self._written = START_UP, time.perf_counter(), 0.0

  @contextlib.contextmanager
  def measure(self, kind: str) -> Iterator[None]:
    """Counts the time within as `kind`."""
    outer = self._switch(kind)
    try:
      yield
    finally:
      self._switch(outer)

  def resume(self, step: int) -> None:
    """Records that this process resumes from `step` (0: a fresh start); time spent after that step is lost."""
    for note in self._earlier:
      _lose_after(note, step)
    self.saved(step)

  def saved(self, step: int) -> None:
    """Records that the state of `step` is about to be saved: earlier work is lost only if the save fails."""
    self._switch(self._kind)
    self._own['saved'] = [*self._own['saved'][-MARKS:], [step, dict(self._own['seconds'])]]
    self.write()

  def seconds(self) -> dict[str, float]:
    """Seconds by kind, summed over all processes until now."""
    self._switch(self._kind)
    notes = [*self._earlier, self._own]
    return {kind: sum(note['seconds'][kind] for note in notes) for kind in KINDS}

  def note_memory(self, device_bytes: int) -> None:
    """Records the device memory of a compiled step in bytes; the report shows the maximum over all programs."""
    self._own['device_bytes'] = max(device_bytes, self._own.get('device_bytes', 0))

  def record(self) -> dict[str, float]:
    """`goodput/KIND` in seconds, and `goodput/share`: the share of the training steps in the total."""
    seconds = self.seconds()
    share = seconds[STEPS] / max(sum(seconds.values()), 1e-9)
    return {f'goodput/{kind}': value for kind, value in seconds.items()} | {'goodput/share': share}

  def restarts(self) -> int:
    """Number of processes that worked on the run before this one."""
    return len(self._earlier)

  def tick(self) -> None:
    """Writes the notes if the last write is more than WRITE_EVERY seconds ago."""
    if time.perf_counter() - self._written > WRITE_EVERY:
      self._switch(self._kind)
      self.write()

  def write(self) -> None:
    """Writes the notes; ignores file errors, so that a full disk does not end the training."""
    self._written = time.perf_counter()
    if self._path is not None:
      with contextlib.suppress(OSError):
        write_atomically(self._path, json.dumps([*self._earlier, self._own]) + '\n')

  def _switch(self, kind: str) -> str:
    """Switches to another kind of work; returns the previous one."""
    now = time.perf_counter()
    self._own['seconds'][self._kind] += now - self._since
    outer, self._kind, self._since = self._kind, kind, now
    return outer


def _read(path: Path) -> list[dict[str, Any]]:
  try:
    notes = parse_json(path.read_text(encoding='utf-8'))
  except (OSError, ValueError):  # missing or damaged: train without it
    return []
  return notes if isinstance(notes, list) and all(map(_is_note, notes)) else []


def _is_note(note: Any) -> bool:
  """Whether this is what a process left."""

  def has_all_kinds(seconds: Any) -> bool:
    return isinstance(seconds, dict) and all(type(seconds.get(kind)) in (int, float) for kind in KINDS)

  if not isinstance(note, dict) or not isinstance(note.get('saved'), list):
    return False
  saves = (isinstance(save, list) and len(save) == 2 and has_all_kinds(save[1]) for save in note['saved'])
  return has_all_kinds(note.get('seconds')) and all(saves)


def _lose_after(note: dict[str, Any], step: int) -> None:
  """Moves the seconds that an earlier process spent after `step` to `lost`, because that work is repeated."""
  seconds, kept = note['seconds'], [entry for entry in note['saved'] if entry[0] <= step]
  before = kept[-1][1] if kept else dict.fromkeys(KINDS, 0.0)
  for kind in (DATA_WAIT, STEPS, VALIDATION):
    seconds[LOST] += seconds[kind] - before[kind]
    seconds[kind] = before[kind]
  note['saved'] = kept
