"""The depth study: python -m benchmarks.depth [--parts=shown,hidden,automaton,init,text] [--workdir=runs/depth]

A positive control for depth routers: tasks whose tokens need a known number of recursions (configs/depth.py), and the
same contenders on prose (`--source`), for which nobody knows it. All train on the same tokens, some also on the same
FLOPs (forward, as the paper counts, labels included). Rates are tuned for each contender on seed 0. Every final run
is evaluated under top-k and threshold routing, by difficulty and recursion limit; some also with depths chosen
otherwise, and by the engine, token by token. Each part writes benchmarks/results/depth_PART.*, tasks also a plot.

`init` compares initial weights on short runs, for `text`. Interrupted, the same command goes on; --only=benefit,random
trains some contenders alone. A run takes one to two minutes on two cores, two at a time; with all seeds and rates `shown`
has about 80 runs, the other tasks 50, `text` 45.
"""

import collections
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console

from benchmarks import depth_tables, trained
from benchmarks.depth_parts import PARTS, Contender
from mor_jax import cli
from mor_jax.config import ConfigError
from mor_jax.sweeping import plan as plan_lib
from mor_jax.sweeping.plan import Plan, PlannedRun
from mor_jax.training import budget

FLAGS = flags.FLAGS
flags.DEFINE_list('parts', ['shown', 'hidden', 'automaton'], f'of {", ".join(PARTS)}')
flags.DEFINE_list('only', [], 'contenders; none given: all')
flags.DEFINE_string('source', None, 'data.source of init and text: English prose')
flags.DEFINE_string('workdir', 'runs/depth', 'folder of the study')
flags.DEFINE_integer('parallel', 2, 'runs at a time')
flags.DEFINE_integer('steps', None, 'steps of the model that says what is equal; default: as the part says')
flags.DEFINE_list('rates', ['1.5e-3', '3e-3', '6e-3'], 'peak learning rates')
flags.DEFINE_integer('seeds', None, 'seeds; default: as the part says')
flags.DEFINE_integer('ablation_seeds', 2, 'seeds of ablations')

Key = tuple[str, float, int]
"""Contender, learning rate, seed."""


class Study:
  """The runs of a part requested so far, and how to train more."""

  def __init__(self, console: Console, name: str):
    self._console, self._name, self.part = console, name, PARTS[name]
    self.runs: dict[Key, PlannedRun] = {}
    self._by_name = {one.name: one for one in self.part.contenders}

  def train(self, wanted: list[Key]) -> None:
    """Trains runs that have not finished yet.

    Raises:
      RunError: a run failed, or a signal stopped it.
    """
    keys = list(dict.fromkeys([*self.runs, *wanted]))
    made = self._plan(keys)
    self.runs = dict(zip(keys, made.runs, strict=True))
    trained.train(made, self._console, FLAGS.parallel)

  def _plan(self, keys: list[Key]) -> Plan:
    part = self.part
    settings = dict(part.settings)
    if FLAGS.steps:
      settings['train.steps'] = FLAGS.steps
    if not part.is_task:
      settings['data.source'] = FLAGS.source
    base = cli.load_config(part.config, settings)
    tokens = base.train.steps * base.train.global_batch * base.data.seq_len
    flops = tokens * budget.paper_flops_per_token(base)
    entries = []
    for name, rate, seed in keys:
      contender = self._by_name[name]
      overrides = {**settings, **contender.overrides, 'train.learning_rate': rate}
      overrides |= {'train.seed': seed, 'data.seed': seed}
      if contender.equal == 'flops':
        overrides['train.flops_budget'] = flops
      entries.append({'name': f'{name},rate={rate:g},seed={seed}', **overrides})
    return plan_lib.make(part.config, {}, entries, 'benchmarks.depth', Path(FLAGS.workdir) / self._name)

  def loss(self, name: str, rate: float, seed: int = 0) -> float:
    """Validation NLL under top-k routing."""
    return self.runs[name, rate, seed].folder.read_summary()['validation/nll']

  def best_rate(self, contender: Contender) -> float:
    """The learning rate with the lowest loss at seed 0, of the contender or of the one it is tuned as."""
    name = contender.tuned_as or contender.name
    rates = {rate for one, rate, seed in self.runs if one == name and seed == 0}
    return min(rates, key=lambda rate: self.loss(name, rate))

  def tuned(self) -> dict[str, dict[str, float]]:
    """Validation NLL of seed 0 by contender and rate."""
    found: dict[str, dict[str, float]] = collections.defaultdict(dict)
    for name, rate, seed in self.runs:
      if seed == 0:
        found[name][f'{rate:g}'] = self.loss(name, rate)
    return dict(found)


