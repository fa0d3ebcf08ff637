"""Prepares a dataset: python -m mor_jax.prepare --config.data.source='files:texts/*.txt' [--config=configs/tiny.py]

Documents become tokens, tokens become packed rows, rows become a TFDS dataset in the folder for prepared
datasets (--config.data.cache_dir). Training with the same settings finds it there; anywhere else it is
--config.data.source=prepared:FOLDER. Interrupted, even killed, the same command continues.

To look into a finished dataset, and of conversations (--config.data.format=chat) at what is learned:
python -m mor_jax.prepare --inspect=FOLDER --rows=3
"""

import datetime
import time

from absl import flags
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.table import Column

from mor_jax import cli
from mor_jax.config import Config, ConfigError
from mor_jax.console import Bar, open_console, print_line
from mor_jax.data import dataset as dataset_lib
from mor_jax.data import inspection, synthetic
from mor_jax.units import quantity

FLAGS = flags.FLAGS
SECONDS_BETWEEN_LINES = 10.0


def define_flags() -> None:
  """Defines the flags of this command."""
  flags.DEFINE_string('inspect', None, 'show rows and statistics of this prepared dataset instead')
  flags.DEFINE_integer('rows', 3, 'rows that --inspect shows')
  flags.DEFINE_string('split', 'train', 'split that --inspect shows: train or validation')


def main(config: Config, workdir: str | None) -> None:
  """Prepares or inspects. Raises ConfigError."""
  console = open_console()
  if FLAGS.inspect:
    cli.check_least(rows=0)
    inspection.show(console, dataset_lib.open_dataset(FLAGS.inspect), FLAGS.split, FLAGS.rows)
    return
  if config.data.live:
    raise ConfigError(
      'data.live=True reads documents while training, so there is nothing to prepare; leave it out'
    )
  if config.data.source.startswith(synthetic.PREFIX):
    raise ConfigError(
      f'data.source={config.data.source} makes its rows while training, so there is nothing to prepare'
    )
  with Meter(console) as meter:
    dataset = dataset_lib.prepare(config.data, report=meter.print, progress=meter.show)
  meter.print(f'use it with --config.data.source={dataset_lib.PREPARED}{dataset.folder}')


class Meter:
  """Documents, MB and tokens a second, and the time left: a bar on a terminal, a line now and then elsewhere."""

  def __init__(self, console: Console):
    self._console = console
    text = TextColumn('{task.fields[text]}', table_column=Column(no_wrap=True))
    columns = (BarColumn(bar_width=10), text, 'ETA', TimeRemainingColumn())
    self._bar = Bar(console, *columns, total=1.0, expand=False, text='')
    self._is_shown = False
    self._start = self._last_line = time.perf_counter()

  def __enter__(self) -> 'Meter':
    return self

  def __exit__(self, *exception: object) -> None:
    self._bar.__exit__()

  def print(self, text: str) -> None:
    """A line above the bar."""
    print_line(self._console, text)
    if not self._is_shown:
      self._start = self._last_line = time.perf_counter()  # the next piece of work begins

  def show(self, state: dataset_lib.Progress) -> None:
    """Shows the progress."""
    now = time.perf_counter()
    if not self._is_shown:
      self._is_shown = True
      self._bar.__enter__()
    text = self._text(state, now - self._start)
    if state.fraction is None:
      self._bar.update(total=None, text=text)
    else:
      self._bar.update(completed=state.fraction, text=text)
    if not self._console.is_terminal and now - self._last_line >= SECONDS_BETWEEN_LINES:
      self._last_line = now
      self.print(text + self._time_left(state.fraction, now - self._start))

  def _text(self, state: dataset_lib.Progress, seconds: float) -> str:
    done = state.done
    new_bytes = done['bytes'] - state.skipped_bytes
    share = new_bytes / max(done['bytes'], 1)
    return (
      f'{done["documents"]:,} documents, {done["documents"] * share / seconds:,.0f}/s; '
      f'{done["bytes"] / 1e6:,.0f} MB, {new_bytes / 1e6 / seconds:.1f}/s; '
      f'{quantity(done["tokens"] / seconds)} tokens/s'
    )

  def _time_left(self, fraction: float | None, seconds: float) -> str:
    if not fraction:
      return ''
    return f'  ETA {datetime.timedelta(seconds=round(seconds / fraction * (1 - min(fraction, 1))))}'


if __name__ == '__main__':
  define_flags()
  cli.run(main, __doc__, needs_config=False)
