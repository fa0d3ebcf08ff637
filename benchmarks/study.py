"""The small-scale study: python -m benchmarks.study --source='files:CORPUS/**/*.txt' [--workdir=runs/study] [--parallel=2]

Compares vanilla, recursive and MoR models (configs/study.py, two and three recursions) at equal FLOPs and at
equal tokens. The learning rate of each model is tuned over at least four values. The range is extended until the
best value lies inside it. Further seeds then train at the best value. MoR also trains with the EMA threshold
instead of the auxiliary loss. MoR losses are measured under top-k and under threshold routing. If interrupted,
the same command resumes. Writes benchmarks/results/study.* and plots.

With --steps=500 there are about 50 runs of 70 to 120 seconds each, two at a time on two otherwise idle cores.
"""

import collections
import dataclasses
import statistics
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console

from benchmarks import results, trained
from mor_jax import cli
from mor_jax.config import ConfigError
from mor_jax.model import flops
from mor_jax.sweeping import plan as plan_lib
from mor_jax.sweeping import results as tables
from mor_jax.sweeping.plan import Plan, PlannedRun

FLAGS = flags.FLAGS
flags.DEFINE_string('source', None, 'data.source: English text')
flags.DEFINE_string('workdir', 'runs/study', 'folder of the study')
flags.DEFINE_integer('parallel', 2, 'runs at a time')
flags.DEFINE_integer('steps', 1000, 'steps of the vanilla model, which set tokens and FLOPs of all')
flags.DEFINE_list('rates', ['2.5e-4', '5e-4', '1e-3', '2e-3'], 'peak learning rates to begin with, rising')
flags.DEFINE_integer('seeds', 3, 'seeds of the final runs')
flags.DEFINE_list('overrides', [], 'further settings of all runs, such as model.d_model=64')

CONFIG = 'configs/study.py:vanilla'
MOST_EXTENSIONS = 4  # of the range of learning rates, to either side
COLUMNS = [
  'model',
  'equal',
  'parameters, M',
  'tokens, M',
  'FLOPs, e12',
  'learning rate',
  'NLL, top-k',
  'NLL, threshold',
  'gap',
  'bits per byte',
  'seeds',
]


@dataclasses.dataclass(frozen=True)
class Model:
  """One row of the study: a kind of model, and the budget it shares with the vanilla model."""

  kind: str
  recursions: int
  equal: str  # 'tokens' or 'flops'; the same thing for vanilla and recursive models
  selection: str = 'top_k'

  @property
  def name(self) -> str:
    """Prefix of the run names, which add learning rate and seed."""
    name = self.kind if self.kind == 'vanilla' else f'{self.kind}_r{self.recursions}'
    ema = '_ema' if self.selection == 'ema_threshold' else ''
    return f'{name}{ema}_{self.equal}' if self.kind == 'mor' else name

  @property
  def title(self) -> str:
    """Name in the table."""
    if self.kind == 'vanilla':
      return 'vanilla'
    ema = ', EMA threshold' if self.selection == 'ema_threshold' else ''
    return f'{"MoR" if self.kind == "mor" else self.kind} R={self.recursions}{ema}'

  @property
  def tuned_as(self) -> 'Model':
    """The model whose tuned learning rate this one uses: itself or, with the EMA threshold, its top-k variant."""
    return dataclasses.replace(self, selection='top_k')


MODELS = (
  Model('vanilla', 1, 'tokens'),
  *(Model('recursive', recursions, 'tokens') for recursions in (2, 3)),
  *(Model('mor', recursions, equal) for equal in ('flops', 'tokens') for recursions in (2, 3)),
  *(Model('mor', recursions, 'flops', 'ema_threshold') for recursions in (2, 3)),
)
TUNED = tuple(model for model in MODELS if model == model.tuned_as)


