"""What commands show a user: lines as they are, rows with labels, a bar."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.progress import Progress, ProgressColumn

Row = tuple[str, str]


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
