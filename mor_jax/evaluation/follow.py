"""What a user sees while a model is measured."""

from rich.console import Console
from rich.progress import BarColumn, TimeRemainingColumn

from mor_jax.config import ModelConfig
from mor_jax.console import Bar, print_line
from mor_jax.data import loader
from mor_jax.evaluation import held_out


class Follow:
  """Which way of running the model is being measured, and how far it is: a bar on a terminal, else lines."""

  def __init__(
    self,
    console: Console,
    model: ModelConfig,
    dataset: loader.Dataset,
    max_rows: int | None,
    chooser: str | None,
  ):
    rows = dataset.manifest.splits['validation'].rows
    self._rows = rows if max_rows is None else min(max_rows, rows)
    self._ways, self._routed = held_out.ways(model, chooser), model.kind == 'mor'
    self._chooser = chooser
    self._done, self._console = 0, console
    columns = ('{task.description}', BarColumn(bar_width=None), TimeRemainingColumn())
    total = self._rows * len(self._ways)
    self._bar = Bar(console, *columns, total=total, description='compiling', transient=True)

  def __enter__(self) -> 'Follow':
    self._bar.__enter__()
    return self

  def __exit__(self, *exception: object) -> None:
    self._bar.__exit__()

  def begin(self, way: held_out.Way) -> None:
    """The next way of running the model."""
    self._done += 1
    modes = {'topk': 'top-k routing, ', 'threshold': 'threshold routing, '}
    mode = modes[way.routing] if self._routed else ''
    if self._chooser is not None:
      mode = f'depths by {self._chooser}, '
    limit = 'recursion' if way.max_recursions == 1 else 'recursions'
    text = f'{self._done}/{len(self._ways)}: {mode}{way.max_recursions} {limit}'
    self._bar.update(description=text)
    if not self._console.is_terminal:
      print_line(self._console, f'{text}, {self._rows:,} rows')

  def advance(self, rows: int) -> None:
    """This many more rows were dispatched."""
    self._bar.advance(rows)