class Study:
  """All runs requested so far, and how to train more."""

  def __init__(self, console: Console, settings: dict[str, Any]):
    self._console, self._settings = console, settings
    self.runs: dict[tuple[Model, float, int], PlannedRun] = {}

  def train(self, wanted: list[tuple[Model, float, int]]) -> None:
    """Trains (model, learning rate, seed) runs that have not finished yet.

    Raises:
      RunError: a run failed, or a signal stopped it.
    """
    keys = list(dict.fromkeys([*self.runs, *wanted]))
    made = self._plan(keys)
    self.runs = dict(zip(keys, made.runs, strict=True))
    tables.write(made, trained.train(made, self._console, FLAGS.parallel).status)

  def _plan(self, keys: list[tuple[Model, float, int]]) -> Plan:
    base = cli.load_config(CONFIG, self._settings)
    tokens = base.train.steps * base.train.global_batch * base.data.seq_len
    budget = tokens * flops.paper_flops_per_token(base.model, base.data.seq_len)
    entries = []
    for model, rate, seed in keys:
      overrides = {'model.kind': model.kind, 'model.num_recursions': max(2, model.recursions)}
      if model.selection == 'ema_threshold':  # in place of what else teaches routers to do without the future
        overrides |= {'model.selection': model.selection, 'model.causality': 'none'}
      overrides |= {'train.learning_rate': rate}
      overrides |= {'train.seed': seed, 'data.seed': seed}
      if model.equal == 'flops':
        overrides['train.flops_budget'] = budget
      entries.append({'name': f'{model.name},rate={rate:g},seed={seed}', **overrides})
    return plan_lib.make(CONFIG, self._settings, entries, 'benchmarks.study', Path(FLAGS.workdir))

  def loss(self, model: Model, rate: float, seed: int = 0) -> float:
    """Validation NLL under top-k routing."""
    return self.runs[model, rate, seed].folder.read_summary()['validation/nll']

  def rates(self, model: Model) -> list[float]:
    """Learning rates with which the model was trained, ascending."""
    return sorted({rate for trained, rate, _ in self.runs if trained == model})

  def best_rate(self, model: Model) -> float:
    """The learning rate with the lowest loss at seed 0."""
    return min(self.rates(model), key=lambda rate: self.loss(model, rate))

  def missing_rates(self, model: Model) -> list[float]:
    """The next learning rate beyond the best one, if the best is at an end of the range."""
    rates, best = self.rates(model), self.best_rate(model)
    return [best / 2] * (best == rates[0]) + [best * 2] * (best == rates[-1])


def main() -> None:
  """Trains the missing runs, evaluates them, and writes tables and plots."""
  rates = _check_flags()
  settings = {'data.source': FLAGS.source, 'train.steps': FLAGS.steps}
  for entry in FLAGS.overrides:
    name, _, text = entry.partition('=')
    settings[name] = cli.parse_setting(name, text)
  study = Study(Console(), settings)
  study.train([(model, rate, 0) for model in TUNED for rate in rates])
  for _ in range(MOST_EXTENSIONS):
    wanted = [(model, rate, 0) for model in TUNED for rate in study.missing_rates(model)]
    if not wanted:
      break
    study.train(wanted)
  best = {model: study.best_rate(model.tuned_as) for model in MODELS}
  final = [(model, rate, seed) for seed in range(FLAGS.seeds) for model, rate in best.items()]
  study.train(final)
  wanted = [trained.Measurement(study.runs[key]) for key in final]
  evaluated = dict(zip(final, trained.measure_all(wanted, FLAGS.parallel, Console()), strict=True))
  print(_keep(study, best, evaluated))
  _plot(study)


def _check_flags() -> list[float]:
  if not FLAGS.source:
    raise ConfigError("--source is missing, for example --source='files:corpus/**/*.txt'")
  rates = [float(rate) for rate in FLAGS.rates]
  if len(rates) < 4 or rates != sorted(set(rates)):
    raise ConfigError(f'--rates={",".join(FLAGS.rates)} must be at least four, rising')
  for name in ('seeds', 'steps', 'parallel'):
    if FLAGS[name].value < 1:
      raise ConfigError(f'--{name}={FLAGS[name].value} is not allowed: must be >= 1')
  return rates


