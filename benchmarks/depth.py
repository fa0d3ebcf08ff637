"""The depth study: python -m benchmarks.depth [--parts=shown,hidden,chains] [--workdir=runs/depth] [--seeds=5]

A positive control for depth routers: tasks whose tokens need a known number of recursions (configs/depth.py). All
contenders train on the same tokens, and those that compute more or less per token also on the FLOPs of the router that
learns the benefit (forward, as the paper counts, its labels included). Rates are tuned for each contender on seed 0. Every
final run is evaluated under top-k and threshold routing, by difficulty and recursion limit; some also with depths chosen
otherwise. Each part writes benchmarks/results/depth_PART.* and a plot of depth against difficulty.

Interrupted, the same command goes on; --only=benefit,random trains some contenders alone. A run takes one to
four minutes on two cores, a part with five seeds and three rates about 110 runs.
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
from mor_jax.sweeping import plan as plan_lib
from mor_jax.sweeping.plan import Plan, PlannedRun
from mor_jax.training import budget

FLAGS = flags.FLAGS

CONFIG = 'configs/depth.py:benefit'
COLUMNS = [
  'contender',
  'equal',
  'steps',
  'FLOPs, e9',
  'rate',
  'accuracy',
  'by difficulty',
  'depth by difficulty',
  'rank correlation',
  'threshold',
  'seeds',
]
MOR = {'model.router_target': 'gate'}
CHOOSES = {'model.gating': 'residual', 'model.kv': 'shared', 'model.random_gate': 1.0}


@dataclasses.dataclass(frozen=True)
class Contender:
  """A row of the study.

  Attributes:
    overrides: settings in which it differs from the router that learns the benefit.
    equal: 'tokens', or 'flops' where it gets as many FLOPs as that router instead.
    routers: other ways of choosing depths that its weights are evaluated with.
    is_ablation: trained with fewer seeds.
  """

  name: str
  title: str
  overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
  equal: str = 'tokens'
  routers: tuple[str, ...] = ()
  is_ablation: bool = False


def contenders(hops: int) -> list[Contender]:
  """All of them, for a task of at most so many steps."""
  everything = (1.0,) * hops
  recursive = {**MOR, 'model.kind': 'recursive', 'model.kv': 'shared', 'model.capacities': None}
  vanilla = {**MOR, 'model.kind': 'vanilla', 'model.capacities': None}
  random = {**MOR, **CHOOSES, 'model.random_router': True, 'model.causality': 'none'}
  one = {
    **MOR,
    'model.kind': 'recursive',
    'model.num_recursions': 1,
    'model.num_layers': 1,
    'model.capacities': None,
  }
  return [
    Contender('benefit', 'MoR, benefit', routers=('random', 'oracle')),
    Contender('gate', 'MoR as shipped', MOR),
    Contender('random', 'MoR, random choice, gate 1', random, routers=('oracle',)),
    Contender('recursive', 'recursive', recursive, routers=('confidence', 'oracle')),
    Contender('recursive_flops', 'recursive', recursive, equal='flops', routers=('confidence',)),
    Contender('vanilla', f'vanilla, {hops} layers', vanilla),
    Contender('vanilla_flops', f'vanilla, {hops} layers', vanilla, equal='flops'),
    Contender(
      'shallow_flops',
      f'vanilla, {max(1, hops // 2)} layers',
      {**vanilla, 'model.num_layers': max(1, hops // 2)},
      equal='flops',
    ),
    Contender('one_flops', 'one recursion', one, equal='flops'),
    Contender(
      'benefit_all_rows', 'MoR, benefit, labels on all rows', {'model.benefit_rows': 1.0}, is_ablation=True
    ),
    Contender('benefit_hybrid', 'MoR, benefit, hybrid KV', {'model.kv': 'hybrid'}, is_ablation=True),
    Contender(
      'benefit_recursion_wise',
      'MoR, benefit, recursion-wise KV',
      {'model.kv': 'recursion_wise'},
      is_ablation=True,
    ),
    Contender('benefit_no_noise', 'MoR, benefit, no noise', {'model.router_noise': 0.0}, is_ablation=True),
    Contender(
      'benefit_prior', 'MoR, benefit, depth prior', {'model.depth_prior_weight': 1.0}, is_ablation=True
    ),
    Contender(
      'gate_residual',
      'MoR, gate, residual at strength 1, shared KV',
      {**MOR, 'model.gating': 'residual', 'model.router_alpha': 1.0, 'model.kv': 'shared'},
      is_ablation=True,
    ),
    Contender(
      'readouts',
      'recursive, readouts on a quarter of the rows',
      {**recursive, 'train.readout_rows': 0.25},
      routers=('confidence',),
      is_ablation=True,
    ),
    Contender(
      'growing',
      'recursive, growing',
      {**recursive, 'train.growth': tuple((i + 1) / (2 * hops) for i in range(hops - 1))},
      is_ablation=True,
    ),
    Contender('all', 'MoR, all tokens', {**random, 'model.capacities': everything}, is_ablation=True),
  ]


@dataclasses.dataclass(frozen=True)
class Part:
  """A task: its settings, and the most steps of its questions."""

  settings: dict[str, Any]
  hops: int


PARTS = {
  'shown': Part({}, 4),
  'hidden': Part(
    {
      'data.source': 'synthetic:chase,nodes=12,hops=4,questions=16,hidden=true',
      'data.seq_len': 33,
      'model.capacities': (1.0, 0.364, 0.243, 0.122),
      'train.steps': 3500,
    },
    4,
  ),
  'chains': Part(
    {
      'data.source': 'synthetic:chains,modulus=7,hops=4',
      'data.seq_len': 48,
      'model.sharing': 'middle_cycle',
      'model.num_layers': 6,
      'model.embed_factor': None,
      'model.capacities': (1.0, 0.5, 0.35, 0.2),
    },
    4,
  ),
}


class Study:
  """The runs of a part requested so far, and how to train more."""

  def __init__(self, console: Console, part: str):
    self._console, self._part, self._name = console, PARTS[part], part
    self.runs: dict[tuple[str, float, int], PlannedRun] = {}
    self._by_name = {one.name: one for one in contenders(self._part.hops)}

  def train(self, wanted: list[tuple[str, float, int]]) -> None:
    """Trains (contender, learning rate, seed) runs that have not finished yet.

    Raises:
      RunError: a run failed, or a signal stopped it.
    """
    keys = list(dict.fromkeys([*self.runs, *wanted]))
    made = self._plan(keys)
    self.runs = dict(zip(keys, made.runs, strict=True))
    trained.train(made, self._console, FLAGS.parallel)

  def _plan(self, keys: list[tuple[str, float, int]]) -> Plan:
    settings = {**self._part.settings}
    if FLAGS.steps:
      settings['train.steps'] = FLAGS.steps
    base = cli.load_config(CONFIG, settings)
    tokens = base.train.steps * base.train.global_batch * base.data.seq_len
    flops = tokens * budget.paper_flops_per_token(base)
    entries = []
    for name, rate, seed in keys:
      contender = self._by_name[name]
      overrides = {**contender.overrides, 'train.learning_rate': rate, 'train.seed': seed, 'data.seed': seed}
      if contender.equal == 'flops':
        overrides['train.flops_budget'] = flops
      if self._part.settings.get('model.sharing') == 'middle_cycle' and 'model.num_layers' in overrides:
        overrides['model.num_layers'] += 2
      entries.append({'name': f'{name},rate={rate:g},seed={seed}', **overrides})
    return plan_lib.make(CONFIG, settings, entries, 'benchmarks.depth', Path(FLAGS.workdir) / self._name)

  @property
  def mean_depth(self) -> float:
    """Recursions of a token in the mean that capacities give."""
    return sum(cli.load_config(CONFIG, self._part.settings).model.step_capacities)

  def loss(self, name: str, rate: float, seed: int = 0) -> float:
    """Validation NLL under top-k routing."""
    return self.runs[name, rate, seed].folder.read_summary()['validation/nll']

  def best_rate(self, name: str) -> float:
    """The learning rate with the lowest loss at seed 0."""
    return min({rate for one, rate, _ in self.runs if one == name}, key=lambda rate: self.loss(name, rate))


def main() -> None:
  """Trains what is missing of every part, evaluates it, and writes its table and plot."""
  rates = [float(rate) for rate in FLAGS.rates]
  for part in FLAGS.parts:
    if part not in PARTS:
      raise ConfigError(f'--parts={part} is not one of {", ".join(PARTS)}')
  for part in FLAGS.parts:
    study = Study(Console(), part)
    known = contenders(PARTS[part].hops)
    chosen = [one for one in known if not FLAGS.only or one.name in FLAGS.only]
    if len(chosen) < len(FLAGS.only or []):
      raise ConfigError(f'--only={",".join(FLAGS.only)} must be of {", ".join(one.name for one in known)}')
    study.train([(one.name, rate, 0) for one in chosen for rate in rates if not one.is_ablation])
    best = {one.name: study.best_rate(one.name) for one in chosen if not one.is_ablation}
    # An ablation is a change of one thing: its rate is that of what it changes.
    best |= {
      one.name: best.get(one.name.partition('_')[0], best.get('recursive', rates[0]))
      for one in chosen
      if one.is_ablation
    }
    final = [
      (one.name, best[one.name], seed)
      for one in chosen
      for seed in range(min(FLAGS.seeds, FLAGS.ablation_seeds) if one.is_ablation else FLAGS.seeds)
    ]
    study.train(final)
    routers = {one.name: one.routers for one in chosen}
    found = {key: _evaluate(study.runs[key], routers[key[0]], study.mean_depth) for key in final}
    print(_keep(part, study, chosen, best, found))


def _evaluate(run: PlannedRun, routers: tuple[str, ...], mean_depth: float) -> dict[str, dict[str, Any]]:
  """Results of every way to run a model, its own and those of other routers, by name."""
  found = dict(trained.evaluate(run, '--batch_size=256')['routing'])
  for router in routers:
    flags = [f'--router={router}', '--batch_size=64']  # confidence is fitted on every second batch
    flags += [f'--mean_depth={mean_depth}'] if router == 'confidence' else []
    found |= trained.evaluate(run, *flags, name=f'evaluation_{router}')['routing']
  return found


def _keep(
  part: str, study: Study, chosen: list[Contender], best: dict[str, float], found: dict[tuple, dict[str, Any]]
) -> str:
  """Writes the table: means over seeds, and their spread."""
  rows, details = [], {}
  for one in chosen:
    runs = [key for key in found if key[0] == one.name]
    first = study.runs[runs[0]]
    modes = collections.defaultdict(list)
    for key in runs:
      for mode, entry in found[key].items():
        modes[mode].append(entry)
    own = 'none' if 'none' in modes else 'topk'
    details[one.name] = {mode: [_figures(entry) for entry in entries] for mode, entries in modes.items()}
    for mode, entries in modes.items():
      if mode == 'threshold':
        continue
      is_own = mode == own
      rows.append(
        [
          one.title if is_own else f'  the same weights, {mode}',
          'FLOPs' if one.equal == 'flops' else 'tokens',
          first.config.train.steps,
          round(first.work / 1e9, 1),
          f'{best[one.name]:g}',
          _spread([entry['accuracy'] for entry in entries]),
          _each(entries, 'accuracy'),
          _each(entries, 'mean_depth'),
          _spread([entry['rank_correlation'] for entry in entries if entry['rank_correlation'] is not None]),
          _spread([entry['accuracy'] for entry in modes['threshold']])
          if is_own and 'threshold' in modes
          else '',
          len(entries),
        ]
      )
  about = {
    'part': part,
    'settings': PARTS[part].settings,
    'accuracy': 'of the scored tokens of 256 validation rows, top-k routing where there is a router; mean ± sample '
    'standard deviation over seeds, smallest and largest',
    'rates': f'tuned on seed 0 over {", ".join(FLAGS.rates)}; ablations take the rate of what they change',
    'FLOPs': 'forward, as the paper counts, labels included',
  }
  _plot(part, details)
  return results.keep(f'depth_{part}', COLUMNS, rows, about, details=details)


def _figures(entry: dict[str, Any]) -> dict[str, Any]:
  names = ('accuracy', 'nll', 'rank_correlation', 'mean_depth', 'by_difficulty', 'recursion_limits')
  return {name: entry[name] for name in names if name in entry}


def _spread(values: list[float]) -> str:
  if not values:
    return '-'
  mean = f'{statistics.fmean(values):.3f}'
  if len(values) < 2:
    return mean
  return f'{mean} ± {statistics.stdev(values):.3f} ({min(values):.3f} to {max(values):.3f})'


def _each(entries: list[dict[str, Any]], name: str) -> str:
  by_difficulty = zip(*(entry['by_difficulty'] for entry in entries), strict=True)
  return ', '.join(f'{statistics.fmean(one[name] for one in same):.2f}' for same in by_difficulty)


def _plot(part: str, details: dict[str, Any]) -> None:
  """Accuracy and depth against difficulty: benchmarks/results/depth_PART.png."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  from mor_jax.reporting import plots

  shown = [name for name in ('benefit', 'gate', 'random', 'recursive', 'vanilla') if name in details]
  with plt.rc_context(plots.STYLE):
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharex=True)
    for index, name in enumerate(shown):
      modes = details[name]
      entries = modes.get('none') or modes['topk']
      for ax, value in zip(axes, ('accuracy', 'mean_depth'), strict=True):
        levels = [[one['difficulty'], one[value]] for entry in entries for one in entry['by_difficulty']]
        means = {k: statistics.fmean(v for level, v in levels if level == k) for k, _ in levels}
        ax.plot(
          list(means), list(means.values()), marker='o', color=plots.colour_of(index, len(shown)), label=name
        )
    axes[0].set_ylabel('accuracy')
    axes[1].set_ylabel('mean recursions')
    for ax in axes:
      ax.set_xlabel('difficulty: steps that a question needs')
    axes[0].legend()
    results.FOLDER.mkdir(exist_ok=True)
    figure.savefig(results.FOLDER / f'depth_{part}.png', dpi=150)
    plt.close(figure)


if __name__ == '__main__':
  flags.DEFINE_list('parts', list(PARTS), 'tasks')
  flags.DEFINE_list('only', [], 'contenders; none given: all')
  flags.DEFINE_string('workdir', 'runs/depth', 'folder of the study')
  flags.DEFINE_integer('parallel', 2, 'runs at a time')
  flags.DEFINE_integer(
    'steps', None, 'steps of the router that learns the benefit; default: as the part says'
  )
  flags.DEFINE_list('rates', ['1.5e-3', '3e-3', '6e-3'], 'peak learning rates')
  flags.DEFINE_integer('seeds', 5, 'seeds')
  flags.DEFINE_integer('ablation_seeds', 2, 'seeds of ablations')
  cli.run(main, __doc__, with_config=False)
