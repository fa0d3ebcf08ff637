"""Low-rank changes of any layer of any model: of each recursion, or one for all of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from mor_jax.config import ConfigError
from mor_jax.model import relaxation
from mor_jax.model.layers import projections
from mor_jax.model.transformer import Transformer
from mor_jax.planning.executed import executed_flops

TOKENS = tiny.tokens(2, 12)
RANK, ALPHA = 3, 6.0
ONE_ALL = {'lora_sharing': 'one', 'lora_layers': 'all'}
LIMITED = {'router': 'token_choice', 'token_capacity_factor': 1.0}
CASES = {
  'vanilla': {'kind': 'vanilla', 'lora_layers': 'all'},
  'vanilla shared': {'kind': 'vanilla', 'kv': 'shared', **ONE_ALL},
  'recursive': {'kind': 'recursive', 'lora_sharing': 'one', 'sharing': 'cycle'},
  'recursive sequence': {'kind': 'recursive', 'sharing': 'middle_sequence', **ONE_ALL},
  'recursive shared': {'kind': 'recursive', 'kv': 'shared', 'lora_targets': 'query_value', **ONE_ALL},
  'expert': ONE_ALL,
  'expert block': {'lora_sharing': 'one', 'share_norms': False, 'recursion_encoding': True},
  'token': {**LIMITED, **ONE_ALL},
}
OWN = {'own': {}, 'own all': {'lora_layers': 'all'}}
MERGEABLE = [
  pytest.param(name, marks=() if name in ('vanilla', 'expert') else pytest.mark.slow) for name in CASES
]


def adapted(change, **more):
  return tiny.model(num_recursions=2, lora_rank=RANK, lora_alpha=ALPHA, **change, **more)


def without(change, params):
  """The model without changes, and the parameters that it has in common with one that has."""
  plain = Transformer(
    tiny.config(num_recursions=2, **{name: value for name, value in change.items() if 'lora' not in name})
  )
  flat = flatten_dict(params, sep='/')
  return plain, unflatten_dict({path: leaf for path, leaf in flat.items() if 'lora/' not in path}, sep='/')


def with_up(params, scale):
  """The parameters with the up factors of all changes multiplied."""
  flat = flatten_dict(params, sep='/')
  return unflatten_dict(
    {path: leaf * scale if path.endswith('/up') else leaf for path, leaf in flat.items()}, sep='/'
  )


@pytest.mark.parametrize(
  'name',
  [
    'vanilla',
    'own all',
    pytest.param('expert', marks=pytest.mark.slow),
    pytest.param('token', marks=pytest.mark.slow),
    pytest.param('recursive sequence', marks=pytest.mark.slow),
  ],
)
def test_fresh_changes_change_no_bit(name):
  change = {**CASES, **OWN}[name]
  model, variables = adapted(change)
  plain, others = without(change, variables['params'])
  fresh = {**variables, 'params': with_up(variables['params'], 0)}
  got = tiny.apply(model)(fresh, TOKENS).logits
  np.testing.assert_array_equal(got, tiny.apply(plain)({**variables, 'params': others}, TOKENS).logits)
  assert np.abs(got - tiny.apply(model)(variables, TOKENS).logits).max() > 0.01


def test_changes_begin_fresh():
  config = tiny.config(num_recursions=2, lora_rank=RANK, lora_targets='query_value', **ONE_ALL)
  made = nn.unbox(relaxation.Adapters(config).init(jax.random.key(0)))['params']
  assert made.keys() == {'first', 'block', 'last'}
  factors = flatten_dict(made, sep='/')
  assert len(factors) == 3 * 2 * 2
  for path, leaf in factors.items():
    assert (np.std(leaf) > 0.05) == path.endswith('/down'), path


@pytest.mark.parametrize('name', MERGEABLE)
def test_one_change_for_all_is_the_model_with_other_kernels(name):
  """W + (alpha / rank) down up, merged by hand; float32."""
  model, variables = adapted(CASES[name])
  plain, params = without(CASES[name], variables['params'])
  merged = flatten_dict(params, sep='/')
  changes = flatten_dict(variables['params']['lora'], sep='/')
  for path in changes:
    part, kernel, factor = path.split('/')
    if factor == 'down':
      where = f'{part}/{kernel.replace("_", "/")}/kernel'
      merged[where] = merged[where] + ALPHA / RANK * changes[path] @ changes[f'{part}/{kernel}/up']
  expected = tiny.apply(plain)({**variables, 'params': unflatten_dict(merged, sep='/')}, TOKENS).logits
  np.testing.assert_allclose(tiny.apply(model)(variables, TOKENS).logits, expected, atol=1e-5)


@pytest.mark.parametrize('change', [{}, pytest.param(LIMITED, marks=pytest.mark.slow)])
def test_gather_is_mask(change):
  change = {**change, **ONE_ALL}
  model, variables = adapted(change)
  mask, _ = adapted(change, dispatch='mask')
  got, expected = (tiny.apply(made)(variables, TOKENS).logits for made in (model, mask))
  np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.slow
def test_the_gradient_of_one_change_is_the_sum_over_recursions():
  """Of a model whose recursions have own changes that are all alike."""
  one, variables = adapted({'lora_sharing': 'one'})
  own, _ = adapted({})
  params = dict(variables['params'])
  change = params.pop('lora')['block']
  alike = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), change)

  def loss(model, params):
    return jnp.square(model.apply({'params': params}, TOKENS).logits).mean()

  ours = jax.jit(jax.grad(functools.partial(loss, one)))({**params, 'lora': {'block': change}})
  theirs = jax.jit(jax.grad(functools.partial(loss, own)))({**params, 'steps': {'lora': alike}})
  summed = jax.tree.map(lambda leaf_R: leaf_R.sum(axis=0), theirs['steps']['lora'])
  tiny.assert_same_gradients(ours['lora']['block'], summed)
  tiny.assert_same_gradients(ours['block'], theirs['block'])


def test_flops_of_changes_are_those_of_merging_however_many_tokens_there_are():
  kernels = projections(tiny.config())
  of_layer = 2 * RANK * sum(kernel.inputs * kernel.outputs for kernel in kernels.values())

  def flops(length, **change):
    model, variables = tiny.model(kind='recursive', num_recursions=2, **change)
    return executed_flops(jax.make_jaxpr(model.apply)(variables, tiny.tokens(2, length)))

  for length in (8, 16):
    plain = flops(length)
    # Two layers in the block, used twice; and the first and the last.
    assert flops(length, lora_rank=RANK, **ONE_ALL) - plain == (2 + 2) * of_layer
    assert flops(length, lora_rank=RANK, lora_layers='all') - plain == (2 * 2 + 2) * of_layer


def test_what_a_vanilla_model_does_not_share_is_named():
  with pytest.raises(
    ConfigError, match=r'lora_layers=shared changes shared layers, .* set --config.model.lora_layers=all'
  ):
    tiny.config(kind='vanilla', lora_rank=4)
  assert tiny.config(kind='vanilla', lora_rank=4, lora_layers='all').adapted_parts == ('block',)
  assert tiny.config(lora_rank=4, **ONE_ALL).adapted_parts == ('first', 'block', 'last')
  assert tiny.config(lora_rank=4, lora_layers='all').adapted_parts == ('first', 'last')
  assert tiny.config(lora_rank=4, lora_layers='all', sharing='cycle').adapted_parts == ()
