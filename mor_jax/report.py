"""Shows runs on a page: python -m mor_jax.report RUN [RUN ...] [--output=report.html]

Writes one HTML file that needs no network: loss curves of all runs on common axes, what the routers did,
a text with every token coloured by its depth, costs, and the settings that differ. A PNG of each plot lies
in a folder beside it.
"""

import importlib.util
from functools import partial
from pathlib import Path

from absl import flags

from mor_jax import cli
from mor_jax.config import ConfigError
from mor_jax.console import open_console, print_line

FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines the flags of this command."""
  flags.DEFINE_string('output', None, 'the page; default: report.html in the folder of the first run')
  flags.DEFINE_integer('tokens', 16384, 'validation tokens whose depths are looked at; 0: none')


def main(paths: list[str]) -> None:
  """Reads the runs and writes the page. Raises ConfigError before anything is written."""
  if not paths:
    raise ConfigError('name the folder of at least one run: python -m mor_jax.report runs/tiny')
  cli.check_least(tokens=0)
  if importlib.util.find_spec('matplotlib') is None:
    raise ConfigError("the plots need matplotlib: pip install 'mor_jax[report]', or pip install matplotlib")
  from mor_jax.reporting import build  # matplotlib is an optional extra

  build.write_page(
    paths,
    Path(FLAGS.output or Path(paths[0]) / 'report.html'),
    FLAGS.tokens,
    partial(print_line, open_console(lost=lambda: None)),  # the page is written even if nobody listens
  )


if __name__ == '__main__':
  define_flags()
  cli.run(main, __doc__, with_config=False, with_arguments=True)