def _keep(study: Study, best: dict[Model, float], evaluated: dict[tuple, dict[str, Any]]) -> str:
  """Writes the table: means and standard deviations over seeds."""
  losses = collections.defaultdict(lambda: collections.defaultdict(list))
  for (model, _, _), result in evaluated.items():
    modes = result['routing']
    top_k = modes.get('none') or modes['topk']
    losses[model]['top_k'].append(top_k['nll'])
    losses[model]['bits_per_byte'].append(top_k['bits_per_byte'])
    if 'threshold' in modes:
      losses[model]['threshold'].append(modes['threshold']['nll'])
      losses[model]['gap'].append(result['gap']['nll'])
  rows = []
  for model, rate in best.items():
    run = study.runs[model, rate, 0]
    summary, found = run.folder.read_summary(), losses[model]
    equal = 'FLOPs' if model.equal == 'flops' else 'tokens' if model.kind == 'mor' else 'both'
    rows.append(
      [
        model.title,
        equal,
        round(summary['parameters'] / 1e6, 2),
        round(run.tokens / 1e6, 2),
        round(run.work / 1e12, 2),
        f'{rate:g}',
        *(_spread(found[name]) for name in ('top_k', 'threshold', 'gap', 'bits_per_byte')),
        len(found['top_k']),
      ]
    )
  inside = {model.name: not study.missing_rates(model) for model in TUNED}
  about = {
    'losses': 'nats per token on the validation split; mean ± sample standard deviation over seeds',
    'FLOPs': 'forward, as the paper counts them',
    'learning rates': f'tuned on seed 0; best one inside its range: {inside}',
    'EMA threshold': 'in place of the auxiliary loss, at the learning rate tuned with it',
    'steps of the vanilla model': FLAGS.steps,
  }
  tuned = {
    model.name: {f'{rate:g}': study.loss(model, rate) for rate in study.rates(model)} for model in TUNED
  }
  return results.keep('study', COLUMNS, rows, about, tuned=tuned)


def _spread(values: list[float]) -> str:
  if not values:
    return '-'
  mean = f'{statistics.fmean(values):.4f}'
  return mean if len(values) < 2 else f'{mean} ± {statistics.stdev(values):.4f}'


def _plot(study: Study) -> None:
  """Plots the loss by learning rate and, at the best rate, by tokens and FLOPs: benchmarks/results/study_*.png."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  from mor_jax.reporting import plots, runs

  results.FOLDER.mkdir(exist_ok=True)
  with plt.rc_context(plots.STYLE):
    figure, ax = plt.subplots(figsize=(7.4, 4))
    for index, model in enumerate(TUNED):
      rates = study.rates(model)
      colour = plots.colour_of(index, len(TUNED))
      losses = [study.loss(model, rate) for rate in rates]
      ax.plot(rates, losses, marker='o', color=colour, label=model.name.replace('_', ' '))
    ax.set_xscale('log', base=2)
    ax.set_xlabel('peak learning rate')
    ax.set_ylabel('validation NLL, nats per token')
    ax.legend()
    figure.savefig(results.FOLDER / 'study_rates.png', dpi=150)
    plt.close(figure)
  best = [study.runs[model, study.best_rate(model.tuned_as), 0] for model in MODELS]
  shown = runs.read([str(run.folder.path) for run in best])
  for axis in ('tokens', 'flops'):
    figure = plots.curves(shown, lambda run: run.curve('validation/nll'), axis, 'nats per token')
    figure.savefig(results.FOLDER / f'study_loss_by_{axis}.png', dpi=150)


if __name__ == '__main__':
  cli.run(main, __doc__, with_config=False)
