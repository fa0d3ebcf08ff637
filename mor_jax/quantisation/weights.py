"""The weights of a model in 8 or 4 bits: which of them, and on which rows their scales are chosen.

Kernels of layers have the bits that are asked for, the embedding and the head 8, since every token reads and writes
through them once. Norms, biases, routers and their thresholds, and what recursions have of their own stay in float32:
they are small, and a router decides by a sign.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mor_jax.config import ConfigError, ModelConfig, with_changes
from mor_jax.data import loader, schedule
from mor_jax.evaluation import held_out
from mor_jax.model import kernels, relaxation
from mor_jax.model.transformer import Transformer, parameter_axes
from mor_jax.parallel import rules
from mor_jax.quantisation import rounding, sensitivity
from mor_jax.runs.restore import LoadedRun

BITS = {'int8': 8, 'int4': 4}
ROWS = 64  # that scales are chosen on
ROWS_AT_ONCE = 4  # on each device


def quantise_run(
  run: LoadedRun,
  kind: str,
  mesh: Mesh,
  source: str | None = None,
  rows: int = ROWS,
  max_recursions: int | None = None,
  report: Callable[[str], None] = lambda line: None,
) -> LoadedRun:
  """The run with weights of 8 or 4 bits; low-rank changes that all recursions share are merged first.

  Args:
    kind: one of BITS.
    mesh: where the variables lie.
    source: documents or prepared dataset for the rows, as `held_out.open_data` reads them; None: the training split of
      the run. Of a converted model, which has none, scales are then those of the largest values.
    rows: that scales are chosen on; 0: they are those of the largest values.
    max_recursions: that tokens will take at most; None: all.
    report: is told what is done.

  Raises:
    ConfigError: the weights are quantised already, 4 bits do not fit them, or the data cannot be read.
  """
  check(run, kind)
  run = without_adapters(run)
  measured = None
  if rows and (source or not run.folder.is_converted):
    batches = itertools.islice(_batches(run, source, rows, report), -(-rows // _at_once()))
    report(f'scales of {kind} are chosen on {rows} rows of {source or "the training split"}')
    measured = sensitivity.measure(run.config, run.variables, batches, mesh, max_recursions)
  else:
    report(
      f'scales of {kind} are those of the largest values; --weights_data names text to choose better ones on'
    )
  return dataclasses.replace(run, variables=quantised(run.config.model, run.variables, kind, measured, mesh))


def check(run: LoadedRun, kind: str) -> None:
  """Raises ConfigError if the weights are quantised already, or 4 bits do not fit them."""
  if kind_of(run.variables) is not None:
    raise ConfigError(
      f'--weights={kind}: the weights of {run.folder.path} are in {kind_of(run.variables)} already; leave it out, or name '
      f'the run that they were made of'
    )
  if kind == 'int4':
    for inputs in (run.config.model.d_model, run.config.model.mlp_dim):
      rounding.group_rows(inputs)


def without_adapters(run: LoadedRun) -> LoadedRun:
  """The run with low-rank changes merged that are the same in all recursions; those of single recursions stay."""
  if not run.config.model.adapted_parts:
    return run
  plain = {'lora_rank': 0, 'lora_sharing': 'own', 'lora_layers': 'shared'}
  params = relaxation.merged(run.config.model, run.variables['params'])
  config = with_changes(run.config, model=plain, train={'trainable': 'all', 'stages': None})
  return dataclasses.replace(
    run, config=config, model=Transformer(config.model), variables={**run.variables, 'params': params}
  )


def quantised(
  config: ModelConfig,
  variables: dict[str, Any],
  kind: str,
  measured: dict[str, np.ndarray] | None = None,
  mesh: Mesh | None = None,
) -> dict[str, Any]:
  """The variables with kernels, embedding and head quantised.

  Args:
    measured: moments of the inputs of each kernel by its path (`sensitivity.measure`); None: every value is rounded by itself,
      with scales of the largest values.
    mesh: where they shall lie, as parameters do in training; None: where they lie.
  """
  layers = set(sensitivity.kernel_paths(variables['params']))

  def change(path, leaf):
    if path in layers:
      return rounding.quantise(leaf, BITS[kind], None if measured is None else measured[path])
    if path == 'head/kernel':
      return rounding.quantise(leaf, 8)
    return rounding.by_row(leaf) if path.startswith('embed/') else leaf

  params = kernels.map_paths(change, variables['params'])
  if mesh is not None:
    params = jax.device_put(params, rules.shardings(mesh, params, parameter_axes(config)))
  return {**variables, 'params': params}


def kind_of(variables: dict[str, Any]) -> str | None:
  """'int8' or 'int4', that of the kernels of the layers; None: they are not quantised."""
  leaves = jax.tree.leaves(variables['params']['block'], is_leaf=kernels.is_kernel)
  found = [leaf for leaf in leaves if isinstance(leaf, kernels.Quantised)]
  return None if not found else 'int4' if found[0].is_packed else 'int8'


def resident_bytes(variables: dict[str, Any]) -> int:
  """Bytes of all variables."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(variables))


def _batches(run, source, rows, report) -> Iterator[loader.Batch]:
  try:
    if source is not None:
      return loader.validation_batches(held_out.open_data(run, source, report), _at_once(), rows)
    dataset = loader.open_dataset(run.config.data, report)
  except ConfigError as error:
    raise ConfigError(
      f'--weights: rows to choose scales on cannot be read ({error}); name others with --weights_data, or give '
      f'--weights_rows=0'
    ) from None
  first = run.rows_read // _at_once()  # rows not trained on yet
  return loader.train_batches(dataset, run.config.data, schedule.constant(_at_once()), start_step=first)


def _at_once() -> int:
  return ROWS_AT_ONCE * len(jax.devices())
