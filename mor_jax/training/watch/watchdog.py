"""Notices a training that hangs: shows where every thread is, and can end the process."""

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

EXIT_CODE = 70
_STDERR = 2


class Watchdog:
  """Writes the Python stacks of all threads to stderr when `beat` is not called for `limit` seconds. A context.

  Works while the main thread waits in compiled code, for a device, another process or a disk.

  Args:
    limit: seconds; 0: never.
    exits: end the process with EXIT_CODE then, at once and without cleaning up: what hangs would hang that too.
      Otherwise it tells again after twice, three times the limit.
  """

  def __init__(self, limit: float, exits: bool = False):
    self._limit, self._exits = limit, exits
    self._last, self._paused, self._told, self._what = time.monotonic(), 0, 0, 'the first step'
    self._ended = threading.Event()

  def __enter__(self) -> 'Watchdog':
    self._last = time.monotonic()
    if self._limit:
      threading.Thread(target=self._watch, name='watchdog', daemon=True).start()
    return self

  def __exit__(self, *_) -> None:
    self._ended.set()

  def beat(self, what: str) -> None:
    """There was progress; `what` comes next."""
    self._last, self._told, self._what = time.monotonic(), 0, what

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """For work whose length nobody knows, such as compiling."""
    self._paused += 1
    try:
      yield
    finally:
      self._paused -= 1
      self._last = time.monotonic()

  def over(self, items: Iterable[Any], what: str) -> Iterator[Any]:
    """The items; each handled is progress, and the first, which may compile a program, is not limited."""
    iterator = iter(items)
    with self.paused():
      yield from _first(iterator)
    for item in iterator:
      self.beat(what)
      yield item

  def _watch(self) -> None:
    while not self._ended.wait(min(1.0, self._limit / 4)):
      waited = time.monotonic() - self._last
      if self._paused or waited < self._limit * (self._told + 1):
        continue
      self._told += 1
      ends = f'; the process ends with exit code {EXIT_CODE}' if self._exits else ''
      os.write(_STDERR, f'\nhang: {self._what} takes more than {waited:.0f} s{ends}\n'.encode())
      faulthandler.dump_traceback(_STDERR, all_threads=True)
      if self._exits:
        os._exit(EXIT_CODE)


def _first(iterator: Iterator[Any]) -> Iterator[Any]:
  """The next item, if there is one."""
  for item in iterator:
    yield item
    return
