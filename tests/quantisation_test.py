"""Weights in 8 and 4 bits: products, scales by the activations of all recursions, engines, folders."""

import functools

import entry_points
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from mor_jax.config import ConfigError, with_changes
from mor_jax.inference import ticks
from mor_jax.interop import sources
from mor_jax.model import kernels
from mor_jax.model.transformer import Transformer
from mor_jax.quantisation import rounding, sensitivity, weights
from mor_jax.runs.restore import LoadedRun, load_run
from tests import decoding_cases, tiny, tiny_engine

pytest.importorskip('qwix')
KINDS = ['int8', 'int4']
ENGINES = [
  pytest.param('expert relaxed', 'int4', marks=pytest.mark.slow),
  ('expert shared', 'int8'),
  pytest.param('benefit', 'int4', marks=pytest.mark.slow),
  ('token limited', 'int4'),
  pytest.param('vanilla shared', 'int8', marks=pytest.mark.slow),
  pytest.param('recursive sequence', 'int4', marks=pytest.mark.slow),
  pytest.param('expert hybrid', 'int8', marks=pytest.mark.slow),
  pytest.param('expert untied', 'int4', marks=pytest.mark.slow),
]


@pytest.mark.parametrize('bits', [8, 4])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_product_is_that_with_the_numbers_it_stands_for(bits, dtype):
  """With few rows, which a CPU multiplies with the integers, and with many; float32 to 1e-5, bfloat16 to its rounding."""
  rng = np.random.default_rng(0)
  kernel = rounding.quantise(rng.normal(size=(2, 96, 40)).astype(np.float32), bits)
  assert kernel.shape == (2, 96, 40)
  one = jax.tree.map(lambda leaf: leaf[1], kernel)
  tolerance = {'float32': 1e-5, 'bfloat16': 2e-2}[dtype]
  for rows in (1, 3, kernels.FEW_ROWS + 1):
    x = jnp.asarray(rng.normal(size=(rows, 96)), dtype)
    exact = np.asarray(x, np.float64) @ np.asarray(one.whole(), np.float64)
    y = jax.jit(kernels.product)(x, one)
    assert y.dtype == x.dtype
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, atol=tolerance * np.abs(exact).max())


@pytest.mark.parametrize('rows', [1, 4, kernels.FEW_ROWS + 1])
def test_a_tied_head_reads_the_rows_of_the_embedding(rows):
  """To 1e-4 of the largest logit, with inputs that are rounded to 15 bits where they are few."""
  rng = np.random.default_rng(0)
  table = rounding.by_row(jnp.asarray(rng.normal(size=(61, 32)), jnp.float32))
  x = rng.normal(size=(rows, 32)).astype(np.float32) * 10.0 ** np.arange(-1, 1)[rng.integers(0, 2, (rows, 1))]
  exact = x @ np.asarray(table.whole()).T
  found = jax.jit(kernels.Quantised.product_with_rows)(table, x)
  assert (np.abs(found - exact).max(1) < 1e-4 * np.abs(exact).max(1)).all()


@pytest.mark.parametrize('bits', [8, 4])
def test_integers_are_kept_to_their_range(bits):
  """With inputs that are independent each value is rounded to the nearest, and no scale is taken that costs more."""
  rng = np.random.default_rng(1)
  kernel = rng.normal(size=(64, 48)).astype(np.float32)
  found = rounding.quantise(kernel, bits, np.eye(64, dtype=np.float32))
  integers = np.asarray(found.integers(), np.int32)
  steps = np.repeat(np.asarray(found.scales, np.float32), 64 // found.scales.shape[0], axis=0)
  most = 2 ** (bits - 1)
  nearest = np.round(kernel / steps).clip(-most, most - 1)
  assert np.abs(nearest - integers).max() <= 1
  assert (nearest == integers).mean() > 0.99, 'all but what float16 turns'
  plain = rounding.quantise(kernel, bits)
  assert np.square(found.whole() - kernel).sum() <= np.square(plain.whole() - kernel).sum()
  few = integers.clip(-8, 7)
  np.testing.assert_array_equal(kernels.unpack(kernels.pack(jnp.asarray(few))), few)


@pytest.mark.parametrize(('kind', 'slots'), [('int8', 1), ('int8', kernels.FEW_ROWS + 1), ('int4', 1)])
def test_a_call_holds_no_kernels_as_floats(kind, slots):
  """A compiler may make floats of what does not change before the loop over ticks, and hold them until it ends."""
  made, variables = tiny.model(kind='vanilla', num_layers=8, mlp_dim=2048)
  floats = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
  small = weights.quantised(made.config, variables, kind)
  engine = tiny_engine.engine(made, small, slots=slots, max_len=8, unroll=True)
  call = engine.cached, engine.batches, None, engine.params, engine.init_state(), np.int32(2), np.int32(2)
  held = ticks.run.lower(*call).compile().memory_analysis().temp_size_in_bytes
  assert held < floats / 4


# ---- scales ----


def config_of(**model):
  """Settings of a small run without routers' noise."""
  return with_changes(tiny_run.CONFIG, model={**tiny.SHAPE, 'vocab_size': 257, **model})


def variables_of(config):
  """Variables of its model."""
  shape = {name: getattr(config.model, name) for name in config.model.__dataclass_fields__}
  changed = {name: value for name, value in shape.items() if value != getattr(tiny.config(), name)}
  return tiny.model(**{**tiny.SHAPE, **changed})[1]


def batches():
  """Four rows of text."""
  return [{name: value[:4] for name, value in tiny_run.rows().items()}]


@functools.cache
def shared_moments(max_recursions=None):
  """Of a recursive model that applies three layers twice, its variables and moments."""
  config = config_of(kind='recursive', sharing='cycle', num_recursions=2)
  variables = variables_of(config)
  return config, variables, sensitivity.measure(config, variables, batches(), tiny_run.MESH, max_recursions)


def unrolled_moments():
  """Of the model in which all six layers have parameters of their own, the same in both recursions."""
  config, variables, _ = shared_moments()
  vanilla = with_changes(config, model={'kind': 'vanilla'})
  twice = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), variables['params']['block'])
  params = {**variables['params'], 'block': twice}
  params.pop('steps', None)
  return sensitivity.measure(vanilla, {'params': params}, batches(), tiny_run.MESH)


