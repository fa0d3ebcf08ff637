"""The data of a run for the report: config, metrics as arrays over steps, result, and problems with its files."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from mor_jax.config import Config, ConfigError
from mor_jax.evaluation import nll
from mor_jax.files import parse_json, require_writable
from mor_jax.runs import metrics
from mor_jax.runs.run_folder import RunFolder
from mor_jax.training import budget

AXES = {
  'tokens': 'training tokens',
  'steps': 'optimiser steps',
  'flops': 'training FLOPs',
  'seconds': 'training time',
}


NUMBERS = ('train/loss', 'train/grad_norm', 'validation/nll')  # that must be finite


@dataclasses.dataclass(frozen=True)
class Curve:
  """Finite values (N,) of a metric at ascending steps (N,), and the steps (M,) at which it was not finite."""

  steps: np.ndarray
  values: np.ndarray
  lost: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, np.int64))


@dataclasses.dataclass(frozen=True)
class Run:
  """The contents of a run folder.

  Attributes:
    label: name in plots and tables, unique within a report.
    records: lines of metrics.jsonl.
    summary: the result; None for an unfinished run.
    device_bytes: memory per device of the compiled train step; None if the backend does not report it.
    evaluation: result of `python -m mor_jax.evaluate`; None if it has not run.
    data: counts of the dataset and digest of the tokenizer (data.json).
    notes: remarks for the reader about these files.
  """

  label: str
  folder: RunFolder
  config: Config
  records: list[dict[str, Any]]
  summary: dict[str, Any] | None
  device_bytes: int | None
  evaluation: dict[str, Any] | None
  data: dict[str, Any]
  notes: tuple[str, ...]

  def curve(self, name: str) -> Curve | None:
    """A metric by its key in metrics.jsonl; None if it has no finite value."""
    pairs = [(record['step'], record[name]) for record in self.records if name in record]
    pairs = [(step, value) for step, value in pairs if type(value) in (int, float)]
    finite = [(step, value) for step, value in pairs if np.isfinite(value)]
    if not finite:
      return None
    steps, values = zip(*finite, strict=True)
    lost = [step for step, value in pairs if not np.isfinite(value)]
    return Curve(np.array(steps), np.array(values, np.float64), np.array(lost, np.int64))

  def at(self, axis: str, steps: np.ndarray) -> np.ndarray:
    """Converts steps to the units of one of AXES. Wall time is interpolated between logged values."""
    if axis == 'steps':
      return steps
    if axis == 'seconds':
      clock = self.curve('train/seconds')
      return np.full(len(steps), np.nan) if clock is None else np.interp(steps, clock.steps, clock.values)
    seen = self.curve('train/tokens')
    length = self.config.data.seq_len
    if seen is None:
      tokens = steps * self.config.train.global_batch * length
    else:  # the batch grew during the run
      tokens = np.interp(steps, np.r_[0, seen.steps], np.r_[0, seen.values])
    return tokens if axis == 'tokens' else tokens * budget.train_flops_per_token(self.config)

  def bits_per_byte(self, curve: Curve, split: str) -> Curve:
    """Converts a loss in nats per token to bits per byte of the split's text, independent of the tokenizer."""
    counts = self.data['splits'][split]
    if not counts['tokens']:  # read live: only the validation split was counted
      counts = self.data['splits']['validation']
    values = nll.bits_per_byte(curve.values, counts['tokens'], counts['bytes'])
    return dataclasses.replace(curve, values=values)


def read(paths: list[str]) -> list[Run]:
  """The runs in these folders, in this order.

  Raises:
    ConfigError: a folder is not a run folder, or holds no metrics; the error names it.
  """
  names = [Path(path).resolve().name for path in paths]
  labels = names if len(set(names)) == len(names) else [str(Path(path)) for path in paths]
  # In whatever locale they were named.
  labels = [os.fsencode(label).decode('utf-8', 'replace') for label in labels]
  return [_read(path, label) for path, label in zip(paths, labels, strict=True)]


def check_writable(output: Path) -> None:
  """Raises ConfigError unless the page can be written; leaves everything as it is."""
  if output.is_dir():
    raise ConfigError(f'--output={output} is a folder; name a file ending in .html')
  require_writable(output.absolute().parent, '--output')


def _read(path: str, label: str) -> Run:
  folder = RunFolder(Path(path))
  config = folder.read_config()
  if folder.is_converted:
    raise ConfigError(f'{path} holds a converted model, not a training: there are no curves to show')
  records, damaged = metrics.read_and_judge(folder.metrics)
  if not records:
    raise ConfigError(f'the run {path} has no metrics yet: {folder.metrics} is missing or has no records')
  notes = []
  if damaged:
    notes.append(
      f'metrics.jsonl has {len(damaged)} line(s) that are no records, line {damaged[0]} the first (written while the '
      f'machine went down?); all others are shown'
    )
  notes += _not_finite(records)
  summary = folder.read_summary()
  if summary is None:
    notes.append(f'not finished: step {records[-1]["step"]:,} of {config.train.steps:,}')
  processes = _read_json(folder.goodput) or []
  device_bytes = max((process.get('device_bytes', 0) for process in processes), default=0) or None
  evaluation = _read_json(folder.path / 'evaluation.json')
  if evaluation is None and (folder.path / 'evaluation.json').exists():
    notes.append('evaluation.json cannot be read, so it is not shown')
  return Run(
    label, folder, config, records, summary, device_bytes, evaluation, folder.read_data(), tuple(notes)
  )


def _not_finite(records: list[dict[str, Any]]) -> list[str]:
  """What is to be said of losses and gradients that are no numbers."""
  notes = []
  for name in NUMBERS:
    steps = [
      record['step']
      for record in records
      if type(record.get(name)) in (int, float) and not np.isfinite(record[name])
    ]
    if steps:
      more = f' and {len(steps) - 1} more' if len(steps) > 1 else ''
      notes.append(f'{name} is not finite at step {steps[0]:,}{more} (crosses above its curve)')
  return notes


def _read_json(path: Path) -> Any:
  """The content of an optional file; None if it is missing or damaged."""
  try:
    return parse_json(path.read_text(encoding='utf-8'))
  except (OSError, ValueError):
    return None


def differing_settings(runs: list[Run]) -> list[tuple[str, list[str]]]:
  """(name, value in each run) of every setting that differs between the runs."""
  flat = [dict(_flatten(run.config.to_dict())) for run in runs]
  names = dict.fromkeys(name for settings in flat for name in settings if name != 'name')
  rows = [(name, [json.dumps(settings.get(name)) for settings in flat]) for name in names]
  return [(name, values) for name, values in rows if len(set(values)) > 1]


def own_settings(run: Run) -> list[tuple[str, str, str]]:
  """(name, value, default) of every setting of a run that is not the default."""
  defaults = dict(_flatten(Config().to_dict()))
  settings = dict(_flatten(run.config.to_dict())).items()
  rows = [(name, json.dumps(value), json.dumps(defaults.get(name))) for name, value in settings]
  return [(name, value, default) for name, value, default in rows if value != default and name != 'name']


def same_tokenizer(runs: list[Run]) -> bool:
  """Whether the runs have the same tokenizer, so that losses in nats per token are comparable."""
  return len({run.data['tokenizer_digest'] for run in runs}) == 1


def _flatten(settings: dict[str, Any], prefix: str = ''):
  for name, value in settings.items():
    if isinstance(value, dict):
      yield from _flatten(value, f'{prefix}{name}.')
    else:
      yield f'{prefix}{name}', value
