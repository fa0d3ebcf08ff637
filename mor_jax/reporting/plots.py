"""The plots of a report as matplotlib figures: training curves, depths and words."""

import io
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib

matplotlib.use('Agg')

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from mor_jax.reporting.runs import AXES, Curve, Run
from mor_jax.units import time_unit

COLOURS = ('#3b6fb6', '#d9662b', '#3f9b5a', '#8a5fbf', '#c23b5a', '#6b6b6b', '#1fa3a3', '#b58a1b')
DEPTH_COLOURS = ('#e8edf4', '#bcd4ea', '#f6c68d', '#ee8a7a', '#c77dc0', '#9a7bd0')
MAX_POINTS = 400  # of a curve; more cannot be told apart on a screen
STYLE = {
  'font.family': 'sans-serif',
  'font.size': 9.5,
  'svg.fonttype': 'none',
  'svg.hashsalt': 'mor_jax',
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.edgecolor': '#9aa1ab',
  'axes.labelcolor': '#3c434d',
  'axes.grid': True,
  'grid.color': '#e7eaee',
  'xtick.color': '#5d6570',
  'ytick.color': '#5d6570',
  'legend.frameon': False,
  'figure.constrained_layout.use': True,
}

FEW = 8  # runs that a legend within the plot and colours of their own can tell apart

Get = Callable[[Run], Curve | None]


def colour_of(index: int, count: int) -> Any:
  """Colour of run `index` of `count`, the same in all plots of a page."""
  if count <= FEW:
    return COLOURS[index % len(COLOURS)]
  return plt.get_cmap('turbo')(0.03 + 0.94 * index / (count - 1))


def curves(
  runs: list[Run], get: Get, axis: str, ylabel: str, smooth: bool = False, log: bool = False
) -> Figure | None:
  """One curve per run against one of AXES; None if no run has the metric. `smooth` adds a running mean."""
  drawn = [(index, run, curve) for index, run in enumerate(runs) if (curve := get(run)) is not None]
  drawn = [entry for entry in drawn if np.isfinite(entry[1].at(axis, entry[2].steps)).all()]
  if not drawn:
    return None
  size, label = _time_axis(drawn) if axis == 'seconds' else (1, AXES[axis])
  with plt.rc_context(STYLE):
    figure, ax = plt.subplots(figsize=(9.2, 3.9))
    for index, run, curve in drawn:
      colour = colour_of(index, len(runs))
      x, y = run.at(axis, curve.steps) / size, curve.values
      ax.plot(
        run.at(axis, curve.lost) / size,
        np.ones(len(curve.lost)),
        'x',
        color=colour,
        transform=ax.get_xaxis_transform(),
        clip_on=False,
      )
      if smooth and len(y) > 20:
        ax.plot(*_thin(x, y), color=colour, alpha=0.25, linewidth=0.8)
        y = _smoothed(y)
      marker = 'o' if len(y) < 30 else None
      ax.plot(
        *_thin(x, y), color=colour, linewidth=1.7, marker=marker, markersize=3.5, label=wrapped(run.label)
      )
    if smooth:
      _focus(ax, [curve.values for *_, curve in drawn])
    if log:
      ax.set_yscale('log')
    _finish(ax, label, ylabel)
    if axis in ('tokens', 'flops'):
      ax.xaxis.set_major_formatter(EngFormatter(sep=''))
    return figure


def _time_axis(drawn: list[tuple[int, Run, Curve]]) -> tuple[int, str]:
  """Seconds of the unit in which the longest run is told, and the label of the axis."""
  size, _, name = time_unit(max(float(run.at('seconds', curve.steps).max()) for _, run, curve in drawn))
  return size, f'{AXES["seconds"]}, {name}'


def wrapped(label: str, width: int = 40) -> str:
  """A label in lines of at most so many characters."""
  return '\n'.join(textwrap.wrap(label, width)) or label


def stacked_depths(run: Run) -> Figure | None:
  """Share of tokens with 0, 1, ... R recursions over training; None without a router."""
  shares = []
  while (curve := run.curve(f'train/depth_share_{len(shares)}')) is not None:
    shares.append(curve)
  if not shares:
    return None
  with plt.rc_context(STYLE):
    figure, ax = plt.subplots(figsize=(9.2, 2.9))
    x = run.at('tokens', shares[0].steps)
    taken = [depth for depth, share in enumerate(shares) if share.values.any()]
    thinned = [_thin(x, _smoothed(shares[depth].values)) for depth in taken]
    ax.stackplot(
      thinned[0][0],
      [y for _, y in thinned],
      colors=[DEPTH_COLOURS[depth % len(DEPTH_COLOURS)] for depth in taken],
      labels=[f'{depth} recursion{"" if depth == 1 else "s"}' for depth in taken],
    )
    ax.set_ylim(0, 1)
    ax.margins(x=0)
    ax.xaxis.set_major_formatter(EngFormatter(sep=''))
    _finish(ax, AXES['tokens'], 'share of tokens')
    ax.legend(loc='center left', bbox_to_anchor=(1.0, 0.5))
    return figure


def depth_by_position(profiles: Sequence[tuple[Any, str, np.ndarray, np.ndarray]]) -> Figure:
  """Mean depth along the row. Args: (colour, label, positions (N,), depth (N,)) of each run."""
  with plt.rc_context(STYLE):
    figure, ax = plt.subplots(figsize=(9.2, 2.9))
    for colour, label, x, y in profiles:
      ax.plot(x, y, color=colour, linewidth=1.7, label=wrapped(label))
    ax.set_ylim(bottom=0)
    _finish(ax, 'place in the row', 'mean recursions')
    return figure


