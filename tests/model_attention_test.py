"""Attention backends against the reference, and rotation against its defining property."""

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mor_jax.config import ConfigError, ParallelConfig
from mor_jax.model import attention, attention_pallas, attention_splash, attention_xla
from mor_jax.model.context import TokenContext
from mor_jax.model.rotary import rotate, rotation
from mor_jax.model.transformer import Transformer, abstract_variables, parameter_axes
from mor_jax.parallel import mesh as mesh_lib
from mor_jax.parallel import rules
from mor_jax.planning import topology
from tests import backends, tiny


@dataclasses.dataclass(frozen=True)
class Case:
  """Rows of packed documents with padding, of which some tokens attend, to one another or to the whole row."""

  length: int
  chosen: int | None = None  # queries in a row, at random; None: all
  to_row: bool = False  # keys are those of the whole row
  left_out: bool = False  # some of the queries take no part
  window: int | None = None

  def make(self):
    """q, k, v, the cotangent, contexts of queries and keys (None: the same), and which outputs count."""
    rng = np.random.default_rng(self.length)
    rows, length = 2, self.length
    segments_BS = np.sort(rng.integers(1, 5, (rows, length)), axis=1)
    segments_BS[0] = 1
    segments_BS[1, -(length // 6) :] = 0
    starts_BS = np.diff(segments_BS, axis=1, prepend=-1) != 0
    index_S = np.arange(length)
    positions_BS = index_S - np.maximum.accumulate(np.where(starts_BS, index_S, 0), axis=1)
    row = TokenContext(jnp.asarray(positions_BS), jnp.asarray(segments_BS))
    count = self.chosen or length
    indices_BC = jnp.asarray(np.stack([np.sort(rng.permutation(length)[:count]) for _ in range(rows)]))
    queries = row.take(indices_BC)
    if self.left_out:
      queries = queries.only(jnp.asarray(rng.random((rows, count)) < 0.7))
    keys = row if self.to_row else None
    size = length if self.to_row else count
    q, target = (rng.normal(size=(rows, count, 6, 8)).astype(np.float32) for _ in 'qt')
    k, v = (rng.normal(size=(rows, size, 2, 8)).astype(np.float32) for _ in 'kv')
    counts_BC11 = np.asarray(queries.segments_BC > 0)[..., None, None]
    return q, k, v, np.where(counts_BC11, target, 0), queries, keys, counts_BC11


CASES = {
  'all': Case(40),
  'gathered': Case(40, chosen=23),
  'gathered, some left out': Case(40, chosen=23, left_out=True),
  'to the row': Case(40, chosen=23, to_row=True),
  'to the row, some left out': Case(40, chosen=23, to_row=True, left_out=True),
  'all to the row': Case(40, to_row=True, left_out=True),
  'window': Case(40, window=7),
  'gathered, window': Case(40, chosen=23, window=7),
  'to the row, window': Case(40, chosen=23, to_row=True, left_out=True, window=7),
}


def assert_equals_reference(attend, case: Case, tolerance: float = 2e-5) -> None:
  """Values and gradients of the tokens that count, float32."""
  q, k, v, target, queries, keys, counts_BC11 = case.make()

  def run(attend):
    def loss(q, k, v):
      out_BCHE = attend(q, k, v, queries, keys, window=case.window)
      return (out_BCHE * target).sum(), jnp.where(counts_BC11, out_BCHE, 0)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

  def reference(*arguments, window):
    return attention.attend(*arguments, backend='reference', window=window)

  chex.assert_trees_all_close(run(attend), run(reference), atol=tolerance, rtol=1e-5)


@pytest.mark.parametrize('case', CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize('blocks', ['one block', 'blocks', 'blocks one by one'])
def test_blocks_equal_the_reference(case, blocks, monkeypatch):
  """Also where the length is no multiple of the block."""
  if blocks != 'one block':
    monkeypatch.setattr(attention_xla, 'BLOCK', 9)
  if blocks == 'blocks one by one':
    monkeypatch.setattr(attention_xla, 'AT_ONCE', 0)
  assert_equals_reference(partial(attention.attend, backend='xla'), case)


KERNELS = {
  # Slow ones say nothing new while the others pass.
  'all': (Case(40), True),
  'gathered': (Case(40, chosen=23), True),
  'to the row': (Case(40, chosen=23, to_row=True), True),
  'to the row, some left out': (Case(43, chosen=23, to_row=True, left_out=True), False),
  'all to the row': (Case(40, to_row=True, left_out=True), True),
  'window': (Case(40, window=11), True),
  'to the row, window': (Case(43, chosen=23, to_row=True, left_out=True, window=11), True),
}


@pytest.mark.parametrize(
  'case',
  [
    pytest.param(case, id=name, marks=[pytest.mark.slow] if slow else [])
    for name, (case, slow) in KERNELS.items()
  ],
)
def test_the_kernel_for_queries_of_a_row_equals_the_reference(case):
  """Interpreted, in blocks of 8."""

  def attend(q, k, v, queries, keys, window):
    keys = queries if keys is None else keys
    return attention_pallas.attend(q, k, v, queries, keys, interpret=True, smallest_block=8, window=window)

  assert_equals_reference(attend, case)


def test_blocks_that_no_query_sees_are_left_out():
  """Of a row of one document the later half; of two documents what crosses between them, too."""
  positions_BC, one = jnp.arange(32)[None], jnp.ones((1, 32), int)
  sizes = attention_pallas.Blocks(8, 8)
  visit_IJ = attention_pallas.visited(sizes, (positions_BC, one), (positions_BC, one))[0][0]
  np.testing.assert_array_equal(visit_IJ, np.tril(np.ones((4, 4))))
  ids = positions_BC % 16, 1 + positions_BC // 16
  visit_IJ, fetch_IJ = (table[0] for table in attention_pallas.visited(sizes, ids, ids))
  np.testing.assert_array_equal(visit_IJ, [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]])
  np.testing.assert_array_equal(fetch_IJ, [[0, 0, 0, 0], [0, 1, 1, 1], [0, 0, 2, 2], [0, 0, 2, 3]])


def test_blocks_before_the_window_are_left_out():
  """The first query of a block sees 9 positions, hence a key of the block before; with 10, also one before that."""
  ids = jnp.arange(32)[None], jnp.ones((1, 32), int)
  for window, blocks in ((9, 1), (10, 2)):
    sizes = attention_pallas.Blocks(8, 8, window=window)
    visit_IJ = attention_pallas.visited(sizes, ids, ids)[0][0]
    np.testing.assert_array_equal(visit_IJ, np.tril(np.ones((4, 4))) - np.tril(np.ones((4, 4)), -1 - blocks))


@pytest.mark.parametrize(
  'case',
  [Case(150, chosen=131, left_out=True), pytest.param(Case(128), marks=pytest.mark.slow)],
  ids=['gathered, some left out', 'all'],
)
def test_splash_equals_the_reference(case):
  """Interpreted, in blocks of 128."""

  def attend(q, k, v, queries, keys, window):
    assert keys is window is None
    return attention_splash.attend(q, k, v, queries, interpret=True)

  assert_equals_reference(attend, case)


def test_cudnn_gets_what_it_takes(monkeypatch):
  """Even sizes and a mask; what XLA makes of them is the reference's result. (There is no GPU here.)"""
  backends.run_anywhere(monkeypatch)
  assert_equals_reference(attention.BACKENDS['cudnn'], Case(41, chosen=23, to_row=True, window=9))


def test_auto_is_what_the_platform_is_best_at():
  half, single = jnp.bfloat16, jnp.float32
  assert attention.fastest('tpu', single, 64) == 'splash'
  assert attention.fastest('gpu', half, 64) == 'cudnn'
  assert [attention.fastest(*of) for of in (('gpu', single, 64), ('gpu', half, 192), ('cpu', half, 64))] == [
    'xla',
    'xla',
    'xla',
  ]
  assert attention.fastest(None, half, 64) == 'xla'


def test_backends_of_another_platform_are_refused():
  x, tokens = jnp.zeros((1, 2, 1, 4)), TokenContext(jnp.zeros((1, 2), int), jnp.ones((1, 2), int))
  with pytest.raises(ValueError, match="'splash' needs a TPU, and this is cpu; use auto, xla or reference"):
    attention.attend(x, x, x, tokens, backend='splash')
  mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
  with pytest.raises(ConfigError, match=r'^model\.attention=cudnn needs a GPU, and this is cpu; use auto'):
    mesh_lib.check_model(mesh, tiny.config(attention='cudnn'))
  assert 'set dtype=bfloat16 or use xla' in attention.unfit('cudnn', 'gpu', jnp.float32, 64)


@pytest.mark.aot
@pytest.mark.parametrize('kv', ['recursion_wise', 'shared'])
def test_tpus_keep_no_scores(kv):
  """Gradients of a model compiled for TPUs take less memory than the scores of one of its heads would.

  Rows and heads are split over devices, so that each must run the kernels for its own.
  """
  pytest.importorskip('libtpu')
  topology.prepare()
  mesh = mesh_lib.make_mesh(ParallelConfig(replica=1, fsdp=2, tensor=2), topology.devices('v5e:2x2'))
  model = Transformer(tiny.config(kv=kv, vocab_size=64, num_layers=4, num_recursions=2, head_dim=64))
  row = mesh_lib.batch_sharding(mesh)

  length = 8192
  tokens_BT = jax.ShapeDtypeStruct((2, length), jnp.int32, sharding=row)
  params = nn.unbox(abstract_variables(model.config))['params']
  params = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    params,
    rules.shardings(mesh, params, parameter_axes(model.config)),
  )

  def loss(params, tokens_BT):
    return model.apply({'params': params}, tokens_BT, with_logits=False).hidden.sum()

  compiled = jax.jit(rules.on_mesh(mesh, jax.grad(loss))).lower(params, tokens_BT).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 2 * length**2, (
    'as much as scores of one head in bfloat16'
  )


@pytest.mark.parametrize('count', [2048, 1024], ids=['all', 'gathered, to the row'])
def test_cpus_keep_no_scores_of_long_rows(count):
  """The gradient takes less memory than all scores do, of which the reference holds several copies."""
  row, queries = (
    TokenContext(*(jax.ShapeDtypeStruct((1, length), jnp.int32),) * 2) for length in (2048, count)
  )
  q, k = (jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32) for length in (count, 2048))
  scores = 4 * 2 * count * 2048

  def temporaries(backend):
    attend = partial(attention.attend, backend=backend)
    gradient = jax.grad(lambda *arguments: attend(*arguments).sum(), argnums=(0, 1, 2))
    return jax.jit(gradient).lower(q, k, k, queries, row).compile().memory_analysis().temp_size_in_bytes

  assert temporaries('xla') < 0.7 * scores
  assert temporaries('reference') > 2 * scores


