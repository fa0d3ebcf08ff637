"""Ways to select tokens and to move them, timed on this machine and compiled for a TPU.

  python -m benchmarks.selection [--rounds=30] [--rows=4] [--width=384] [--lengths=512,1024,2048] [--topology=v5p:1x1x1]

The benchmark checks that all selections agree exactly, ties included, and that both movements agree within 1e-4.
The ways alternate in one process, and the table shows medians. Selections that are slower than those in
`mor_jax/model/tokens.py` exist only here. Movement takes tokens out of their rows, multiplies them and adds them
back; it is timed with its gradient. TPU figures are the compiler's estimates. Writes
benchmarks/results/selection.json and .md.
"""

import statistics
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.progress import track

from benchmarks import results
from mor_jax import cli
from mor_jax.model import tokens
from mor_jax.planning import topology

FLAGS = flags.FLAGS
flags.DEFINE_integer('rounds', 30, 'runs of every way that are timed')
flags.DEFINE_integer('rows', 4, 'rows of a batch')
flags.DEFINE_integer('width', 384, 'model width')
flags.DEFINE_list('lengths', ['512', '1024', '2048'], 'tokens of a row; half of them are chosen')
flags.DEFINE_string('topology', 'v5p:1x1x1', 'TPU to compile for; empty: none')


# ---- which tokens ----
def stable_sort(scores_BT: jax.Array, count: int) -> jax.Array:
  """A stable sort by descending score, then a sort of the selected positions."""
  return jnp.sort(jnp.argsort(-scores_BT, axis=-1, stable=True)[:, :count], axis=-1)


def bisect_and_search(scores_BT: jax.Array, count: int) -> jax.Array:
  """Finds the threshold by bisection, then every position by binary search in the running count."""
  running_BT = jnp.cumsum(tokens.highest(scores_BT, count), axis=-1, dtype=jnp.int32)
  wanted_C = jnp.arange(1, count + 1, dtype=jnp.int32)
  return jax.vmap(lambda running_T: jnp.searchsorted(running_T, wanted_C))(running_BT).astype(jnp.int32)


def bisect_and_sort(scores_BT: jax.Array, count: int) -> jax.Array:
  """Finds the threshold by bisection, then sorts the positions with the unselected ones last."""
  length = scores_BT.shape[1]
  index_BT = jnp.arange(length, dtype=jnp.int32) + jnp.where(tokens.highest(scores_BT, count), 0, length)
  return jnp.sort(index_BT, axis=-1)[:, :count]


# ---- how they move ----
def moved(way: tokens.Movement, x_BTD: jax.Array, indices_BC: jax.Array, scale: jax.Array) -> jax.Array:
  """Takes tokens out, scales them and adds them back, as a recursion step does."""
  return way.add(x_BTD, indices_BC, way.take(x_BTD, indices_BC) * scale)


SELECTIONS = {
  'top_k, sort': tokens.by_top_k,
  'stable sort': stable_sort,
  'bisection, search': bisect_and_search,
  'bisection, scatter': tokens.by_threshold,
  'bisection, sort': bisect_and_sort,
}
MOVEMENTS = {'scatter': tokens.SCATTERING, 'gather': tokens.GATHERING}


def main() -> None:
  """Measures and writes the table."""
  topology.prepare()
  rows = [row for length in FLAGS.lengths for kind in (_selection, _movement) for row in kind(int(length))]
  used = {name: FLAGS[name].value for name in ('rounds', 'rows', 'width', 'topology')}
  columns = ('tokens', 'what', 'way', 'median, ms', 'least, ms', 'TPU estimate, us', 'TPU bytes accessed, MB')
  Console().print(results.keep('selection', columns, rows, used), highlight=False, soft_wrap=True)


def _selection(length: int) -> Iterator[list]:
  scores_BT = np.random.default_rng(length).normal(size=(FLAGS.rows, length)).astype(np.float32)
  scores_BT = np.where(np.arange(length) % 7 == 0, 0.25, scores_BT)  # ties
  scores_BT[:, ::5] = -np.inf  # tokens that have left
  count = length * 9 // 10  # the border lies among those that have left: ties there, too
  for name, found, figures in _measure(SELECTIONS, lambda way: lambda s: way(s, count), (scores_BT,)):
    np.testing.assert_array_equal(found, tokens.by_top_k(scores_BT, count), err_msg=name)
    yield [length, 'choose', name, *figures]


def _movement(length: int) -> Iterator[list]:
  rng = np.random.default_rng(length)
  x_BTD = rng.normal(size=(FLAGS.rows, length, FLAGS.width)).astype(np.float32)
  chosen = [np.sort(rng.permutation(length)[: length // 2]) for _ in range(FLAGS.rows)]
  arguments = x_BTD, np.stack(chosen).astype(np.int32), rng.normal(size=FLAGS.width).astype(np.float32)

  def gradient(way: tokens.Movement):
    def loss(x_BTD, indices_BC, scale):
      return jnp.square(moved(way, x_BTD, indices_BC, scale)).sum()

    return jax.grad(loss, argnums=(0, 2))

  expected = jax.jit(gradient(tokens.SCATTERING))(*arguments)
  for name, found, figures in _measure(MOVEMENTS, gradient, arguments):
    for one, other in zip(found, expected, strict=True):
      np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4, err_msg=name)
    yield [length, 'move', name, *figures]


def _measure(ways: dict[str, Callable], program: Callable, arguments: tuple) -> Iterator[tuple]:
  """Yields (name, result, [median ms, minimum ms, TPU estimate in us, MB accessed on TPU]) for every way."""
  placed = jax.device_put(arguments)
  compiled = {name: jax.jit(program(way)).lower(*placed).compile() for name, way in ways.items()}
  seconds = {name: [] for name in ways}
  for _ in track(range(FLAGS.rounds + 1), f'{arguments[0].shape}'):
    for name, run in compiled.items():
      begin = time.perf_counter()
      jax.block_until_ready(run(*placed))
      seconds[name].append(time.perf_counter() - begin)
  for name, run in compiled.items():
    taken = seconds[name][1:]  # the first warms up
    times = [f'{statistics.median(taken) * 1e3:.3f}', f'{min(taken) * 1e3:.3f}']
    yield name, run(*placed), times + _on_tpu(program(ways[name]), placed)


def _on_tpu(function: Callable, arguments: tuple) -> list[str]:
  if not FLAGS.topology:
    return ['', '']
  device = jax.sharding.SingleDeviceSharding(topology.devices(FLAGS.topology)[0])
  shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device) for a in arguments]
  cost = jax.jit(function).lower(*shapes).compile().cost_analysis()
  return [f'{cost.get("optimal_seconds", 0) * 1e6:.1f}', f'{cost.get("bytes accessed", 0) / 1e6:.2f}']


if __name__ == '__main__':
  cli.run(main, __doc__, with_config=False)