def bars(groups: list[tuple[Any, str, list[tuple[str, float, float]]]], ylabel: str) -> Figure:
  """Grouped bars. Args: (colour, label, [(name, value, error), ...]) of each run, with names in the same order."""
  names = list(dict.fromkeys(name for *_, entries in groups for name, *_ in entries))
  with plt.rc_context(STYLE):
    figure, ax = plt.subplots(figsize=(9.2, 2.9))
    width = 0.75 / len(groups)
    for place, (colour, label, entries) in enumerate(groups):
      told = {name: (value, error) for name, value, error in entries}
      heights, errors = zip(*(told.get(name, (0.0, 0.0)) for name in names), strict=True)
      x = np.arange(len(names)) + (place - (len(groups) - 1) / 2) * width
      drawn = ax.bar(x, heights, width * 0.92, label=wrapped(label), color=colour)
      ax.errorbar(x, heights, np.nan_to_num(errors), fmt='none', ecolor='#22272e', elinewidth=1, capsize=2)
      if len(groups) <= 2:  # more of them would not be read
        ax.bar_label(drawn, fmt='%.2f', fontsize=7.5, color='#3c434d', label_type='center')
    ax.set_xticks(np.arange(len(names)), names)
    ax.grid(axis='x', visible=False)
    _finish(ax, '', ylabel, is_outside=True)
    return figure


def goodput(runs: list[tuple[str, dict[str, float]]]) -> Figure:
  """Wall time by kind of work. Args: (label, seconds by kind) of each run."""
  kinds = list(dict.fromkeys(kind for _, seconds in runs for kind in seconds))
  with plt.rc_context(STYLE):
    figure, ax = plt.subplots(figsize=(9.2, 1.1 + 0.32 * len(runs)))
    left = np.zeros(len(runs))
    for index, kind in enumerate(kinds):
      widths = np.array([100 * seconds.get(kind, 0) / sum(seconds.values()) for _, seconds in runs])
      ax.barh(
        [wrapped(label, 28) for label, _ in runs],
        widths,
        left=left,
        label=kind,
        color=COLOURS[index % len(COLOURS)],
      )
      left += widths
    ax.invert_yaxis()
    ax.set_xlim(0, 100)
    ax.grid(axis='y', visible=False)
    _finish(ax, '% of wall time', '')
    ax.legend(loc='lower center', bbox_to_anchor=(0.5, 1.0), ncols=min(len(kinds), 7), fontsize=8)
    return figure


def to_svg(figure: Figure, title: str) -> str:
  """The figure as an <svg> element that scales with the page and has a name for screen readers."""
  buffer = io.StringIO()
  with plt.rc_context(STYLE):
    figure.savefig(buffer, format='svg', metadata={'Date': None, 'Creator': None}, transparent=True)
  plt.close(figure)
  svg = buffer.getvalue()
  svg = svg[svg.index('<svg') :]
  svg = re.sub(r'<metadata>.*?</metadata>', '', svg, flags=re.DOTALL)
  svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'width="100%"', svg, count=1)
  # Elements refer to clip paths and markers by id, which must differ between the figures of a page.
  prefix = re.sub(r'\W+', '-', title)
  svg = re.sub(r'(id="|url\(#|href="#)', rf'\g<1>{prefix}-', svg)
  return svg.replace('<svg', f'<svg role="img" aria-label="{title}"', 1)


def _finish(ax, xlabel: str, ylabel: str, is_outside: bool = False) -> None:
  ax.set_xlabel(xlabel)
  ax.set_ylabel(ylabel)
  ax.set_axisbelow(True)
  labels = ax.get_legend_handles_labels()[1]
  if is_outside and len(labels) == 1:  # the page says which run it is
    return
  if len(labels) > FEW or is_outside:
    ax.legend(
      loc='upper left',
      bbox_to_anchor=(1.0, 1.02),
      fontsize=6.5 if len(labels) > FEW else 8,
      ncols=-(-len(labels) // 24),
      labelspacing=0.3,
    )
  elif labels:
    ax.legend()


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Reduces a curve to at most MAX_POINTS points, including the last. Each is the mean of its neighbours."""
  if len(x) <= MAX_POINTS:
    return x, y
  edges = np.linspace(0, len(x), MAX_POINTS + 1).astype(int)
  return x[edges[1:] - 1], np.add.reduceat(y, edges[:-1]) / np.diff(edges)


def _smoothed(values: np.ndarray) -> np.ndarray:
  """Exponential moving average over about a fiftieth of the curve, with bias correction at the start."""
  decay = 1 - 1 / max(4.0, len(values) / 50)
  average, weight, result = 0.0, 0.0, np.empty(len(values))
  for index, value in enumerate(values):
    average, weight = decay * average + (1 - decay) * value, decay * weight + 1 - decay
    result[index] = average / weight
  return result


def _focus(ax, values: list[np.ndarray]) -> None:
  """Crops the steep start of the curves, which would flatten the rest."""
  low = min(value.min() for value in values)
  high = max(np.quantile(value[len(value) // 20 :], 0.995) for value in values)
  if high > low:
    ax.set_ylim(low - 0.03 * (high - low), high + 0.05 * (high - low))
