"""Loss, gradients and communication of a model on meshes of 8 devices; a program, since tests have one device.

  python tests/mesh_check.py '[{"mesh": [1, 8, 1], "model": {"num_recursions": 2}, "local": true}, ...]'

For each case it prints a line of JSON: 'loss'; 'error', the largest difference of a gradient from the first case of
the same model, relative to the gradient's largest value; 'bytes', of collectives by kind. A mesh is (replica, fsdp,
tensor); `local` false leaves routing to the compiler; 'chunk' is train.loss_chunk. With 'init' it also prints what
making the state at step 0 takes: 'state', bytes of all of it, and 'init', the most that a device holds on the way.
"""

import functools
import json
import sys
from typing import Any

import jax
import numpy as np
import tiny

from mor_jax.config import Config, ParallelConfig
from mor_jax.model.transformer import parameter_axes
from mor_jax.parallel import mesh as mesh_lib
from mor_jax.parallel import rules
from mor_jax.planning.collectives import collective_bytes
from mor_jax.training import loss as loss_lib
from mor_jax.training.optimizer import make_optimizer
from mor_jax.training.state import SEED, initializer

ROWS, LENGTH = 8, 16
SMALL = 2000  # bytes of sums for loss, normalizers and metrics


def batch() -> dict[str, np.ndarray]:
  """Rows of two documents each, the last row with padding."""
  index_T, cuts_B1 = np.arange(LENGTH), np.arange(3, 3 + ROWS)[:, None]
  second_BT = index_T >= cuts_B1
  segments_BT = 1 + second_BT.astype(np.int32)
  segments_BT[-1, -3:] = 0
  positions_BT = (index_T - second_BT * cuts_B1).astype(np.int32)
  tokens_BT = np.asarray(tiny.tokens(ROWS, LENGTH))
  return {'tokens': tokens_BT, 'segment_ids': segments_BT, 'positions': positions_BT}


def loss_and_gradient(
  model: dict[str, Any], shape: list[int], chunk: int
) -> tuple[float, Any, dict[str, int]]:
  """Loss, gradients on the host, and bytes of collectives of the program for that mesh."""
  mesh = mesh_lib.make_mesh(ParallelConfig(*shape), jax.devices()[: int(np.prod(shape))])
  made, variables = tiny.model(**{'vocab_size': 64, **model})
  loss, names = loss_lib.make_loss(made.apply, made.config, chunk, mesh), parameter_axes(made.config)

  def compute(params, batch):
    whole = loss_lib.normalizers(made.config, {'segment_ids': batch['segment_ids'][None]})
    routing, key = variables.get('routing', {}), jax.random.key(0)
    (value, _), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, whole, routing, key)
    return value, rules.laid_out(mesh, grads, names)

  params = jax.device_put(variables['params'], rules.shardings(mesh, variables['params'], names))
  rows = mesh_lib.put(batch(), mesh_lib.batch_sharding(mesh))
  compiled = jax.jit(rules.on_mesh(mesh, compute)).lower(params, rows).compile()
  value, grads = jax.device_get(compiled(params, rows))
  return float(value), grads, collective_bytes(compiled.as_text())


def bytes_of_initialisation(model: dict[str, Any], shape: list[int]) -> dict[str, int]:
  """Bytes of a training's state, and those that one device needs to make its part."""
  mesh = mesh_lib.make_mesh(ParallelConfig(*shape))
  made = tiny.model(**{'vocab_size': 64, **model})[0]
  initialize = initializer(made, make_optimizer(Config().train), mesh, LENGTH)
  memory = initialize.lower(SEED).compile().memory_analysis()
  leaves = jax.tree.leaves(jax.eval_shape(initialize, SEED))
  whole = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
  return {'state': whole, 'init': memory.output_size_in_bytes + memory.temp_size_in_bytes}


def communicates_no_more(found: dict[str, int], reference: dict[str, int]) -> bool:
  """Whether there are no other kinds of collectives and of each no more bytes, but for a few sums."""
  return all(size <= reference.get(kind, 0) + SMALL for kind, size in found.items())


def main(cases: list[dict[str, Any]]) -> None:
  jax.config.update('jax_num_cpu_devices', 8)
  expected, shard_map = {}, jax.shard_map

  def only_the_loss(function, mesh=None, **options):
    return shard_map(function, mesh=mesh, **options) if mesh is not None else function

  for case in cases:
    model = {
      name: tuple(value) if isinstance(value, list) else value
      for name, value in case.get('model', {}).items()
    }
    jax.shard_map = shard_map if case.get('local', True) else only_the_loss
    loss, grads, num_bytes = loss_and_gradient(model, case['mesh'], case.get('chunk', 0))
    first = expected.setdefault(json.dumps(model), grads)
    errors = jax.tree.map(lambda one, other: np.abs(one - other).max() / np.abs(other).max(), grads, first)
    error = float(functools.reduce(max, jax.tree.leaves(errors)))
    more = bytes_of_initialisation(model, case['mesh']) if case.get('init') else {}
    print(json.dumps({'loss': loss, 'error': error, 'bytes': num_bytes, **more}), flush=True)


if __name__ == '__main__':
  main(json.loads(sys.argv[1]))
