"""Calibrates causal thresholds for capacities that a model was not trained with.

This runs top-k routing with the new capacities over some data. The mean logit at the boundary
of the selection becomes the threshold, which then selects about as many tokens. In this way the
compute of a model can be chosen after training. It works best with `causality=aux_router` or
`none`, since the auxiliary loss moves logits away from all other boundaries (paper section 7.1).
"""

import dataclasses
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mor_jax.config import Config, ConfigError, with_changes
from mor_jax.evaluation import nll
from mor_jax.files import parse_json, write_atomically
from mor_jax.model.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Calibration:
  """Thresholds (R,) for capacities (R,), calibrated with the checkpoint of `step` on `rows` rows."""

  capacities: tuple[float, ...]
  thresholds: tuple[float, ...]
  step: int
  rows: int


def check(config: Config, capacities: tuple[float, ...]) -> Config:
  """Returns the config with new capacities. Raises ConfigError if they or the model are unsuitable."""
  model = config.model
  if model.kind != 'mor' or model.router != 'expert_choice' or model.random_router:
    raise ConfigError(
      f'only expert-choice routers have thresholds to calibrate; this model has model.kind={model.kind}, '
      f'model.router={model.router}, model.random_router={model.random_router}'
    )
  return with_changes(config, model={'capacities': capacities})


def calibrate(
  config: Config, variables: Any, batches: Iterable[dict[str, np.ndarray]], mesh: Mesh
) -> tuple[tuple[float, ...], int]:
  """Returns the thresholds (R,) for the capacities in `config`, and the number of rows used.

  Steps that take all tokens keep threshold 0 and do not use it.
  """
  nll_step = nll.make_nll_step(Transformer(config.model), config, mesh)
  rows, totals = 0, None
  for batch in batches:
    counts = nll.run(nll_step, variables, batch, mesh)['counts']
    totals = counts if totals is None else jax.tree.map(np.add, totals, counts)
    rows += len(batch['tokens'])
  if totals is None:
    raise ValueError('there are no rows to calibrate on')
  border_R = totals['border_R'] / np.maximum(totals['border_rows_R'], 1)
  return tuple(float(border) for border in border_R), rows


def apply(config: Config, variables: Any, calibration: Calibration) -> tuple[Config, dict[str, Any]]:
  """Returns config and variables with the calibrated thresholds."""
  routing = {**variables.get('routing', {}), 'threshold': jnp.array(calibration.thresholds, jnp.float32)}
  return check(config, calibration.capacities), {**variables, 'routing': routing}


def read(path: Path) -> list[Calibration]:
  """The calibrations stored with a run, in the order they were made. Raises ConfigError if they cannot be read."""
  if not path.exists():
    return []
  try:
    fields = ({**entry, **_tuples(entry)} for entry in parse_json(path.read_text(encoding='utf-8')))
    return [Calibration(**entry) for entry in fields]
  except (OSError, ValueError, TypeError, KeyError) as error:
    raise ConfigError(f'{path} cannot be read ({error}); remove it, and calibrate again') from None


def store(path: Path, calibration: Calibration) -> None:
  """Adds a calibration to the run. Replaces an older one for the same capacities."""
  others = [other for other in read(path) if other.capacities != calibration.capacities]
  entries = [dataclasses.asdict(entry) for entry in (*others, calibration)]
  write_atomically(path, json.dumps(entries, indent=2) + '\n')


def take(batches: Iterable[dict[str, np.ndarray]], rows: int) -> Iterable[dict[str, np.ndarray]]:
  """Yields batches until they have at least `rows` rows in total."""
  batches = iter(batches)
  first = next(batches)
  more = -(-rows // len(first['tokens'])) - 1
  return itertools.chain([first], itertools.islice(batches, more))


def _tuples(entry: dict[str, Any]) -> dict[str, tuple[float, ...]]:
  return {name: tuple(entry[name]) for name in ('capacities', 'thresholds')}
