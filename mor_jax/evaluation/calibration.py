"""Causal thresholds for capacities that a model was not trained with.

Top-k with other capacities is run over some data; the mean logit at the border of its
choice is the threshold that, token by token, takes about as many. So the compute a model
spends can be chosen after training (best with `causality=aux_router` or `none`: the auxiliary
loss pushes logits away from every other border, paper section 7.1).
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
from mor_jax.files import write_atomically
from mor_jax.model.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Calibration:
  """Thresholds (R,) found for capacities (R,) with the checkpoint of `step` on `rows` rows."""

  capacities: tuple[float, ...]
  thresholds: tuple[float, ...]
  step: int
  rows: int


def check(config: Config, capacities: tuple[float, ...]) -> Config:
  """The config with other capacities. Raises ConfigError where they, or the model, do not allow it."""
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
  """Thresholds (R,) for the capacities in `config`, and the number of rows they come from.

  Steps that refuse nobody keep threshold 0, which they do not use.
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
  """Config and variables whose threshold routing follows the calibration."""
  routing = {**variables.get('routing', {}), 'threshold': jnp.array(calibration.thresholds, jnp.float32)}
  return check(config, calibration.capacities), {**variables, 'routing': routing}


def read(path: Path) -> list[Calibration]:
  """The calibrations stored with a run, in the order they were made."""
  if not path.exists():
    return []
  fields = ({**entry, **_tuples(entry)} for entry in json.loads(path.read_text()))
  return [Calibration(**entry) for entry in fields]


def store(path: Path, calibration: Calibration) -> None:
  """Adds a calibration to those of the run, in place of an older one for the same capacities."""
  others = [other for other in read(path) if other.capacities != calibration.capacities]
  entries = [dataclasses.asdict(entry) for entry in (*others, calibration)]
  write_atomically(path, json.dumps(entries, indent=2) + '\n')


def take(batches: Iterable[dict[str, np.ndarray]], rows: int) -> Iterable[dict[str, np.ndarray]]:
  """The first batches, until they hold at least `rows` rows."""
  batches = iter(batches)
  first = next(batches)
  more = -(-rows // len(first['tokens'])) - 1
  return itertools.chain([first], itertools.islice(batches, more))


def _tuples(entry: dict[str, Any]) -> dict[str, tuple[float, ...]]:
  return {name: tuple(entry[name]) for name in ('capacities', 'thresholds')}
