"""Progress of a training run: a bar on a terminal, otherwise one line per interval."""

import datetime

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn, TimeRemainingColumn

from mor_jax.console import Bar, print_line
from mor_jax.runs.metrics import Record


class Progress:
  """Shows completed steps, loss, tokens per second and remaining time. Use as a context manager.

  Args:
    console: where to print; knows whether it is a terminal.
    total: steps of the whole run.
    done: steps completed by earlier processes.
  """

  def __init__(self, console: Console, total: int, done: int):
    self._console, self._total = console, total
    self._bar = Bar(
      console,
      'step',
      MofNCompleteColumn(),
      BarColumn(bar_width=None),
      '{task.fields[metrics]}',
      TimeElapsedColumn(),
      'ETA',
      TimeRemainingColumn(),
      total=total,
      completed=done,
      metrics='',
    )

  def __enter__(self) -> 'Progress':
    self._bar.__enter__()
    return self

  def __exit__(self, *_) -> None:
    self._bar.__exit__()

  def advance(self, step: int) -> None:
    """Notes that a step was dispatched."""
    self._bar.update(completed=step)

  def show(self, step: int, record: Record) -> None:
    """Shows the metrics of a step."""
    if 'train/loss' in record:
      loss, speed = record['train/loss'], record['train/tokens_per_second']
      self._bar.update(metrics=f'loss {loss:.3f}  {speed:,.0f} tokens/s')
      if not self._console.is_terminal:
        print_line(self._console, self._line(step, record))
    if 'validation/nll' in record:
      print_line(self._console, self._validation_line(step, record))

  def report(self, text: str) -> None:
    """Prints a separate line, with or without a bar."""
    print_line(self._console, text)

  def _line(self, step: int, record: Record) -> str:
    return (
      f'step {step:>{len(str(self._total))}}/{self._total}  loss {record["train/loss"]:.4f}  '
      f'lr {record["train/learning_rate"]:.2e}  grad norm {record["train/grad_norm"]:.2f}  '
      f'{record["train/tokens_per_second"]:,.0f} tokens/s  ETA {self._time_left(step, record)}'
    )

  def _time_left(self, step: int, record: Record) -> str:
    seconds = (self._total - step) * record['train/seconds_per_step']
    return str(datetime.timedelta(seconds=round(seconds)))

  def _validation_line(self, step: int, record: Record) -> str:
    text = (
      f'step {step:>{len(str(self._total))}}/{self._total}  validation loss {record["validation/nll"]:.4f}'
    )
    if 'validation/dead_token_ratio' in record:
      text += f'  dead tokens {record["validation/dead_token_ratio"]:.1%}'
    return text
