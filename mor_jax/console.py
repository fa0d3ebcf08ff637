"""What commands show a user: lines as they are, rows with labels, a bar; and what happens if nobody reads them."""

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterable
from typing import IO, Any

from rich.console import Console
from rich.progress import Progress, ProgressColumn

Row = tuple[str, str]
READER_GONE = 141  # exit code of a command whose output nobody reads any more: 128 + SIGPIPE
_GONE = (errno.EPIPE, errno.EIO)  # the other end of a pipe, the terminal of a lost connection


class Output:
  """A stream that may lose its reader, or have no room, or no character for what it is given.

  Args:
    stream: stdout or stderr.
    lost: called once when the reader is gone; what is written after that goes nowhere.
  """

  def __init__(self, stream: IO[str], lost: Callable[[], None]):
    self._stream, self._lost, self._works = stream, lost, True

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)

  def write(self, text: str) -> int:
    """Writes; a character that the stream's encoding lacks becomes a question mark."""
    encoding = self._stream.encoding or 'utf-8'
    self._try(self._stream.write, text.encode(encoding, 'replace').decode(encoding))
    return len(text)

  def flush(self) -> None:
    """Writes what the stream holds back."""
    self._try(self._stream.flush)

  def _try(self, action: Callable[..., Any], *arguments: Any) -> None:
    if not self._works:
      return
    try:
      action(*arguments)
    except OSError as error:
      self._works = False
      _silence(self._stream)
      if error.errno in _GONE:
        self._lost()
      else:
        print(f'WARNING: output cannot be written ({error.strerror}); nothing more is shown', file=sys.stderr)


def _silence(stream: IO[str]) -> None:
  """What the stream still holds, and would complain about at the end of the process, goes nowhere."""
  with contextlib.suppress(OSError, ValueError):  # not a file
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def leave_quietly() -> None:
  """Ends a command whose output nobody reads, as `head` does to it."""
  os._exit(READER_GONE)


def open_console(
  quiet: bool = False, stderr: bool = False, lost: Callable[[], None] = leave_quietly
) -> Console:
  """The console of a command.

  Args:
    quiet: shows nothing.
    stderr: writes there instead of to stdout.
    lost: called once when nobody reads the output any more.
  """
  return Console(file=Output(sys.stderr if stderr else sys.stdout, lost), quiet=quiet)  # type: ignore[arg-type]


def has_colours(console: Console) -> bool:
  """Whether a console shows colours: a terminal that has some, and no NO_COLOR."""
  return console.color_system is not None and not console.no_color


def print_line(console: Console, text: str) -> None:
  """Text as it is; a line stays one line however long."""
  console.print(text, highlight=False, markup=False, soft_wrap=True)


def print_table(console: Console, title: str, rows: Iterable[Row]) -> None:
  """A title and rows under it."""
  console.print(f'\n{title}', highlight=False, markup=False, soft_wrap=True, style='bold')
  print_rows(console, rows)


def print_rows(console: Console, rows: Iterable[Row]) -> None:
  """Label and text, aligned."""
  for label, text in rows:
    aligned = text.replace('\n', '\n' + ' ' * 16)
    print_line(console, f'  {label:<13} {aligned}')


class Bar:
  """How far a piece of work is: a bar on a terminal, nothing elsewhere. Use as a context.

  Args:
    columns: what stands in its line; text may name `{task.fields[NAME]}`.
    total: of the work; None: not known.
    description: of the work.
    transient: it goes away at the end.
    expand: it takes the whole width.
    fields: their first values.
  """

  def __init__(
    self,
    console: Console,
    *columns: str | ProgressColumn,
    total: float | None,
    description: str = '',
    transient: bool = False,
    expand: bool = True,
    **fields: Any,
  ):
    hidden = not console.is_terminal
    self._progress = Progress(*columns, console=console, transient=transient, expand=expand, disable=hidden)
    self._task = self._progress.add_task(description, total=total, **fields)

  def __enter__(self) -> 'Bar':
    self._progress.start()
    return self

  def __exit__(self, *_) -> None:
    self._progress.stop()

  def advance(self, amount: float) -> None:
    """So much more is done."""
    self._progress.advance(self._task, amount)

  def update(self, **changes: Any) -> None:
    """Sets `completed`, `total`, `description` or fields."""
    self._progress.update(self._task, **changes)
