"""Runs the models of a report on validation text to measure the depths of its tokens."""

import dataclasses
import itertools
from typing import Any

import numpy as np

from mor_jax.config import ConfigError
from mor_jax.data import loader
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.evaluation import depth
from mor_jax.evaluation.recursions import Recursions
from mor_jax.reporting.runs import Run
from mor_jax.runs.restore import LoadedRun, load_run

ROWS_AT_ONCE = 4
SHOWN_TOKENS = 700


@dataclasses.dataclass(frozen=True)
class Depths:
  """Routing of some validation rows under threshold routing.

  Attributes:
    step: step of the checkpoint.
    rows: rows with depths and scores.
    words: all words of the rows.
    looks: of every row that the page prints, what was said after each recursion (`Recursions.look`); empty lists where
      the model cannot stop.
  """

  step: int
  tokenizer: Tokenizer
  rows: list[depth.RoutedRow]
  words: list[depth.Word]
  looks: list[list[dict[str, Any]]]


Measured = tuple[Depths | None, str]


def measure(run: Run, tokens: int) -> Measured:
  """Returns (depths of at least `tokens` tokens, '') or (None, the reason why there are none)."""
  if run.config.model.kind != 'mor':
    return None, f'{run.label} is a {run.config.model.kind} model: every token takes the same depth.'
  try:
    loaded = load_run(run.folder.path)
    dataset = loader.open_dataset(run.config.data, report=lambda _: None)
  except ConfigError as error:
    return None, f'{run.label}: no depths of tokens, since {error}.'
  length = run.config.data.seq_len
  count = max(1, -(-tokens // length))
  batches = loader.validation_batches(dataset, ROWS_AT_ONCE, count)
  rows = depth.route_rows(loaded.config, loaded.variables, batches, routing='threshold')
  words = list(itertools.chain.from_iterable(depth.words(dataset.tokenizer, row) for row in rows))
  shown = min(len(rows), max(1, SHOWN_TOKENS // length))
  return Depths(
    loaded.step, dataset.tokenizer, rows, words, _looks(loaded, dataset.tokenizer, rows[:shown])
  ), ''


def _looks(
  loaded: LoadedRun, tokenizer: Tokenizer, rows: list[depth.RoutedRow]
) -> list[list[dict[str, Any]]]:
  if not Recursions.can_look(loaded.model):
    return [[] for _ in rows]
  recursions = Recursions(loaded.model, loaded.variables, tokenizer, loaded.config.data.seq_len)
  return [recursions.look(row.tokens_T.tolist(), row.depth_T.tolist(), place=row.place) for row in rows]


def mean_depth(found: Depths) -> float:
  """Mean depth over all tokens except padding."""
  return float(np.concatenate([row.depth_T[row.segments_T > 0] for row in found.rows]).mean())
