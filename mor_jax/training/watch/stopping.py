"""Handles SIGTERM, Ctrl-C and the like: saves the training, then ends the process with the signal's exit code.

There are three cases:
  * Outside the training loop there is nothing to save, so the first signal ends the process. If the main
    thread is blocked in the compiler, or the exception is lost in a callback, a thread ends the process
    GRACE_SECONDS later.
  * In the loop the first signal is only recorded. The loop calls `Stop.poll` after every step. All processes
    of a run get the same answer at the same step, so they save together.
  * A second signal ends the process at once, whatever the main thread is doing.

Install after `jax.distributed.initialize`, which would otherwise replace the SIGTERM handler with its own.
"""

import collections
import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mor_jax.parallel import mesh as mesh_lib

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_STDOUT, _STDERR = 1, 2
GRACE_SECONDS = 5.0


class Interrupted(BaseException):
  """Interrupts a wait in the training loop; the steps completed before it can still be saved."""


class Signals:
  """The signals received by this process. Use as a context manager in the main thread; elsewhere it does nothing.

  A signal that the process inherited as ignored stays ignored (`nohup`, background jobs).

  Attributes:
    received: number of the first signal, or None.
    is_training: whether the training loop is running, which saves before the process ends.
  """

  def __init__(self):
    self.received: int | None = None
    self.is_training = self._raises = False
    self._previous = {}

  def __enter__(self) -> 'Signals':
    if threading.current_thread() is not threading.main_thread():
      return self
    self._pipe = os.pipe()
    os.set_blocking(self._pipe[1], False)
    self._previous_fd = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
    self._thread = threading.Thread(target=self._watch, name='signals', daemon=True)
    self._thread.start()
    for number in HANDLED:
      if signal.getsignal(number) is not signal.SIG_IGN:
        self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, kind: type | None, *_) -> None:
    if kind is SystemExit and self.received is not None:
      _leave(self.received)
    if threading.current_thread() is not threading.main_thread():
      return
    if self.received is not None and jax.distributed.is_initialized():
      return  # the end of the process may wait for the others: the thread bounds that
    for number, handler in self._previous.items():
      signal.signal(number, handler)
    signal.set_wakeup_fd(self._previous_fd)
    os.close(self._pipe[1])  # ends the thread
    self._thread.join()
    os.close(self._pipe[0])

  @contextlib.contextmanager
  def training(self) -> Iterator[None]:
    """Within this context a signal is only recorded; the loop saves and stops."""
    self.is_training = True
    try:
      yield
    finally:
      self.is_training = False

  @contextlib.contextmanager
  def interruptible(self) -> Iterator[None]:
    """Within this context a signal raises Interrupted, as does one received earlier."""
    self._raises = True
    try:
      if self.received is not None:
        raise Interrupted
      yield
    finally:
      self._raises = False

  def exit_code(self, number: int) -> int:
    """Returns the exit code to use after saving. A run with a single process ends in this call."""
    if not jax.distributed.is_initialized():  # else all processes must end together
      _leave(number)
    return 128 + number

  def output_lost(self) -> None:
    """Nobody reads what this process prints any more: as if a signal said so, from whichever thread noticed."""
    self.received = self.received or int(signal.SIGPIPE)
    if not self.is_training:
      _leave(signal.SIGPIPE, flush=False)

  def _handle(self, number: int, _) -> None:
    """Signal handler; Python calls it once the main thread runs Python code again."""
    first, self.received = self.received is None, self.received or number
    if not self.is_training:
      raise SystemExit(128 + number)
    if self._raises and first:
      raise Interrupted

  def _watch(self) -> None:
    """Sees signals immediately, even while the main thread is in compiled code."""
    count = 0
    while True:
      # A process that has nothing to save must be gone soon.
      leaves = count and not self.is_training
      if not select.select(self._pipe[:1], [], [], GRACE_SECONDS if leaves else None)[0]:
        _leave(self.received, flush=False)
      number = os.read(self._pipe[0], 1)
      if not number:
        return
      if number[0] not in self._previous:
        continue
      count += 1
      if count > 1:
        _say(f'{signal.Signals(number[0]).name} again: leaving at once')
        _leave(number[0], flush=False)
      self.received = number[0]
      what = 'saving, then leaving; once more to leave at once' if self.is_training else 'leaving'
      _say(f'{signal.Signals(number[0]).name}: {what}')