def test_only_the_past_of_the_same_segment_is_visible():
  tokens = TokenContext(jnp.array([[0, 3, 5, 0, 2]]), jnp.array([[1, 1, 1, 2, 2]]))
  expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
  np.testing.assert_array_equal(attention_xla.visible(tokens, tokens)[0], np.array(expected, bool))
  expected[2][:2] = 0, 1  # position 3 is two before position 5
  expected[1][0] = 0
  np.testing.assert_array_equal(attention_xla.visible(tokens, tokens, window=3)[0], np.array(expected, bool))


def test_windows_on_tpus_are_for_the_kernel_that_knows_positions(monkeypatch):
  """JAX's kernel would count places among gathered tokens."""
  backends.run_anywhere(monkeypatch)
  assert_equals_reference(attention.BACKENDS['splash'], Case(40, chosen=23, window=7))


def test_unknown_backend_is_refused():
  x, tokens = jnp.zeros((1, 2, 1, 4)), TokenContext(jnp.zeros((1, 2), int), jnp.ones((1, 2), int))
  with pytest.raises(ValueError, match="unknown attention backend 'flash'"):
    attention.attend(x, x, x, tokens, backend='flash')


def test_rotation_depends_on_distance_only():
  rng, config = np.random.default_rng(0), tiny.config(head_dim=16)
  q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 16)), jnp.float32) for _ in range(2))

  def score(query_position, key_position):
    rotated_q = rotate(q, rotation(config, jnp.array([[query_position]])))
    rotated_k = rotate(k, rotation(config, jnp.array([[key_position]])))
    return float((rotated_q * rotated_k).sum())

  np.testing.assert_allclose(score(9, 4), score(105, 100), rtol=1e-4)
  assert abs(score(9, 4) - score(9, 5)) > 1e-3
  np.testing.assert_allclose(score(7, 7), float((q * k).sum()), rtol=1e-5)
