"""Flags of commands that can quantise the weights of a run before they use it."""

from collections.abc import Callable

from absl import flags
from jax.sharding import Mesh

from mor_jax.config import ConfigError
from mor_jax.runs.restore import LoadedRun

FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # what is defined here is a flag of the command that calls for it
KINDS = ('int8', 'int4')


def define_flags() -> None:
  """Defines --weights and what goes with it."""
  flags.DEFINE_enum(
    'weights', None, KINDS, 'keep kernels in 8 or 4 bits, embedding and head in 8; default: as they are'
  )
  flags.DEFINE_string(
    'weights_data',
    None,
    '--weights: text to choose scales on, as in data.source, or folder of a prepared dataset; default: the training '
    'split of the run',
  )
  flags.DEFINE_integer(
    'weights_rows', None, '--weights: rows of it to use, 0: scales of the largest values; default: 64'
  )


def check_flags() -> None:
  """Raises ConfigError for flags that need --weights."""
  for name in ('weights_data', 'weights_rows'):
    if FLAGS[name].value is not None and FLAGS.weights is None:
      raise ConfigError(f'--{name}={FLAGS[name].value} is for --weights, which is not given')
  if FLAGS.weights_rows is not None and FLAGS.weights_rows < 0:
    raise ConfigError(f'--weights_rows={FLAGS.weights_rows} is not allowed: must be >= 0')
  if FLAGS.weights_rows == 0 and FLAGS.weights_data is not None:
    raise ConfigError(
      f'--weights_rows=0 uses no rows of --weights_data={FLAGS.weights_data}; leave one of them out'
    )


def quantised(
  run: LoadedRun, mesh: Mesh, max_recursions: int | None, report: Callable[[str], None]
) -> LoadedRun:
  """The run with weights as --weights says. Raises ConfigError where that is not possible."""
  if FLAGS.weights is None:
    return run
  try:
    import qwix  # noqa: F401
  except ImportError:
    raise ConfigError(f"--weights={FLAGS.weights} needs qwix: pip install 'mor_jax[quantise]'") from None
  from mor_jax.quantisation import weights

  rows = weights.ROWS if FLAGS.weights_rows is None else FLAGS.weights_rows
  return weights.quantise_run(run, FLAGS.weights, mesh, FLAGS.weights_data, rows, max_recursions, report)