class Stop:
  """Tells the training loop when to save, and when to save and end; the same on all processes.

  With several processes each step is followed by a vote: the maximum of everyone's signal and wish, computed
  on the devices behind the step and read `lag` votes later, when it is there already, so that nobody waits.

  Args:
    signals: of this process.
    mesh: all devices of the run.
    wants_save: whether this process wishes a checkpoint, for reasons of its own.
    lag: votes that may be in flight; at least the steps that the loop runs ahead of the devices.
  """

  def __init__(
    self, signals: Signals, mesh: Mesh, wants_save: Callable[[], bool] = lambda: False, lag: int = 2
  ):
    self._signals, self._wants_save, self._lag = signals, wants_save, lag
    self._agreed: int | None = None
    self._save_agreed, self._stale = False, 0
    self._is_alone = jax.process_count() == 1
    self._votes = collections.deque()
    if not self._is_alone:
      self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
      self._places = len(mesh.local_devices)
      self._count = jax.jit(lambda votes: votes.max(axis=0), out_shardings=mesh_lib.replicated(mesh))

  @property
  def signal(self) -> int | None:
    """The signal for which all processes have agreed to stop, or None."""
    return self._agreed

  @property
  def save_wanted(self) -> bool:
    """Whether a process has requested a checkpoint and all know of it. True once per request."""
    if self._is_alone:
      return self._wants_save()
    wanted, self._save_agreed = self._save_agreed, False
    if wanted:
      self._stale = len(self._votes)  # these were cast before the checkpoint
    return wanted

  def poll(self, step: int | None = None) -> int | None:
    """Votes, then returns `signal`. All processes must make the same calls with the same steps."""
    if self._is_alone:
      self._agreed = self._signals.received
    elif self._agreed is None:
      self._votes.append(self._vote())
      if len(self._votes) > self._lag:
        self._agreed, wish = _read(self._votes.popleft())
        self._save_agreed = self._save_agreed or (wish and not self._stale)
        self._stale = max(0, self._stale - 1)
      if step is not None and _is_preempted(step):
        self._agreed = self._agreed or int(signal.SIGTERM)
    return self._agreed

  def settle(self) -> int | None:
    """Returns `signal` after a blocking vote of all processes."""
    if self._is_alone:
      return self.poll()
    if self._agreed is None:
      self._agreed = max(_read(vote)[0] or 0 for vote in [*self._votes, self._vote()]) or None
      self._votes.clear()
    return self._agreed

  @contextlib.contextmanager
  def interruptible(self) -> Iterator[None]:
    """For waits in the loop: with a single process a signal raises Interrupted and sets `signal`."""
    if not self._is_alone:
      yield
      return
    try:
      with self._signals.interruptible():
        yield
    except Interrupted:
      self._agreed = self._signals.received
      raise

  def between(self, items: Iterable[Any]) -> Iterator[Any]:
    """Yields the items of long work that all processes share; during training it polls before each item.

    Raises:
      Interrupted: all processes have agreed to stop.
    """
    for item in items:
      if self._signals.is_training and self.poll() is not None:
        raise Interrupted
      yield item

  def _vote(self) -> jax.Array:
    own = np.tile(np.int32([self._signals.received or 0, self._wants_save()]), (self._places, 1))
    return self._count(mesh_lib.put({'votes': own}, self._sharding)['votes'])


def _read(vote: jax.Array) -> tuple[int | None, bool]:
  """(signal or None, whether a save is requested) of a vote."""
  number, wish = jax.device_get(vote).tolist()
  return number or None, bool(wish)


def _is_preempted(step: int) -> bool:
  """Whether JAX's preemption service has announced a preemption and chosen this step to save at."""
  try:
    return multihost_utils.reached_preemption_sync_point(step)
  except RuntimeError:  # the service is switched off
    return False


def _leave(number: int, flush: bool = True) -> NoReturn:
  """Ends the process without the interpreter's shutdown, which waits for a compiling thread and then crashes.

  Args:
    number: signal number; the exit code is 128 + number.
    flush: flush stdout and stderr first. Only for the main thread: another thread could block on their locks.
  """
  if flush:
    sys.stdout.flush()
    sys.stderr.flush()
  if os.isatty(_STDOUT):
    os.write(_STDOUT, b'\x1b[?25h')  # a progress bar hides the cursor
  os._exit(128 + number)


def _say(text: str) -> None:
  """Writes to stderr without taking its lock, which the main thread may hold."""
  with contextlib.suppress(OSError):  # it may be gone with the terminal
    os.write(_STDERR, f'\n{text}\n'.encode())
