"""Chooses the compute of a trained model: python -m mor_jax.calibrate --checkpoint=RUN --capacities=1.0,0.3

Finds the thresholds with which causal routing takes these shares of the tokens at each recursion, stores
them in RUN/calibrations.json, and compares the validation loss with that of the capacities trained with.
"""

import jax
from absl import flags
from rich.table import Table

from mor_jax import cli
from mor_jax.console import open_console
from mor_jax.data import loader, schedule
from mor_jax.evaluation import calibration as calibration_lib
from mor_jax.evaluation import nll
from mor_jax.model import flops
from mor_jax.model.transformer import Transformer
from mor_jax.parallel import mesh as mesh_lib
from mor_jax.runs.restore import load_run

FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines the flags of this command."""
  cli.define_checkpoint()
  flags.DEFINE_list('capacities', None, 'fraction of the tokens that shall enter each recursion, not rising')
  flags.DEFINE_integer('rows', 256, 'rows of the train split to calibrate on')
  flags.DEFINE_integer('eval_rows', 256, 'rows of the validation split to compare on')


def main() -> None:
  """Calibrates, stores and compares. Raises ConfigError for flags that cannot work."""
  console = open_console()
  cli.require('checkpoint', 'capacities')
  capacities = cli.numbers('capacities')
  cli.check_least(rows=1, eval_rows=1)
  run = load_run(FLAGS.checkpoint)
  wanted = calibration_lib.check(run.config, capacities)
  dataset = loader.open_dataset(run.config.data, report=console.print)
  mesh = mesh_lib.make_mesh()

  rows_at_once = 8 * len(jax.devices())
  first = run.rows_read // rows_at_once  # rows not trained on yet
  batches = loader.train_batches(dataset, run.config.data, schedule.constant(rows_at_once), start_step=first)
  batches = calibration_lib.take(batches, FLAGS.rows)
  thresholds, rows = calibration_lib.calibrate(wanted, run.variables, batches, mesh)
  calibration = calibration_lib.Calibration(wanted.model.step_capacities, thresholds, run.step, rows)
  calibration_lib.store(run.folder.calibrations, calibration)

  columns = [
    _column(config, variables, shown, dataset, mesh)
    for config, variables, shown in (
      (run.config, run.variables, _trained_thresholds(run)),
      (*calibration_lib.apply(run.config, run.variables, calibration), thresholds),
    )
  ]
  table = Table('', 'as trained', 'calibrated')
  for label in columns[0]:
    table.add_row(label, *(column[label] for column in columns))
  console.print(table)
  console.print(f'stored in {run.folder.calibrations}', soft_wrap=True)


def _trained_thresholds(run) -> list[float]:
  stored = run.variables.get('routing', {}).get('threshold')
  return [0.0] * run.config.model.num_recursions if stored is None else stored.tolist()


def _column(config, variables, thresholds, dataset, mesh) -> dict[str, str]:
  """What threshold routing costs and reaches with a config's capacities, beside top-k routing."""
  model, length = config.model, config.data.seq_len
  rows_at_once = 8 * len(jax.devices())
  topk, threshold = (
    nll.evaluate(
      nll.make_nll_step(Transformer(model), config, mesh, routing),
      variables,
      loader.validation_batches(dataset, rows_at_once, FLAGS.eval_rows),
      mesh,
    )
    for routing in ('topk', 'threshold')
  )
  share = flops.forward_flops_per_token(model, length)
  share /= flops.forward_flops_per_token(flops.vanilla_of(model), length)
  return {
    'capacities': ' '.join(f'{capacity:.3f}' for capacity in model.step_capacities),
    'thresholds': ' '.join(f'{value:.2f}' for value in thresholds),
    'FLOPs, share of vanilla': f'{share:.0%}',
    'loss, top-k routing': f'{topk["nll"]:.4f}',
    'loss, threshold routing': f'{threshold["nll"]:.4f}',
    'gap': f'{threshold["nll"] - topk["nll"]:+.4f}',
    'mean depth, top-k': f'{topk["mean_depth"]:.2f}',
    'mean depth, threshold': f'{threshold["mean_depth"]:.2f}',
    'tokens without a place': f'{threshold["overflow_ratio"]:.1%}',
  }


if __name__ == '__main__':
  define_flags()
  cli.run(main, __doc__, with_config=False)