def main() -> None:
  """Trains what is missing of every part, evaluates it, and writes its table and plot."""
  for name in FLAGS.parts:
    if name not in PARTS:
      raise ConfigError(f'--parts={name} is not one of {", ".join(PARTS)}')
    if not PARTS[name].is_task and not FLAGS.source:
      raise ConfigError(f"--source is missing, which --parts={name} needs: --source='files:corpus/**/*.txt'")
    PARTS[name].chosen(FLAGS.only)
  for name in FLAGS.parts:
    _run(Study(Console(), name), name)


def _run(study: Study, name: str) -> None:
  part = study.part
  chosen = part.chosen(FLAGS.only)
  rates = [float(rate) for rate in FLAGS.rates]
  tuned = {one.tuned_as or one.name for one in chosen}
  study.train([(one, rate, 0) for one in tuned for rate in rates])
  seeds = FLAGS.seeds or part.seeds
  final = {
    one.name: [
      (one.name, study.best_rate(one), seed)
      for seed in range(min(seeds, FLAGS.ablation_seeds) if one.is_ablation else seeds)
    ]
    for one in chosen
  }
  study.train([key for keys in final.values() for key in keys])
  wanted = [
    (one.name, key, item)
    for one in chosen
    for key in final[one.name]
    for item in _measurements(study, one, study.runs[key])
  ]
  results = trained.measure_all([item for *_, item in wanted], FLAGS.parallel, Console())
  modes: dict[str, dict[Key, dict[str, Any]]] = {one.name: {} for one in chosen}
  decoded: dict[str, list[Any]] = {one.name: [] for one in chosen}
  for (of, key, item), result in zip(wanted, results, strict=True):
    if item.name == 'decoding':
      decoded[of].append(result)
    else:
      modes[of].setdefault(key, {}).update(result['routing'])
  found = {of: list(by_key.values()) for of, by_key in modes.items()}
  about = {
    'part': name,
    'settings': f'{part.config} with {part.settings}',
    'figures': 'of the validation rows, top-k routing where there is a router; mean ± sample standard deviation over '
    'seeds, smallest and largest; confidence: fitted for each half of the rows on the other',
    'rates': f'tuned on seed 0 over {", ".join(FLAGS.rates)}; ablations take the rate of what they change',
    'FLOPs': 'forward, as the paper counts, labels included',
  }
  runs = {one.name: study.runs[final[one.name][0]] for one in chosen}
  print(depth_tables.keep(name, part, chosen, runs, found, decoded, about, study.tuned()))


def _measurements(study: Study, one: Contender, run: PlannedRun) -> list[trained.Measurement]:
  """What is found out of a final run: as it is, with other routers, and decoded."""
  wanted = [trained.Measurement(run, flags=('--batch_size=64',))]
  for router in one.routers:
    flags = [f'--router={router}', '--batch_size=64']  # confidence is fitted on every second batch
    if router == 'confidence':
      flags.append(f'--mean_depth={study.part.mean_depth}')
    wanted.append(trained.Measurement(run, f'evaluation_{router}', tuple(flags)))
  if study.part.is_task and one.name in ('benefit', 'gate'):
    wanted.append(trained.Measurement(run, 'decoding', command='benchmarks.depth_decoding'))
  return wanted


if __name__ == '__main__':
  cli.run(main, __doc__, with_config=False)
