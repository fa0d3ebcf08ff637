"""The data of a run for the report: config, metrics as arrays over steps, result, and problems with its files."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from mor_jax.config import Config, ConfigError
from mor_jax.evaluation import nll
from mor_jax.files import parse_json
from mor_jax.runs import metrics
from mor_jax.runs.run_folder import RunFolder
from mor_jax.training import budget

AXES = {
  'tokens': 'training tokens',
  'steps': 'optimiser steps',
  'flops': 'training FLOPs',
  'seconds': 'hours of training',
}


@dataclasses.dataclass(frozen=True)
class Curve:
  """Values (N,) of a metric at ascending steps (N,)."""

  steps: np.ndarray
  values: np.ndarray


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
    pairs = [(step, value) for step, value in pairs if isinstance(value, (int, float)) and np.isfinite(value)]
    if not pairs:
      return None
    steps, values = zip(*pairs, strict=True)
    return Curve(np.array(steps), np.array(values, np.float64))

  def at(self, axis: str, steps: np.ndarray) -> np.ndarray:
    """Converts steps to the units of one of AXES. Wall time is interpolated between logged values."""
    if axis == 'steps':
      return steps
    if axis == 'seconds':
      clock = self.curve('train/seconds')
      return (
        np.full(len(steps), np.nan) if clock is None else np.interp(steps, clock.steps, clock.values) / 3600
      )
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
    return Curve(curve.steps, nll.bits_per_byte(curve.values, counts['tokens'], counts['bytes']))


def read(paths: list[str]) -> list[Run]:
  """The runs in these folders, in this order.

  Raises:
    ConfigError: a folder is not a run folder, or holds no metrics; the error names it.
  """
  names = [Path(path).resolve().name for path in paths]
  labels = names if len(set(names)) == len(names) else [str(Path(path)) for path in paths]
  return [_read(path, label) for path, label in zip(paths, labels, strict=True)]


def check_writable(output: Path) -> None:
  """Raises ConfigError unless the page can be written. Creates its parent folder."""
  try:
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open('a'):
      pass
  except OSError as error:
    raise ConfigError(
      f'--output={output} cannot be written ({error.strerror}); name a file ending in .html'
    ) from None


def _read(path: str, label: str) -> Run:
  folder = RunFolder(Path(path))
  config = folder.read_config()
  if folder.is_converted:
    raise ConfigError(f'{path} holds a converted model, not a training: there are no curves to show')
  records = metrics.read(folder.metrics)
  if not records:
    raise ConfigError(f'the run {path} has no metrics yet: {folder.metrics} is missing or empty')
  notes = []
  lines = sum(1 for line in folder.metrics.read_text(errors='replace').splitlines() if line.strip())
  if lines > len(records):
    notes.append(
      f'metrics.jsonl has {lines - len(records)} unreadable line(s) after step {records[-1]["step"]} '
      f'(written while the machine went down?); what stands before them is shown'
    )
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


def _read_json(path: Path) -> Any:
  """The content of an optional file; None if it is missing or damaged."""
  try:
    return parse_json(path.read_text())
  except (OSError, ValueError):
    return None


def differing_settings(runs: list[Run]) -> list[tuple[str, list[str]]]:
  """(name, value in each run) of every setting that differs between the runs."""
  flat = [dict(_flatten(run.config.to_dict())) for run in runs]
  names = dict.fromkeys(name for settings in flat for name in settings if name != 'name')
  rows = [(name, [json.dumps(settings.get(name)) for settings in flat]) for name in names]
  return [(name, values) for name, values in rows if len(set(values)) > 1]


def same_tokenizer(runs: list[Run]) -> bool:
  """Whether the runs have the same tokenizer, so that losses in nats per token are comparable."""
  return len({run.data['tokenizer_digest'] for run in runs}) == 1


def _flatten(settings: dict[str, Any], prefix: str = ''):
  for name, value in settings.items():
    if isinstance(value, dict):
      yield from _flatten(value, f'{prefix}{name}.')
    else:
      yield f'{prefix}{name}', value
