"""Tables and plots of the depth study (`benchmarks/depth.py`): means over seeds, and their spread."""

import collections
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks import results
from benchmarks.depth_parts import Contender, Part
from mor_jax.sweeping.plan import PlannedRun

ON_TASKS = (
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
  'decoded',
  'cut after 1, 2, ...',
  'seeds',
)
ON_TEXT = (
  'contender',
  'equal',
  'parameters, k',
  'tokens, M',
  'FLOPs, e12',
  'rate',
  'NLL',
  'threshold',
  'mean depth',
  'cut after 1, 2, ...',
  'seeds',
)
FIGURES = (
  'accuracy',
  'nll',
  'rank_correlation',
  'mean_depth',
  'by_difficulty',
)
PARTS_OF_LIMITS = ('nll', 'accuracy')

Modes = Mapping[str, dict[str, Any]]
"""What one run gave, by the way its depths were chosen (`held_out.evaluate`)."""


def keep(
  name: str,
  part: Part,
  chosen: Sequence[Contender],
  runs: Mapping[str, PlannedRun],
  found: Mapping[str, Sequence[Modes]],
  decoded: Mapping[str, Sequence[dict[str, float]]],
  about: dict[str, Any],
  tuned: Mapping[str, Mapping[str, float]],
) -> str:
  """Writes benchmarks/results/depth_NAME.* and returns the table.

  Args:
    runs: one run of each contender, for its settings.
    found: what the final runs of each contender gave, one entry a seed.
    decoded: what the engine gave (`depth_decoding`), where it was asked.
    about: how it was measured.
    tuned: loss by contender and learning rate.
  """
  rows, details = [], {}
  for one in chosen:
    modes = collections.defaultdict(list)
    for entry in found[one.name]:
      for mode, figures in entry.items():
        modes[mode].append(figures)
    own = 'none' if 'none' in modes else 'topk'
    details[one.name] = {mode: [_figures(entry) for entry in entries] for mode, entries in modes.items()}
    details[one.name]['decoded'] = list(decoded.get(one.name, ()))
    for mode, entries in modes.items():
      if mode != 'threshold':
        title = one.title if mode == own else f'  the same weights, {mode}'
        other = modes.get('threshold', []) if mode == own else []
        row = _on_task if part.is_task else _on_text
        rows.append(
          row(one, title, runs[one.name], entries, other, decoded.get(one.name, ()) if mode == own else ())
        )
  columns = ON_TASKS if part.is_task else ON_TEXT
  if part.is_task:
    _plot(name, details)
  return results.keep(f'depth_{name}', columns, rows, about, tuned=tuned, details=details)


def _on_task(one, title, run, entries, threshold, decoded) -> list[Any]:
  return [
    title,
    'FLOPs' if one.equal == 'flops' else 'tokens',
    run.config.train.steps,
    round(run.work / 1e9, 1),
    f'{run.config.train.learning_rate:g}',
    spread(_of(entries, 'accuracy')),
    _each(entries, 'by_difficulty', 'accuracy'),
    _each(entries, 'by_difficulty', 'mean_depth'),
    spread(_of(entries, 'rank_correlation')),
    spread(_of(threshold, 'accuracy')),
    spread([entry['accuracy'] for entry in decoded]),
    _each(entries, 'recursion_limits', 'accuracy'),
    len(entries),
  ]


def _on_text(one, title, run, entries, threshold, _) -> list[Any]:
  return [
    title,
    'FLOPs' if one.equal == 'flops' else 'tokens',
    round(run.folder.read_summary()['parameters'] / 1e3),
    round(run.tokens / 1e6, 2),
    round(run.work / 1e12, 2),
    f'{run.config.train.learning_rate:g}',
    spread(_of(entries, 'nll')),
    spread(_of(threshold, 'nll')),
    spread(_of(entries, 'mean_depth')),
    _each(entries, 'recursion_limits', 'nll', 4),
    len(entries),
  ]


def _of(entries: Iterable[dict[str, Any]], name: str) -> list[float]:
  return [entry[name] for entry in entries if entry.get(name) is not None]


def _figures(entry: dict[str, Any]) -> dict[str, Any]:
  kept = {name: entry[name] for name in FIGURES if name in entry}
  kept['recursion_limits'] = [
    {name: limit[name] for name in ('max_recursions', *PARTS_OF_LIMITS) if name in limit}
    for limit in entry['recursion_limits']
  ]
  return kept


def spread(values: Sequence[float]) -> str:
  """Mean ± sample standard deviation, smallest and largest."""
  if not values:
    return '-'
  mean = f'{statistics.fmean(values):.3f}'
  if len(values) < 2:
    return mean
  return f'{mean} ± {statistics.stdev(values):.3f} ({min(values):.3f} to {max(values):.3f})'


def _each(entries: Sequence[dict[str, Any]], levels: str, name: str, digits: int = 2) -> str:
  """A figure of every level (difficulty, recursion limit), means over seeds."""
  alike = zip(*(entry.get(levels, ()) for entry in entries), strict=True)
  return ', '.join(f'{statistics.fmean(one[name] for one in same):.{digits}f}' for same in alike)


def _plot(part: str, details: dict[str, Any]) -> None:
  """Accuracy and depth against difficulty: benchmarks/results/depth_PART.png."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  from mor_jax.reporting import plots

  shown = [
    name for name in ('benefit', 'gate', 'random', 'recursive_flops', 'vanilla_flops') if name in details
  ]
  with plt.rc_context(plots.STYLE):
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharex=True)
    for index, name in enumerate(shown):
      modes = details[name]
      entries = modes.get('none') or modes['topk']
      colour = plots.colour_of(index, len(shown))
      for ax, value in zip(axes, ('accuracy', 'mean_depth'), strict=True):
        levels = [entry['by_difficulty'] for entry in entries]
        difficulty = [one['difficulty'] for one in levels[0]]
        means = [statistics.fmean(one[value] for one in same) for same in zip(*levels, strict=True)]
        ax.plot(difficulty, means, marker='o', color=colour, label=name.replace('_flops', ', equal FLOPs'))
        for seed in levels:
          ax.plot(difficulty, [one[value] for one in seed], color=colour, alpha=0.25, linewidth=0.8)
    axes[0].set_ylabel('accuracy')
    axes[1].set_ylabel('mean recursions')
    for ax in axes:
      ax.set_xlabel('difficulty: steps that a question needs')
    axes[0].legend()
    results.FOLDER.mkdir(exist_ok=True)
    figure.savefig(results.FOLDER / f'depth_{part}.png', dpi=150)
    plt.close(figure)
