"""Detects a hung training run: dumps the stack of every thread and can end the process."""

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
  """Dumps the Python stacks of all threads to stderr if `beat` is not called for `limit` seconds.

  Use as a context manager. It also works while the main thread is blocked in compiled code or waits for
  a device, another process or a disk.

  Args:
    limit: seconds; 0: disabled.
    exits: then end the process with EXIT_CODE, without cleaning up, since a clean-up could hang as well.
      Otherwise report again after every further `limit` seconds.
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
    """Reports progress; `what` names the work that comes next."""
    self._last, self._told, self._what = time.monotonic(), 0, what

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Suspends the limit during work of unknown length, such as compiling."""
    self._paused += 1
    try:
      yield
    finally:
      self._paused -= 1
      self._last = time.monotonic()

  def over(self, items: Iterable[Any], what: str) -> Iterator[Any]:
    """Yields the items and counts each as progress. The first has no limit, as it may compile a program."""
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
  """Yields the next item, if there is one."""
  for item in iterator:
    yield item
    return