def test_moments_are_the_sum_of_what_the_recursions_have():
  """Equal to 1e-4 to those of a model that has every layer twice, added up; those of one recursion alone are not."""
  found, apart = shared_moments()[2], unrolled_moments()
  for path, moments_NII in found.items():
    first, second = np.split(apart[path], 2)
    scale = np.abs(moments_NII).max()
    np.testing.assert_allclose(moments_NII, first + second, atol=1e-4 * scale)
    assert np.abs(moments_NII - first).max() > 0.01 * scale, 'one recursion alone would show nothing'


def cost(kernel, quantised, moments):
  """What the errors cost, trace(D^T M D) of each layer, added up."""
  error_NIO = np.asarray(quantised.whole()) - np.asarray(kernel)
  return float(np.einsum('nio,nij,njo->', error_NIO, moments, error_NIO))


@pytest.mark.parametrize('bits', [8, 4])
def test_rounding_looks_at_all_recursions(bits):
  """The second recursion meets other inputs: rounded for the first alone, kernels cost more than 1.1 times as much."""
  rng = np.random.default_rng(3)
  kernel = rng.normal(size=(1, 64, 48)).astype(np.float32)
  mixes = rng.normal(size=(2, 64, 64)) * np.array([1, 30])[:, None, None]
  mixes *= np.stack([np.arange(64) < 32, np.arange(64) >= 32])[
    :, None
  ]  # each recursion has channels of its own
  x = rng.normal(size=(2, 500, 64)) @ mixes + 0.3 * rng.normal(size=(2, 500, 64))
  first, both = x[0].T @ x[0], x[0].T @ x[0] + x[1].T @ x[1]
  costs = {
    name: cost(
      kernel, rounding.quantise(kernel, bits, None if of is None else of[None].astype(np.float32)), both[None]
    )
    for name, of in {'all': both, 'first': first, 'none': None}.items()
  }
  assert costs['first'] > 1.1 * costs['all']
  assert costs['none'] > 1.1 * costs['all']


@pytest.mark.parametrize('moments', [np.zeros((64, 64)), np.full((64, 64), 1e30), np.full((64, 64), -1.0)])
def test_moments_without_an_inverse_do_no_harm(moments):
  """Of kernels that no token met, or inputs that repeat one another: no value is further off than the range is wide."""
  kernel = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
  found = rounding.quantise(kernel, 4, moments.astype(np.float32))
  assert np.abs(np.asarray(found.whole()) - kernel).max() < np.abs(kernel).max()


def test_a_kernel_of_odd_size_has_no_4_bits():
  with pytest.raises(ConfigError, match='one of 33 rows has one left over; use --weights=int8'):
    rounding.quantise(np.zeros((33, 4), np.float32), 4)


# ---- models ----


@pytest.mark.parametrize(('name', 'kind'), ENGINES)
def test_engines_compute_what_the_quantised_model_does(name, kind):
  """Logits to 1e-4 in float32, of models whose layers are unrolled and scanned, relaxed, tied and shared."""
  case = decoding_cases.CASES[name]
  made, variables = decoding_cases.build(case)
  quantised = weights.quantised(made.config, variables, kind)
  scheduler, results = decoding_cases.decode(case, made, quantised)
  rows = tiny_engine.rows(made, quantised, results, decoding_cases.MAX_LEN, case.slack)
  tiny_engine.assert_as_full_forward(scheduler, rows)


