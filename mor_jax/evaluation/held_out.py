"""Evaluates a model on held-out rows: loss by kind of routing, recursion limit and position."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from mor_jax.config import ConfigError, DataConfig, ModelConfig
from mor_jax.data import corpus, loader
from mor_jax.data import dataset as dataset_lib
from mor_jax.data.manifest import SplitCounts
from mor_jax.data.tokenizer import MADE_HERE, Tokenizer
from mor_jax.evaluation import choosers, difficulty, nll
from mor_jax.runs.restore import LoadedRun
from mor_jax.training.meter import add_up, router_metrics

Advance = Callable[[int], None]

SHORT_BINS = 8  # share of the row, as a divisor, up to which bins of positions double in size


@dataclasses.dataclass(frozen=True)
class Way:
  """A way to run a model: routing mode and maximum number of recursions."""

  routing: str
  max_recursions: int


def ways(model: ModelConfig, chooser: str | None = None) -> list[Way]:
  """All ways to run a model, with a chooser one: for each routing mode the recursion limits in ascending order, the last being none.

  A model without router has one mode. Vanilla models and `sequence` sharing, which repeats single layers,
  have no limit.
  """
  if chooser is not None:
    return [Way('threshold' if model.kind == 'mor' else 'topk', model.recursions)]
  routings = ('topk', 'threshold') if model.kind == 'mor' else ('topk',)
  limits = range(1 if model.can_stop_early else model.recursions, model.recursions + 1)
  return [Way(routing, limit) for routing in routings for limit in limits]


def open_data(
  run: LoadedRun,
  source: str | None,
  report: Callable[[str], None] = lambda line: None,
  form: str | None = None,
) -> loader.Dataset:
  """The dataset to evaluate a run on.

  Args:
    source: folder of a prepared dataset, of which its validation split counts; or documents in the format of
      `data.source`, all of which count, prepared with the run's tokenizer; None: the run's own data.
    form: of the documents, as `data.format`; None: that of the run.

  Raises:
    ConfigError: the dataset is unreadable, or its tokenizer differs from the run's.
  """
  data, path = run.config.data, run.folder.tokenizer
  tokenizer = Tokenizer.load(path, data.separator, data.begin)
  folder = Path((source or '').removeprefix(dataset_lib.PREPARED)).expanduser()
  if source is None:
    if data.tokenizer not in MADE_HERE and not Path(data.tokenizer).exists():
      data = dataclasses.replace(data, tokenizer=str(path))  # the run's copy outlives what it was made from
    if data.chat_template and not Path(data.chat_template).expanduser().exists():
      data = dataclasses.replace(data, chat_template=str(run.folder.path))
    dataset = loader.open_dataset(data, report)
  elif source.startswith(dataset_lib.PREPARED) or folder.is_dir():
    dataset = dataset_lib.open_dataset(folder)
  else:
    everything = {'validation_fraction': corpus.ALL, 'max_documents': None, 'live': False}
    form = form or data.format
    if form == 'chat':
      everything |= {'chat_template': str(run.folder.path)}
    else:
      everything |= {'chat_template': None, 'too_long': DataConfig().too_long}
    named = dataclasses.replace(data, source=source, format=form, tokenizer=str(path), **everything)
    dataset = loader.open_dataset(named, report)
  if dataset.manifest.tokenizer_digest != tokenizer.digest:
    raise ConfigError(
      f'the data of {source or data.source} has another tokenizer than the run: {dataset.manifest.tokenizer} with '
      f'{dataset.manifest.vocab_size} entries, where {path} has {tokenizer.vocab_size}, so that the same ids mean '
      f'other text; name documents with --data=files:PATTERN, which are prepared with the tokenizer of the run'
    )
  return dataset


def evaluate(
  run: LoadedRun,
  dataset: loader.Dataset,
  mesh: Mesh,
  batch_size: int,
  max_rows: int | None = None,
  begin: Callable[[Way], None] = lambda way: None,
  advance: Advance = lambda rows: None,
  chooser: str | None = None,
  mean_depth: float | None = None,
) -> dict[str, Any]:
  """Returns all results of `python -m mor_jax.evaluate` as JSON.

  Args:
    batch_size: rows per batch.
    max_rows: validation rows to use; None: all.
    begin: called before each of `ways`.
    advance: called with the number of rows after every batch.
    chooser: one of `choosers.CHOOSERS`: depths are then chosen so, in place of all ways of the model.
    mean_depth: as in `choosers.make`.

  Returns:
    'routing': for each mode ('topk' and 'threshold', or 'none' for models without router) the `summarize` of
    the whole model, with 'recursion_limits', the same for every limit, and 'positions', from `by_position`, and of
    data that know how hard their tokens are `difficulty.summarize`; with a chooser its name is the only mode;
    'gap': threshold minus top-k for loss, perplexity and bits per byte.
  """
  split = dataset.manifest.splits['validation']
  model = run.config.model
  kinds = difficulty.kinds(dataset, max_rows)
  found: dict[str, Any] = {}
  for way in ways(model, chooser):
    begin(way)
    full = way.max_recursions == model.recursions
    batches = loader.validation_batches(dataset, batch_size, max_rows)
    sums: Any = None
    for fitted_on, measured in _folds(batches) if chooser == 'confidence' else [([], batches)]:
      choose = None
      if chooser is not None:
        choose = choosers.make(chooser, run.model, run.config, mesh, run.variables, fitted_on, mean_depth)
      step = nll.make_nll_step(
        run.model, run.config, mesh, way.routing, way.max_recursions, full, kinds, choose=choose
      )
      sums = add_up(sums, nll.totals(step, run.variables, _followed(iter(measured), advance), mesh))
    summary = {'max_recursions': way.max_recursions, **summarize(sums, split)}
    name = chooser or (way.routing if model.kind == 'mor' else 'none')
    mode = found.setdefault(name, {'recursion_limits': []})
    mode['recursion_limits'].append(summary)
    if full:
      mode |= {**summary, 'positions': by_position(sums['position'])}
  rows = split.rows if max_rows is None else min(max_rows, split.rows)
  manifest = dataset.manifest
  result = {
    'run': str(run.folder.path),
    'step': run.step,
    'model': {'kind': model.kind, 'recursions': model.recursions, 'capacities': model.step_capacities},
    'data': {
      'source': manifest.source,
      'documents_digest': manifest.documents_digest,
      'seq_len': manifest.seq_len,
      'rows': rows,
      'bytes_per_token': split.bytes_per_token,
    },
    'routing': found,
  }
  if 'threshold' in found and 'topk' in found:
    shown = ('nll', 'perplexity', 'bits_per_byte')
    result['gap'] = {name: found['threshold'][name] - found['topk'][name] for name in shown}
  return result


def _folds(batches: Iterator[loader.Batch]) -> list[tuple[list[loader.Batch], list[loader.Batch]]]:
  """(fitted on, measured): each half of the batches with a choice that was fitted on the other."""
  every = list(batches)
  if len(every) < 2:
    raise ConfigError(
      '--router=confidence is fitted on every second batch of rows and measured on the others, and there is only one; '
      'lower --batch_size'
    )
  return [(every[::2], every[1::2]), (every[1::2], every[::2])]


def _followed(batches: Iterator[loader.Batch], advance: Advance) -> Iterator[loader.Batch]:
  for batch in batches:
    yield batch
    advance(int((batch['segment_ids'] > 0).any(axis=1).sum()))


def summarize(sums: dict[str, Any], split: SplitCounts) -> dict[str, Any]:
  """Loss in nats per predicted token, perplexity, bits per byte, and the metrics of `router.summarize`.

  Of a model without router whose depths were chosen otherwise, their mean is 'mean_depth'.

  Also 'overflow_recursion_r', the share of all tokens that were selected for recursion r = 1..R but got no
  slot. Bits per byte use the average bytes per token of the whole split.
  """
  loss = float(sums['nll'] / sums['targets'])
  result = {
    'nll': loss,
    'perplexity': math.exp(min(loss, 700.0)),  # the largest that a float can hold
    'bits_per_byte': nll.bits_per_byte(loss, split.tokens, split.bytes),
    'predicted_tokens': int(sums['targets']),
  }
  if 'difficulty' in sums:
    result['accuracy'] = float(sums['correct'] / sums['targets'])
    result |= difficulty.summarize(sums['difficulty'])
  if 'chosen' in sums:
    result['mean_depth'] = float(sums['chosen']['depth'] / sums['chosen']['tokens'])
  if 'counts' in sums:
    counts = sums['counts']
    result |= router_metrics(counts)
    shares_R = counts['overflow_R'] / max(counts['depth_R1'].sum(), 1)
    result |= {f'overflow_recursion_{step}': float(share) for step, share in enumerate(shares_R, start=1)}
  return result


def by_position(sums_T: dict[str, np.ndarray]) -> list[dict[str, float]]:
  """Loss, mean depth and overflow by the number of preceding tokens in the document.

  Bins double in size up to an eighth of the row and then keep that size. Empty bins are omitted.
  """
  bins = []
  edges = position_edges(len(sums_T['nll']))
  for first, end in itertools.pairwise(edges):
    of_bin = {name: float(values_T[first:end].sum()) for name, values_T in sums_T.items()}
    if not of_bin['targets']:
      continue
    entry = {'first': int(first), 'last': int(end) - 1, 'predicted_tokens': int(of_bin['targets'])}
    entry['nll'] = of_bin['nll'] / of_bin['targets']
    if of_bin.get('tokens'):
      entry['mean_depth'] = of_bin['depth'] / of_bin['tokens']
      entry['overflow_ratio'] = of_bin['overflow'] / of_bin['tokens']
    bins.append(entry)
  return bins


def position_edges(length: int) -> np.ndarray:
  """First positions, in ascending order, of the bins that cover 1 to T - 1, followed by T."""
  short = length / SHORT_BINS
  doubling = 2 ** np.arange(math.ceil(math.log2(max(short, 1))))
  even = np.arange(1, SHORT_BINS + 1) * length // SHORT_BINS
  return np.unique(np.concatenate([[1], doubling, even[even > 0]]))
