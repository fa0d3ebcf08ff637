"""Decoding on meshes of 8 devices; a program, since tests have one device.

  python tests/decode_mesh_check.py '[{"mesh": [1, 8, 1], "model": {"num_recursions": 2}}, ...]'

For each case it prints a line of JSON: 'tokens' and 'depths' of every request, 'occupancy' of the slots, 'devices' that
hold a part of the caches, 'collectives': of the programs that ran ('ticks', 'drafts', 'prefill', 'insert', 'release'),
pairs of kind and bytes of each, and 'slot', bytes of the smallest part of one slot's keys that a device holds. A mesh is (replica, fsdp,
tensor), or null for an engine without one, which never drafts; with a mesh it does if its options say so. With 'weights' those of
the model are quantised. 'left': collectives of 'insert' if it were left to the compiler.
"""

import contextlib
import json
import sys
from typing import Any
from unittest import mock

import jax
import numpy as np
import tiny
import tiny_engine

from mor_jax.config import ParallelConfig
from mor_jax.inference import engine as engine_lib
from mor_jax.inference import prefill, shards, speculation, ticks
from mor_jax.inference.scheduler import Scheduler
from mor_jax.parallel import mesh as mesh_lib
from mor_jax.parallel import rules
from mor_jax.planning import hlo
from mor_jax.planning.collectives import collectives
from mor_jax.quantisation import weights

LENGTHS = (1, 9, 4, 20, 1, 33, 2, 7, 8, 3)
PROGRAMS = {
  'ticks': (ticks, 'run'),
  'drafts': (speculation, 'run'),
  'prefill': (prefill, 'extend'),
  'insert': (engine_lib, '_insert'),
  'release': (engine_lib, '_release'),
}


class Recorder:
  """A compiled function that writes down the collectives of all its programs."""

  def __init__(self, function):
    self._function, self._programs = function, {}

  def __call__(self, *args):
    shapes = jax.tree.map(_shape, args)
    if str(shapes) not in self._programs:
      self._programs[str(shapes)] = shapes, _collectives(self._function.lower(*args))
    return self._function(*args)

  @property
  def is_used(self) -> bool:
    """Whether it was called."""
    return bool(self._programs)

  @property
  def found(self) -> list[tuple[str, int]]:
    """Kind and bytes of every collective."""
    return sorted({one for _, found in self._programs.values() for one in found})

  def left_to_compiler(self) -> list[tuple[str, int]]:
    """What `found` would be if the compiler split the program of one device, without shard_map."""
    with mock.patch.object(shards, 'run', _left_to_compiler):
      again = jax.jit(lambda *args: self._function.__wrapped__(*args), static_argnums=0)  # traced anew
      return sorted(
        {one for shapes, _ in self._programs.values() for one in _collectives(again.lower(*shapes))}
      )


def _shape(leaf):
  sharding = getattr(leaf, 'sharding', None)
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding) if hasattr(leaf, 'dtype') else leaf


def _collectives(lowered) -> list[tuple[str, int]]:
  found = collectives(hlo.parse(lowered.compile().as_text()))
  return sorted({(one.kind, one.bytes) for one in found})


def _left_to_compiler(mesh, function, whole, *split):
  first, more = rules.on_mesh(mesh, function)(whole, *split)
  return jax.lax.with_sharding_constraint(first, shards.shardings(mesh, first)), more


def measure(case: dict[str, Any]) -> dict[str, Any]:
  """What one case prints."""
  mesh = case['mesh'] and mesh_lib.make_mesh(ParallelConfig(*case['mesh']))
  made, variables = tiny.model(seed=9, **{'vocab_size': 64, **case['model']})
  if 'weights' in case:
    variables = weights.quantised(made.config, variables, case['weights'])
  engine = tiny_engine.engine(made, variables, slots=8, mesh=mesh, **case.get('options', {}))
  requests = tiny_engine.requests(LENGTHS, max_new_tokens=case.get('new_tokens', 15))
  scheduler = Scheduler(engine, ticks_per_call=16, drafting=mesh is not None)
  with contextlib.ExitStack() as stack:
    recorders = {name: Recorder(getattr(*place)) for name, place in PROGRAMS.items()}
    for name, place in PROGRAMS.items():
      stack.enter_context(mock.patch.object(*place, recorders[name]))
    results = scheduler.run(requests)
  cache = scheduler._state.cache
  keys = (cache.last if made.config.unique_ends else cache.block).keys
  return {
    'left': recorders['insert'].left_to_compiler() if mesh else [],
    'tokens': [result.tokens for result in results],
    'depths': [result.depths for result in results],
    'occupancy': scheduler.statistics.slot_occupancy,
    'devices': len({shard.device for shard in keys.addressable_shards if shard.data.shape != keys.shape}),
    'collectives': {name: recorder.found for name, recorder in recorders.items() if recorder.is_used},
    'bytes': sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(scheduler._state)),
    'state_bytes': engine.state_bytes(),
    'slot': int(np.prod(keys.addressable_shards[0].data.shape[2:])) * keys.dtype.itemsize,
  }


def main(cases: list[dict[str, Any]]) -> None:
  jax.config.update('jax_num_cpu_devices', 8)
  for case in cases:
    print(json.dumps(measure(case)), flush=True)


if __name__ == '__main__':
  main(json.loads(sys.argv[1]))
