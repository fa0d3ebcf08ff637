"""The sections of a report. Each function returns one section and passes its plots to `Plots`."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from mor_jax.evaluation import depth
from mor_jax.model import flops
from mor_jax.reporting import page, plots
from mor_jax.reporting.depths import Depths, mean_depth
from mor_jax.reporting.runs import AXES, Curve, Run, differing_settings, own_settings, same_tokenizer
from mor_jax.units import duration, megabytes, quantity

ROUTER_METRICS = {
  'mean_depth': 'mean recursions per token',
  'sampling_accuracy': 'sampling accuracy (causal rule = top-k choice)',
  'dead_token_ratio': 'places that never took the last recursion',
  'aux_loss': 'auxiliary loss',
  'depth_entropy': 'entropy of depths, nats',
  'overflow_ratio': 'tokens without a place',
}
TRAINING_METRICS = {
  'learning_rate': 'learning rate',
  'grad_norm': 'gradient norm before clipping',
  'tokens_per_second': 'tokens per second',
}


YARDSTICKS = {
  'loss of the model': 'validation/nll',
  'unigram entropy: the frequencies of tokens alone': 'validation/unigram_entropy',
  'bigram entropy: the token before is known': 'validation/bigram_entropy',
}


class Plots:
  """Converts figures to SVG for the page and saves a PNG of each in a folder."""

  def __init__(self, folder: Path):
    self._folder = folder
    folder.mkdir(parents=True, exist_ok=True)

  def add(self, name: str, figure: Figure | None) -> str:
    """The figure as SVG, '' for None; its PNG is `name`.png."""
    if figure is None:
      return ''
    figure.savefig(self._folder / f'{name}.png', dpi=150)
    return plots.to_svg(figure, name)


def overview(runs: list[Run]) -> str:
  """One row per run: size, cost and result."""
  shared = same_tokenizer(runs)
  columns = ['run', 'kind', 'parameters', 'outside embedding', 'FLOPs/token', 'tokens', 'training FLOPs']
  columns += ['KV bytes/token', *(['validation nats'] if shared else []), 'bits/byte', 'time']
  rows = []
  for run in runs:
    model, length = run.config.model, run.config.data.seq_len
    count, steps = flops.count_parameters(model), [run.records[-1]['step']]
    nll, clock = run.curve('validation/nll'), run.curve('train/seconds')
    kind = f'{model.kind} R={model.recursions}' if model.kind != 'vanilla' else model.kind
    rows.append(
      [
        run.label,
        kind,
        quantity(count.total),
        quantity(count.non_embedding),
        quantity(flops.train_flops_per_token(model, length)),
        quantity(float(run.at('tokens', np.array(steps))[0])),
        quantity(float(run.at('flops', np.array(steps))[0])),
        f'{flops.kv_cache_bytes(model, length) / length:,.0f}',
        *([_number(nll, '.4f')] if shared else []),
        _number(nll and run.bits_per_byte(nll, 'validation'), '.4f'),
        '-' if clock is None else duration(clock.values[-1]),
      ]
    )
  remarks = [f'{run.label}: {note}' for run in runs for note in run.notes]
  if not shared:
    remarks.append(
      'These runs have different tokenizers: a token of one is not a token of the other, so losses are '
      'compared in bits per byte of text only.'
    )
  return page.section('Overview', '', page.notes(remarks), page.table(columns, rows))


def result(runs: list[Run]) -> str:
  """What a single run came to beside what its text says about itself, and a text of its own; '' for several."""
  run, *others = runs
  if others or run.summary is None:
    return ''
  told = run.summary
  rows = [
    [label, f'{told[name]:.4f}']
    for label, name in YARDSTICKS.items()
    if isinstance(told.get(name), float) and np.isfinite(told[name])
  ]
  parts = [page.table(['of the validation split', 'nats per token'], rows)] if rows else []
  if told.get('sample'):
    parts += [page.heading('A text of its own'), page.preformatted(told['sample'])]
  return page.section('Result', '', *parts)


def losses(runs: list[Run], figures: Plots) -> str:
  """Training and validation loss against tokens, steps, FLOPs and time."""
  shared = same_tokenizer(runs)
  unit = 'nats per token' if shared else 'bits per byte'

  def loss_of(name: str, split: str) -> Callable[[Run], Curve | None]:
    def get(run: Run) -> Curve | None:
      curve = run.curve(name)
      return curve if shared or curve is None else run.bits_per_byte(curve, split)

    return get

  parts = []
  for title, name, split in (
    ('Validation', 'validation/nll', 'validation'),
    ('Training', 'train/loss', 'train'),
  ):
    panels = {}
    found = [(run, curve) for run in runs if (curve := loss_of(name, split)(run)) is not None]
    if found and all(len(curve.steps) == 1 for _, curve in found):  # no curve, but a number
      told = [[run.label, f'{curve.values[0]:.4f}', f'{curve.steps[0]:,}'] for run, curve in found]
      parts += [page.heading(title), page.table(['run', unit, 'at step'], told)]
      continue
    for axis, label in AXES.items():
      figure = plots.curves(runs, loss_of(name, split), axis, unit, smooth=split == 'train')
      panels[label] = figures.add(f'{split}_loss_by_{axis}', figure)
    panels = {label: svg for label, svg in panels.items() if svg}
    parts += [page.heading(title), page.tabs(f'{split}-loss', panels)] if panels else []
  lead = 'Top-k routing, as in training. Thin lines are single steps, bold ones running means.'
  return page.section('Loss', lead, *parts)


def training(runs: list[Run], figures: Plots) -> str:
  """Learning rate, gradient norm and throughput over the steps."""
  return page.section('Training', '', _metric_tabs('training', runs, figures, TRAINING_METRICS))


def routers(runs: list[Run], figures: Plots) -> str:
  """Router metrics over training."""
  parts = [_metric_tabs('router', runs, figures, ROUTER_METRICS)]
  shares = {
    run.label: figures.add(f'depths_{number}_{_slug(run.label)}', plots.stacked_depths(run))
    for number, run in enumerate(runs)
  }
  shares = {label: svg for label, svg in shares.items() if svg}
  if shares:
    lead = '' if len(shares) > 1 else f', {next(iter(shares))}'
    parts += [page.heading(f'Tokens by depth{lead}'), page.tabs('depths', shares)]
  return page.section('Routers over training', '', *parts)


def evaluations(runs: list[Run]) -> str:
  """Losses under top-k and threshold routing, for runs with results of `python -m mor_jax.evaluate`."""
  unit, scale = ('nll', 'nats per token') if same_tokenizer(runs) else ('bits_per_byte', 'bits per byte')
  rows = []
  for run in runs:
    modes = (run.evaluation or {}).get('routing', {})
    alone = modes.get('none')
    losses = [modes.get(mode, alone) for mode in ('topk', 'threshold')]
    if all(losses):
      top_k, threshold = (loss[unit] for loss in losses)
      gap = '-' if alone else f'{threshold - top_k:+.4f}'
      rows.append([run.label, f'{run.evaluation["step"]:,}', f'{top_k:.4f}', f'{threshold:.4f}', gap])
  if not rows:
    return ''
  columns = ['run', 'step', f'top-k, {scale}', 'threshold', 'gap']
  lead = 'Top-k routing sees the future; threshold routing does not, as when generating (mor_jax.evaluate).'
  return page.section('What causality costs', lead, page.table(columns, rows))


def tokens(runs: list[Run], measured: list[tuple[Depths | None, str]], figures: Plots) -> str:
  """A text coloured by depth, depth by position, and the words with the largest depth."""
  found = [(index, run, depths) for index, (run, (depths, _)) in enumerate(zip(runs, measured, strict=True))]
  found = [
    (plots.colour_of(index, len(runs)), run, depths) for index, run, depths in found if depths is not None
  ]
  remarks = page.notes(why for _, why in measured if why and not why.endswith('same depth.'))
  if not found:
    return page.section('How deep tokens go', '', remarks)
  panels = {run.label: _text(run, depths) for _, run, depths in found}
  profiles = [(colour, run.label, *depth.depth_by_position(depths.rows)) for colour, run, depths in found]
  kinds = []
  for colour, run, depths in found:
    means = depth.mean_by_kind(depths.words)
    kinds.append(
      (colour, run.label, [(kind, means[kind].mean, 2 * means[kind].error) for kind in sorted(means)])
    )
  return page.section(
    'How deep tokens go',
    'Validation text under threshold routing, as when generating. Point at a token, or move to it with Tab, to see what '
    'each recursion would have said in its place, and what the router thought of it.',
    remarks,
    page.tabs('text', panels),
    page.heading('Depth by place in the row'),
    figures.add('depth_by_position', plots.depth_by_position(profiles)),
    page.heading('Depth by kind of word, with twice the standard error'),
    figures.add('depth_by_kind_of_word', plots.bars(kinds, 'mean recursions')),
    page.paragraph(*(_content_against_function(run, depths) for _, run, depths in found)),
    page.tabs('words', {run.label: _extremes(depths) for _, run, depths in found}),
  )


def costs(runs: list[Run], figures: Plots) -> str:
  """Memory, throughput and wall time by kind of work."""
  rows = []
  for run in runs:
    stepping, last = _ledger(run).get('steps'), np.array([run.records[-1]['step']])
    model, length = run.config.model, run.config.data.seq_len
    parameters = flops.count_parameters(model).total
    rows.append(
      [
        run.label,
        f'{4 * parameters / 1e6:,.1f} MB',
        f'{12 * parameters / 1e6:,.1f} MB',
        '-' if run.device_bytes is None else megabytes(run.device_bytes),
        f'{flops.kv_cache_bytes(model, length) / 1e6:,.2f} MB',
        '-' if stepping is None else f'{run.at("tokens", last)[0] / stepping:,.0f}',
      ]
    )
  header = [
    'run',
    'parameters, float32',
    'with AdamW',
    'train step, a device',
    'KV cache of a row, bf16',
    'tokens/s of steps',
  ]
  spent = [(run.label, ledger) for run in runs if (ledger := _ledger(run))]
  goodput = figures.add('goodput', plots.goodput(spent)) if spent else ''
  heading = page.heading('Wall time') if spent else ''
  return page.section('Memory and goodput', '', page.table(header, rows), heading, goodput)


def settings(runs: list[Run]) -> str:
  """Settings that differ between the runs; of a single one those that are not the defaults."""
  if len(runs) == 1:
    table = page.table(['setting', 'value', 'default'], own_settings(runs[0]), wraps=True)
    return page.section('Settings', 'Those that are not the defaults.', table)
  rows = [[name, *values] for name, values in differing_settings(runs)]
  text = '' if rows else 'These runs have the same settings.'
  return page.section(
    'Settings that differ', text, page.table(['setting', *(run.label for run in runs)], rows)
  )


def _metric_tabs(name: str, runs: list[Run], figures: Plots, names: dict[str, str]) -> str:
  panels = {}
  for metric, label in names.items():
    figure = plots.curves(runs, lambda run, metric=metric: run.curve(f'train/{metric}'), 'tokens', label)
    panels[label] = figures.add(metric, figure)
  return page.tabs(name, {label: svg for label, svg in panels.items() if svg})


def _text(run: Run, depths: Depths) -> str:
  count = sum(int((row.segments_T > 0).sum()) for row in depths.rows)
  said = f'step {depths.step:,}; mean over {count:,} tokens: {mean_depth(depths):.2f} recursions'
  rows = (
    page.coloured_text(depths.tokenizer, row, looks)
    for row, looks in zip(depths.rows, depths.looks, strict=False)
  )
  return f'<p class="lead">{said}</p>{page.depth_key(run.config.model.recursions)}{"".join(rows)}'


def _extremes(depths: Depths, shown: int = 15) -> str:
  """The words with the smallest and the largest mean depth."""
  means = list(depth.mean_by_word(depths.words).items())
  kinds = {word.text: word.kind for word in depths.words}

  def listing(title: str, entries: list) -> str:
    rows = [
      [word, kinds[word], f'{found.mean:.2f} ± {found.error:.2f}', f'{found.count:,}']
      for word, found in entries
    ]
    return page.heading(title) + page.table(['word', 'kind', 'mean recursions', 'times'], rows)

  if not means:
    return ''
  return page.columns(
    listing('deepest words', means[::-1][:shown]), listing('shallowest words', means[:shown])
  )


def _content_against_function(run: Run, depths: Depths) -> str:
  """A sentence on the paper's claim that content words take more recursions than function words."""
  means = depth.mean_by_kind(depths.words)
  if not {'content word', 'function word'} <= means.keys():
    return ''
  content, function = means['content word'], means['function word']
  difference, error = content.mean - function.mean, np.hypot(content.error, function.error)
  if not abs(difference) > 2 * error:
    verdict = 'a difference that chance may make'
  else:
    verdict = 'as the paper has it' if difference > 0 else 'not as the paper has it'
  return (
    f'{run.label}: {content.count:,} content words take {content.mean:.2f} ± {content.error:.2f} recursions, '
    f'{function.count:,} function words {function.mean:.2f} ± {function.error:.2f} (standard errors): {verdict}, '
    f'which says that content words go deeper.'
  )


def _ledger(run: Run) -> dict[str, float]:
  """Seconds by kind of work; {} if unknown."""
  spent = (run.summary or {}).get('goodput')
  if spent is None:  # not finished: what the last line that knows says
    prefix = 'goodput/'
    known = (record for record in reversed(run.records) if f'{prefix}steps' in record)
    spent = {
      name.removeprefix(prefix): value
      for name, value in next(known, {}).items()
      if name.startswith(prefix) and name != f'{prefix}share'
    }
  return {kind.replace('_', ' '): seconds for kind, seconds in spent.items() if seconds > 0}


def _number(curve: Curve | None, form: str) -> str:
  return '-' if curve is None else format(curve.values[-1], form)


def _slug(label: str) -> str:
  return ''.join(letter if letter.isascii() and letter.isalnum() else '_' for letter in label)
