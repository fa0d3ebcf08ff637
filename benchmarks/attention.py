"""Attention backends and the vocabulary loss, forward and backward: time and memory here, memory on a TPU.

  python -m benchmarks.attention [--rounds=15] [--rows=4] [--heads=6] [--lengths=512,2048] [--topology=v5p:1x1x1]

Measures self-attention of all tokens, and attention of half of the tokens to all (shared keys and values), with
64-dimensional heads in float32. The loss covers the same number of tokens over --vocabulary entries. The ways
alternate in one process, and the table shows medians. "all at once" is two plain products with the scores of all
queries and keys. TPU kernels are only compiled. Writes benchmarks/results/attention.json and .md.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console
from rich.progress import track

from benchmarks import results
from mor_jax import cli
from mor_jax.model import attention, attention_xla
from mor_jax.model.context import TokenContext
from mor_jax.parallel import mesh as mesh_lib
from mor_jax.parallel import rules
from mor_jax.planning import topology
from mor_jax.training import vocabulary_loss

FLAGS = flags.FLAGS
flags.DEFINE_integer('rounds', 15, 'runs of every way that are timed')
flags.DEFINE_integer('rows', 4, 'rows of a batch')
flags.DEFINE_integer('heads', 6, 'query and key heads')
flags.DEFINE_integer('vocabulary', 4096, 'entries of the vocabulary')
flags.DEFINE_list('lengths', ['512', '2048'], 'tokens of a row')
flags.DEFINE_string('topology', 'v5p:1x1x1', 'TPU to compile for; empty: none')

WIDTH = 64


def all_at_once(q_BTHE, k_BSKE, v_BSKE, queries, keys=None):
  """Attention in one block: all queries against all keys, keeping the attention weights."""
  q_BHTE, v_BHSE = (a.transpose(0, 2, 1, 3) for a in (q_BTHE * WIDTH**-0.5, v_BSKE))
  scores_BHTS = jnp.matmul(q_BHTE, k_BSKE.transpose(0, 2, 3, 1), preferred_element_type=jnp.float32)
  visible_BTS = attention_xla.visible(queries, queries if keys is None else keys)
  scores_BHTS = jnp.where(visible_BTS[:, None], scores_BHTS, attention_xla.MASKED_SCORE)
  weights_BHTS = jax.nn.softmax(scores_BHTS).astype(v_BSKE.dtype)
  return jnp.matmul(weights_BHTS, v_BHSE).transpose(0, 2, 1, 3)


ATTENTION = {
  'all at once': all_at_once,
  **{name: partial(attention.attend, backend=name) for name in ('reference', 'xla', 'splash')},
}
LOSSES = {'all logits': 0, **{f'chunks of {chunk}': chunk for chunk in (128, 512, 2048)}}


def main() -> None:
  """Measures and writes the table."""
  topology.prepare()
  rows = []
  for length in map(int, FLAGS.lengths):
    rows += _attention(length, length)
    rows += _attention(length, length // 2)
    rows += _loss(length)
  used = {name: FLAGS[name].value for name in ('rounds', 'rows', 'heads', 'vocabulary', 'topology')}
  columns = ('what', 'way', 'median, ms', 'least, ms', 'temporaries, MB', 'temporaries on the TPU, MB')
  table = results.keep('attention', columns, rows, used)
  Console().print(table, highlight=False, soft_wrap=True)


def _attention(length: int, count: int) -> Iterator[list]:
  rng = np.random.default_rng(length)
  places_BC = np.stack([np.sort(rng.permutation(length)[:count]) for _ in range(FLAGS.rows)]).astype(np.int32)
  row = TokenContext(*(np.broadcast_to(a, (FLAGS.rows, length)) for a in (np.arange(length), np.int32(1))))
  queries = TokenContext(places_BC, np.ones_like(places_BC))
  q, target = (_normal(rng, FLAGS.rows, count, FLAGS.heads, WIDTH) for _ in 'qt')
  k, v = (_normal(rng, FLAGS.rows, length, FLAGS.heads, WIDTH) for _ in 'kv')

  def program(way: Callable):
    def loss(q, k, v, target, queries, row):
      keys = None if count == length else row
      return (way(q, k, v, queries, keys) * target).sum()

    return jax.value_and_grad(loss, argnums=(0, 1, 2))

  what = f'{length} tokens' if count == length else f'{count} of {length} tokens to all'
  for name, figures in _measure(ATTENTION, program, (q, k, v, target, queries, row), what):
    yield [f'attention, {what}', name, *figures]


def _loss(length: int) -> Iterator[list]:
  rng = np.random.default_rng(length)
  width = FLAGS.heads * WIDTH
  x_BTD, kernel_DV = _normal(rng, FLAGS.rows, length, width), _normal(rng, width, FLAGS.vocabulary) * 0.02
  targets_BT = rng.integers(1, FLAGS.vocabulary, (FLAGS.rows, length)).astype(np.int32)

  def program(chunk: int):
    def loss(x_BTD, kernel_DV, targets_BT):
      per_token = targets_BT, targets_BT > 0
      return vocabulary_loss.sum_over_tokens(
        vocabulary_loss.next_token_nll, x_BTD, kernel_DV, per_token, chunk
      )

    return jax.value_and_grad(loss, argnums=(0, 1))

  for name, figures in _measure(LOSSES, program, (x_BTD, kernel_DV, targets_BT), f'loss, {length}'):
    yield [f'loss, {FLAGS.rows} x {length} tokens', name, *figures]


def _normal(rng, *shape):
  return rng.normal(size=shape).astype(np.float32)


def _measure(ways: dict, program: Callable, arguments: tuple, what: str) -> Iterator[tuple[str, list]]:
  """Checks that all ways agree; yields (name, [median ms, minimum ms, MB of temporaries, the same on TPU])."""
  placed = jax.device_put(arguments)
  here = {name: way for name, way in ways.items() if attention.PLATFORMS.get(name, 'cpu') == 'cpu'}
  compiled = {name: jax.jit(program(way)).lower(*placed).compile() for name, way in here.items()}
  first = next(iter(compiled.values()))(*placed)
  for name, run in compiled.items():
    for one, other in zip(jax.tree.leaves(run(*placed)), jax.tree.leaves(first), strict=True):
      np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-4, err_msg=name)
  seconds = {name: [] for name in compiled}
  for _ in track(range(FLAGS.rounds), what):
    for name, run in compiled.items():
      begin = time.perf_counter()
      jax.block_until_ready(run(*placed))
      seconds[name].append(time.perf_counter() - begin)
  for name, way in ways.items():
    figures = ['', '', '']
    if name in compiled:
      temporaries = compiled[name].memory_analysis().temp_size_in_bytes
      figures = [f'{statistics.median(seconds[name]) * 1e3:.1f}', f'{min(seconds[name]) * 1e3:.1f}']
      figures.append(f'{temporaries / 1e6:.1f}')
    yield name, [*figures, _on_tpu(program(way), placed)]


def _on_tpu(function: Callable, arguments: tuple) -> str:
  if not FLAGS.topology:
    return ''
  mesh = mesh_lib.make_mesh(devices=topology.devices(FLAGS.topology)[:1])
  whole = NamedSharding(mesh, PartitionSpec())
  shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), arguments)
  compiled = jax.jit(rules.on_mesh(mesh, function)).lower(*shapes).compile()
  return f'{compiled.memory_analysis().temp_size_in_bytes / 1e6:.1f}'


if __name__ == '__main__':
  cli.run(main, __doc__, with_config=False)
