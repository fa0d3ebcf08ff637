"""A run as the report sees it: config, metrics as arrays over steps, result, and what was odd about its files."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from mor_jax.config import Config, ConfigError
from mor_jax.evaluation import nll
from mor_jax.model import flops
from mor_jax.runs import metrics
from mor_jax.runs.run_folder import RunFolder

AXES = {
  'tokens': 'training tokens',
  'steps': 'optimiser steps',
  'flops': 'training FLOPs',
  'seconds': 'hours of training',
}


@dataclasses.dataclass(frozen=True)
class Curve:
  """Values (N,) of a metric at steps (N,), ascending."""

  steps: np.ndarray
  values: np.ndarray


@dataclasses.dataclass(frozen=True)
class Run:
  """What the folder of a run holds.

  Attributes:
    label: name in plots and tables, unique among the runs of a report.
    records: lines of metrics.jsonl.
    summary: the result, None for a run that has not finished.
    device_bytes: what the compiled train step took of a device; None where the backend does not tell.
    evaluation: what `python -m mor_jax.evaluate` found, None if it has not run.
    data: counts of the dataset and digest of the tokenizer (data.json).
    notes: what a reader should know about these files.
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
    """A metric by its key in metrics.jsonl; None if no finite value of it was logged."""
    pairs = [(record['step'], record[name]) for record in self.records if name in record]
    pairs = [(step, value) for step, value in pairs if isinstance(value, (int, float)) and np.isfinite(value)]
    if not pairs:
      return None
    steps, values = zip(*pairs, strict=True)
    return Curve(np.array(steps), np.array(values, np.float64))

  def at(self, axis: str, steps: np.ndarray) -> np.ndarray:
    """Steps in the units of one of AXES; wall time is interpolated between the lines that state it."""
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
    return tokens if axis == 'tokens' else tokens * flops.train_flops_per_token(self.config.model, length)

  def bits_per_byte(self, curve: Curve, split: str) -> Curve:
    """A loss in nats per token as bits per byte of the split's text, which tokenizers share."""
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
  """Raises ConfigError unless a page can be written there; makes the folder it is to lie in."""
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
  """The content of a file that the page can do without; None where it is missing or damaged."""
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError):
    return None


def differing_settings(runs: list[Run]) -> list[tuple[str, list[str]]]:
  """(name, value in each run) of every setting that is not the same in all runs."""
  flat = [dict(_flatten(run.config.to_dict())) for run in runs]
  names = dict.fromkeys(name for settings in flat for name in settings if name != 'name')
  rows = [(name, [json.dumps(settings.get(name)) for settings in flat]) for name in names]
  return [(name, values) for name, values in rows if len(set(values)) > 1]


def same_tokenizer(runs: list[Run]) -> bool:
  """Whether losses in nats per token can be compared."""
  return len({run.data['tokenizer_digest'] for run in runs}) == 1


def _flatten(settings: dict[str, Any], prefix: str = ''):
  for name, value in settings.items():
    if isinstance(value, dict):
      yield from _flatten(value, f'{prefix}{name}.')
    else:
      yield f'{prefix}{name}', value
