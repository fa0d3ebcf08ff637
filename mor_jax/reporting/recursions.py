"""The section of a report on what recursions are worth, from results of `mor_jax.evaluate`, with its plots."""

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from mor_jax.reporting import page, plots
from mor_jax.reporting.runs import Run
from mor_jax.reporting.sections import Plots

CONTROLS = ('prefix', 'repeat', 'suffix')


def section(runs: list[Run], figures: Plots) -> str:
  """Accuracy and depth by difficulty, and for runs evaluated with --exits the recursions one by one; '' without."""
  parts = []
  by_difficulty = [
    (index, run, mode['by_difficulty'])
    for index, run in enumerate(runs)
    if (mode := _mode(run)) and 'by_difficulty' in mode
  ]
  if by_difficulty:
    parts += [
      page.heading('Accuracy and depth by difficulty'),
      figures.add('by_difficulty', _difficulties(by_difficulty, len(runs))),
    ]
  looked_at = [(run, run.evaluation['exits']) for run in runs if run.evaluation and 'exits' in run.evaluation]
  if looked_at:
    panels = {
      run.label: figures.add(f'readouts_{number}', _readouts(exits['readouts']))
      for number, (run, exits) in enumerate(looked_at)
    }
    lead = (
      'Loss of readouts of one forward pass: prefix cuts the model after k recursions; repeat repeats the last update '
      'in place of the missing ones; suffix adds the last k updates alone. Dashed: with a temperature fitted on other '
      'rows.'
    )
    parts += [
      page.heading('Readouts after each recursion'),
      page.paragraph(lead),
      page.tabs('readouts', panels),
    ]
  judged = {
    run.label: figures.add(f'calibration_{number}', _calibration(exits['calibration']))
    for number, (run, exits) in enumerate(looked_at)
    if 'calibration' in exits
  }
  if judged:
    lead = (
      'Share of the tokens that a later exit serves better, against the probability that the router gives to going on; '
      'the area of a point is the number of tokens.'
    )
    parts += [
      page.heading('What routers thought, and what was so'),
      page.paragraph(lead),
      page.tabs('thought', judged),
    ]
    columns = ['run', 'recursion', 'token identity', 'position']
    rows = [
      [run.label, str(entry['recursion']), *(_share(entry[name]) for name in ('token', 'position'))]
      for run, exits in looked_at
      for entry in exits.get('explained', [])
    ]
    parts += [
      page.heading("Share of the variance of routers' scores explained by"),
      page.table(columns, rows),
    ]
  if not parts:
    return ''
  return page.section('What recursions are worth', 'Validation rows (mor_jax.evaluate --exits).', *parts)


def _mode(run: Run) -> dict[str, Any] | None:
  """Results of the causal way to run a model."""
  modes = (run.evaluation or {}).get('routing', {})
  return modes.get('threshold') or modes.get('none')


def _share(value: float | None) -> str:
  return '-' if value is None else f'{value:.1%}'


def _difficulties(entries: list[tuple[int, Run, list[dict[str, Any]]]], count: int) -> Figure:
  with plt.rc_context(plots.STYLE):
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 3.2))
    for index, run, levels in entries:
      x = [level['difficulty'] for level in levels]
      for ax, name in zip(axes, ('accuracy', 'mean_depth'), strict=True):
        y = [level[name] for level in levels]
        ax.plot(x, y, marker='o', color=plots.colour_of(index, count), label=run.label)
    for ax, label in zip(axes, ('accuracy', 'mean recursions'), strict=True):
      ax.set_xlabel('difficulty')
      ax.set_ylabel(label)
      ax.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_ylim(0, 1.03)
    axes[0].legend()
    return figure


def _readouts(entries: list[dict[str, Any]]) -> Figure:
  with plt.rc_context(plots.STYLE):
    figure, ax = plt.subplots(figsize=(9.2, 3.2))
    for control, colour in zip(CONTROLS, plots.COLOURS, strict=False):
      of_it = [entry for entry in entries if entry['control'] == control]
      x = [entry['k'] for entry in of_it]
      ax.plot(x, [entry['nll'] for entry in of_it], marker='o', color=colour, label=f'{control}(k)')
      ax.plot(x, [entry['nll_at_temperature'] for entry in of_it], color=colour, linestyle='--', linewidth=1)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_xlabel('recursions k')
    ax.set_ylabel('nats per token')
    ax.legend()
    return figure


def _calibration(entries: list[dict[str, Any]]) -> Figure:
  with plt.rc_context(plots.STYLE):
    figure, ax = plt.subplots(figsize=(9.2, 3.6))
    ax.plot([0, 1], [0, 1], color='#9aa1ab', linewidth=1)
    recursions = sorted({entry['recursion'] for entry in entries})
    most = max(entry['tokens'] for entry in entries)
    for recursion, colour in zip(recursions, plots.COLOURS * len(recursions), strict=False):
      of_it = [entry for entry in entries if entry['recursion'] == recursion]
      x = [(entry['from'] + entry['to']) / 2 for entry in of_it]
      sizes = [8 + 120 * entry['tokens'] / most for entry in of_it]
      y = [entry['better'] for entry in of_it]
      ax.plot(x, y, color=colour, linewidth=1, label=f'recursion {recursion}')
      ax.scatter(x, y, s=sizes, color=colour, alpha=0.7)
    ax.set_xlabel('probability of going on')
    ax.set_ylabel('share better served later')
    ax.legend()
    return figure