@pytest.mark.parametrize('kind', KINDS)
def test_routers_norms_and_gates_stay_as_they_are(kind):
  made, variables = tiny.model(num_recursions=2, tie_embeddings=False, share_norms=False, lora_rank=2)
  found = weights.quantised(made.config, variables, kind)
  assert weights.kind_of(found) == kind
  assert weights.kind_of(variables) is None
  changed = []

  def compare(path, before, after):
    if isinstance(after, kernels.Quantised):
      changed.append((path, after.is_packed))
      return
    np.testing.assert_array_equal(before, after)

  flat = {}
  kernels.map_paths(lambda path, leaf: flat.update({path: leaf}), found['params'])
  kernels.map_paths(lambda path, leaf: compare(path, leaf, flat[path]), variables['params'])
  of_layers = [is_packed for path, is_packed in changed if path.startswith(('first', 'block', 'last'))]
  assert of_layers == [kind == 'int4'] * 21
  assert {
    path: is_packed for path, is_packed in changed if '/' in path and path.split('/')[0] in ('embed', 'head')
  } == {
    'embed/embedding': False,
    'head/kernel': False,
  }


def test_low_rank_changes_of_all_recursions_are_merged_first():
  """The merged model computes the same to 1e-4, and has no changes left; those of single recursions stay in float32."""
  config = config_of(num_recursions=2, lora_rank=2, lora_sharing='one', lora_layers='all')
  variables = variables_of(config)
  run = LoadedRun(None, config, Transformer(config.model), variables, 0, 0)
  merged = weights.without_adapters(run)
  assert 'lora' not in merged.variables['params']
  tokens_BT = batches()[0]['tokens'][:1]
  found, exact = (tiny.apply(one.model)(one.variables, tokens_BT).logits for one in (merged, run))
  np.testing.assert_allclose(found, exact, atol=1e-4)
  own = config_of(num_recursions=2, lora_rank=2)
  quantised = weights.quantised(own.model, variables_of(own), 'int8')
  assert 'lora' in quantised['params']['steps']


# ---- folders ----


@pytest.fixture(scope='module')
def convert():
  """Runs mor_jax.convert with flags."""
  return functools.partial(entry_points.run, 'mor_jax.convert')


@pytest.fixture(scope='module')
def folder(convert, finished_run, tmp_path_factory):
  """The finished run in int4, with scales chosen on rows of its training split."""
  output = tmp_path_factory.mktemp('quantised') / 'int4'
  convert(checkpoint=finished_run[1], output=output, weights='int4', weights_rows=8)
  return output


@pytest.mark.slow
def test_a_quantised_run_folder_is_a_run(folder, finished_run, tmp_path, convert):
  """It is read as it was written, is smaller, and becomes float32 where another reads it leaf by leaf."""
  run, original = load_run(folder), load_run(finished_run[1])
  assert weights.kind_of(run.variables) == 'int4'
  expected = weights.quantise_run(original, 'int4', tiny_run.MESH, rows=8).variables
  jax.tree.map(np.testing.assert_array_equal, run.variables, expected)
  assert weights.resident_bytes(run.variables) < 0.35 * weights.resident_bytes(original.variables)
  read, _, _ = sources.open_model(folder, '--init_from')
  block = run.variables['params']['block']['mlp']['up']['kernel']
  np.testing.assert_array_equal(read.leaf('params/block/mlp/up/kernel'), block.whole())
  assert read.shapes == {
    path: leaf.shape for path, leaf in sources.open_model(finished_run[1], '')[0].leaves()
  }
  convert(checkpoint=folder, output=tmp_path / 'hub', to='transformers')
  convert(checkpoint=tmp_path / 'hub', output=tmp_path / 'back')
  back = load_run(tmp_path / 'back').variables['params']
  np.testing.assert_array_equal(back['block']['mlp']['up']['kernel'], block.whole())


def test_a_loss_hardly_changes(finished_run):
  """Within 0.002 nats in 8 bits and 0.02 in 4, of a model that was trained a little."""
  run = load_run(finished_run[1], mesh=tiny_run.MESH)
  model, batch = Transformer(run.config.model), batches()[0]

  @jax.jit
  def loss(variables):
    logits_BTV = model.apply(variables, batch['tokens'], segment_ids=batch['segment_ids']).logits
    taken = jnp.take_along_axis(jax.nn.log_softmax(logits_BTV)[:, :-1], batch['tokens'][:, 1:, None], -1)
    return -taken.mean()

  exact = loss(run.variables)
  for kind, tolerance in {'int8': 0.002, 'int4': 0.02}.items():
    found = loss(weights.quantise_run(run, kind, tiny_run.MESH, rows=8).variables)
    assert abs(float(found - exact)) < tolerance


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ({'weights': 'int8', 'weights_data': 'gone.txt'}, 'cannot be read.*name others with --weights_data'),
    ({'weights_rows': 3}, '--weights_rows=3 is for --weights, which is not given'),
    ({'weights': 'int8', 'weights_rows': 0, 'weights_data': 'x'}, 'uses no rows of --weights_data=x'),
    ({'weights': 'int8', 'merge_lora': True}, '--merge_lora=True does not go with --weights=int8'),
  ],
)
def test_flags_that_cannot_work(convert, finished_run, tmp_path, flags, message):
  with pytest.raises(ConfigError, match=message):
    convert(checkpoint=finished_run[1], output=tmp_path / 'new', **flags)
  assert not (tmp_path / 'new').exists()


def test_weights_are_quantised_once(convert, folder, tmp_path):
  with pytest.raises(ConfigError, match='are in int4 already; leave it out'):
    convert(checkpoint=folder, output=tmp_path / 'new', weights='int8')
