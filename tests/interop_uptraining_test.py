"""Beginning from a vanilla model: which layers go where, and that at full rank nothing is lost."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_run
from flax import linen as nn

from mor_jax.config import ConfigError
from mor_jax.interop import uptraining, weights
from mor_jax.interop.uptraining import SharedWeights, depths, source_layers
from mor_jax.interop.weights import HeldWeights
from mor_jax.model.transformer import Transformer, abstract_variables
from mor_jax.training.state import begin_from

VANILLA, VARIABLES = tiny.model(kind='vanilla', seed=5)
SOURCE = HeldWeights(VANILLA.config, VARIABLES)


@pytest.mark.parametrize(
  ('sharing', 'method', 'expected'),
  [
    ('middle_cycle', 'stepwise', [(0,), (1,), (6,), (7,)]),
    ('middle_cycle', 'lower', [(0,), (1,), (2,), (7,)]),
    ('middle_cycle', 'upper', [(0,), (5,), (6,), (7,)]),
    ('middle_cycle', 'average', [(0,), (1, 3, 5), (2, 4, 6), (7,)]),
    ('middle_sequence', 'average', [(0,), (1, 2, 3), (4, 5, 6), (7,)]),
    ('middle_sequence', 'stepwise', [(0,), (1,), (6,), (7,)]),
  ],
)
def test_the_layers_of_each_slot(sharing, method, expected):
  config = tiny.config(kind='recursive', num_layers=8, num_recursions=3, sharing=sharing)
  assert source_layers(config, 8, method) == expected


def test_layers_of_schemes_without_ends_and_random_choice():
  config = tiny.config(kind='recursive', num_layers=6, num_recursions=2, sharing='cycle')
  assert source_layers(config, 6, 'stepwise') == [(0,), (2,), (5,)]  # 2.5 is rounded to even, as Python does
  assert source_layers(config, 6, 'average') == [(0, 3), (1, 4), (2, 5)]
  config = dataclasses.replace(config, sharing='sequence')
  assert source_layers(config, 6, 'average') == [(0, 1), (2, 3), (4, 5)]
  assert source_layers(config, 6, 'upper') == [(3,), (4,), (5,)]
  drawn = {tuple(source_layers(config, 6, 'random', seed)) for seed in range(20)}
  assert len(drawn) > 5
  assert all(list(layers) == sorted(set(layers)) for layers in drawn)


def test_other_depths_than_the_originals():
  """SmolLM has 30 layers, of which 28 are not divisible by 3: 29 leaves one out, 32 takes two twice."""
  config = tiny.config(kind='recursive', num_layers=29, num_recursions=3)
  shallow = depths(config, 30)
  assert (shallow[0], shallow[1], shallow[-2], shallow[-1]) == (0, 1, 28, 29)
  assert len(shallow) == len(set(shallow)) == 29
  deep = depths(tiny.config(kind='recursive', num_layers=32, num_recursions=3), 30)
  assert len(deep) == 32
  assert sorted(set(deep)) == list(range(30))
  assert deep == sorted(deep)
  assert depths(tiny.config(kind='recursive', num_layers=30), 30) == list(range(30))
  with pytest.raises(ConfigError, match=r'has a block of 28 layers, but the 10 layers .* leave only 8'):
    source_layers(tiny.config(kind='recursive', num_layers=58), 10, 'stepwise')


@pytest.mark.parametrize(
  ('sharing', 'method', 'recursions', 'relaxed'),
  [
    ('middle_cycle', 'stepwise', 2, {'lora_rank': 48, 'recursion_encoding': True}),
    ('middle_cycle', 'lower', 2, {'lora_rank': 32, 'share_norms': False, 'lora_alpha': 3.0}),
    ('middle_sequence', 'average', 2, {'lora_rank': 48}),
    ('cycle', 'upper', 3, {'lora_rank': 32, 'share_norms': False}),
    ('sequence', 'random', 3, {'lora_rank': 32}),
    ('middle_cycle', 'lower', 2, {'lora_rank': 48, 'lora_layers': 'all'}),
  ],
)
def test_at_full_rank_the_model_is_the_original(sharing, method, recursions, relaxed):
  change = {'sharing': sharing, 'num_recursions': recursions} | relaxed
  model = Transformer(tiny.config(kind='recursive', **change))
  variables = with_fresh_adapters(model, weights.tree(SharedWeights(model.config, SOURCE, method)))
  tokens_BT = tiny.tokens(2, 12)
  expected = tiny.apply(VANILLA)(VARIABLES, tokens_BT).logits
  np.testing.assert_allclose(tiny.apply(model)(variables, tokens_BT).logits, expected, atol=2e-4)


def with_fresh_adapters(model, variables):
  """The variables with changes that are the same in all recursions as a state begins with them."""
  if not model.config.adapted_parts:
    return variables
  shapes = nn.unbox(abstract_variables(model.config))['params']['lora']
  fresh = jax.tree_util.tree_map_with_path(
    lambda path, leaf: np.full(leaf.shape, float(path[-1].key == 'down'), np.float32), shapes
  )
  return {'params': variables['params'] | {'lora': fresh}}


@pytest.mark.parametrize(
  'change',
  [
    {'kind': 'vanilla', 'lora_layers': 'all'},
    {'kind': 'recursive', 'num_recursions': 2, 'lora_sharing': 'one', 'lora_layers': 'all'},
  ],
)
def test_changes_that_are_the_same_in_all_recursions_begin_fresh(change):
  """The model is the one without them, bit for bit."""
  config = tiny.config(lora_rank=4, **change)
  plain = Transformer(dataclasses.replace(config, lora_rank=0))
  made = SharedWeights(config, SOURCE, 'average')
  assert not any(path.startswith('params/lora') for path in made.shapes)
  model, tokens_BT = Transformer(config), tiny.tokens(2, 12)
  got = tiny.apply(model)(with_fresh_adapters(model, weights.tree(made)), tokens_BT).logits
  expected = weights.tree(SharedWeights(plain.config, SOURCE, 'average'))
  np.testing.assert_array_equal(got, tiny.apply(plain)(expected, tokens_BT).logits)


def test_changes_of_the_source_are_merged_and_not_lost():
  source, variables = tiny.model(kind='vanilla', lora_rank=3, lora_layers='all', seed=5)
  made = SharedWeights(VANILLA.config, HeldWeights(source.config, variables), 'stepwise')
  tokens_BT = tiny.tokens(2, 12)
  expected = tiny.apply(source)(variables, tokens_BT).logits
  got = tiny.apply(VANILLA)(weights.tree(made), tokens_BT).logits
  np.testing.assert_allclose(got, expected, atol=1e-5)
  assert np.abs(expected - tiny.apply(VANILLA)(VARIABLES, tokens_BT).logits).max() > 0.01


def test_a_lower_rank_is_the_best_approximation_of_each_steps_own_layer():
  """What is left of a kernel, norm folded in, is the tail of the singular values that the rank cuts off."""
  config = tiny.config(kind='recursive', num_recursions=2, lora_rank=6)
  made = weights.tree(SharedWeights(config, SOURCE, 'average'))['params']
  layers, scale = VARIABLES['params']['block'], config.lora_alpha / config.lora_rank
  up = layers['mlp_norm']['scale'][:, :, None] * layers['mlp']['up']['kernel']
  shared, lora = made['block']['mlp']['up']['kernel'], made['steps']['lora']['mlp_up']
  for step in range(2):
    for layer in range(2):
      wanted = up[1 + 2 * step + layer]
      got = shared[layer] + scale * lora['down'][step, layer] @ lora['up'][step, layer]
      tail = np.linalg.svd(wanted - shared[layer], compute_uv=False)[6:]
      np.testing.assert_allclose(np.linalg.norm(wanted - got), np.linalg.norm(tail), rtol=1e-4)
      assert np.linalg.norm(tail) > 0.1


@pytest.mark.parametrize(
  'routing',
  [
    {'gating': 'residual', 'router_activation': 'sigmoid', 'router_alpha': 2.0},  # gates 2 sigmoid(0)
    {'router_target': 'benefit', 'kv': 'recursion_wise'},  # its gates are 1
  ],
)
def test_a_mor_model_that_takes_every_step_is_the_original(routing):
  """Gates of exactly 1 and capacities of 1: what remains of routing changes nothing."""
  model = Transformer(tiny.config(num_recursions=2, capacities=(1.0, 1.0), lora_rank=48, **routing))
  shapes = nn.unbox(abstract_variables(model.config))['params']
  routers = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), {'router': shapes['router']})
  variables = weights.tree(SharedWeights(model.config, SOURCE, 'average'))
  variables = {'params': variables['params'] | routers}
  tokens_BT = tiny.tokens(2, 12)
  expected = tiny.apply(VANILLA)(VARIABLES, tokens_BT).logits
  np.testing.assert_allclose(tiny.apply(model)(variables, tokens_BT).logits, expected, atol=2e-4)


def test_layers_are_taken_bit_for_bit_and_averaged():
  config = tiny.config(kind='recursive', num_recursions=2)
  up, ours = VARIABLES['params']['block']['mlp']['up']['kernel'], {}
  for method in ('upper', 'average'):
    made = weights.tree(SharedWeights(config, SOURCE, method))['params']
    ours[method] = {part: made[part]['mlp']['up']['kernel'] for part in ('first', 'block', 'last')}
    np.testing.assert_array_equal(made['embed']['embedding'], VARIABLES['params']['embed']['embedding'])
    np.testing.assert_array_equal(made['final_norm']['scale'], VARIABLES['params']['final_norm']['scale'])
  np.testing.assert_array_equal(ours['upper']['block'], up[3:5])
  np.testing.assert_allclose(ours['average']['block'], (up[1:3] + up[3:5]) / 2, rtol=1e-6)
  for method in ours:
    np.testing.assert_array_equal(ours[method]['first'], up[0])
    np.testing.assert_array_equal(ours[method]['last'], up[5])


def test_a_vanilla_model_stays_what_it_is():
  made = weights.tree(SharedWeights(VANILLA.config, SOURCE, 'stepwise'))
  chex.assert_trees_all_equal(made, VARIABLES)


def test_models_that_do_not_fit_are_refused():
  with pytest.raises(
    ConfigError, match=r'model\.mlp_dim=64, model\.rope_theta=5\.0 cannot .*--config\.model\.mlp_dim=48'
  ):
    SharedWeights(tiny.config(mlp_dim=64, rope_theta=5.0), SOURCE, 'stepwise')
  with pytest.raises(ConfigError, match=r'kind=recursive.*only vanilla models'):
    SharedWeights(VANILLA.config, HeldWeights(tiny.config(kind='recursive'), {}), 'stepwise')
  with pytest.raises(ConfigError, match=r'init\.method=best is not one of'):
    source_layers(VANILLA.config, 6, 'best')
  assert tiny_run.CONFIG.init.method in uptraining.METHODS


def test_the_state_begins_with_the_weights_and_fresh_routers():
  run = tiny_run.run()
  config = run.config.model
  vanilla = Transformer(dataclasses.replace(config, kind='vanilla'))
  original = nn.unbox(vanilla.init(jax.random.key(7), jnp.zeros((1, 4), jnp.int32)))
  shared = SharedWeights(config, HeldWeights(vanilla.config, original), 'lower')
  fresh, state = run.initial(), begin_from(run.initial(), shared)
  chex.assert_trees_all_equal(state.params['router'], fresh.params['router'])
  chex.assert_trees_all_equal(state.opt_state, fresh.opt_state)
  np.testing.assert_array_equal(
    state.params['block']['mlp']['up']['kernel'][0], original['params']['block']['mlp']['up']['kernel'][1]
  )
  shardings = [leaf.sharding for leaf in jax.tree.leaves(run.abstract.params)]
  assert [leaf.sharding for leaf in jax.tree.leaves(state.params)] == shardings
  run.step(state, next(tiny_run.batches()))  # the compiled step takes it


# ---- biases, norms of queries and keys, layers without rotation ----

OF_FAMILIES = {'attention_bias': 'all', 'qk_norm': True, 'sliding_window': 5}


def of_families(no_rope_layers):
  """A vanilla model of 6 layers with all that attention may have."""
  made, variables = tiny.model(kind='vanilla', seed=5, no_rope_layers=no_rope_layers, **OF_FAMILIES)
  return made, variables, HeldWeights(made.config, variables)


@pytest.mark.parametrize(('method', 'layers'), [('stepwise', [(1,), (4,)]), ('average', [(1, 3), (2, 4)])])
def test_biases_norms_and_rotation_come_from_the_same_layers_as_the_kernels(method, layers):
  rotates_not = (1,) if method == 'stepwise' else (1, 3)
  _, variables, source = of_families(rotates_not)
  config = tiny.config(kind='recursive', num_recursions=2, no_rope_layers=(1,), **OF_FAMILIES)
  made = weights.tree(SharedWeights(config, source, method))['params']
  original = variables['params']['block']['attention']
  for name in ('query/bias', 'output/bias', 'key_norm/scale', 'value/kernel'):
    part, leaf = name.split('/')
    expected = [np.mean([original[part][leaf][layer] for layer in picked], axis=0) for picked in layers]
    np.testing.assert_allclose(made['block']['attention'][part][leaf], np.stack(expected), atol=1e-6)


def test_as_deep_and_with_one_recursion_the_model_is_the_original():
  """Also through layers that do not rotate, whose numbers are those of unique layers."""
  original, variables, source = of_families((0, 2, 5))
  config = tiny.config(kind='recursive', num_recursions=1, no_rope_layers=(0, 2, 5), **OF_FAMILIES)
  model, tokens_BT = Transformer(config), tiny.tokens(2, 12)
  made = weights.tree(SharedWeights(config, source, 'stepwise'))
  expected = tiny.apply(original)(variables, tokens_BT).logits
  np.testing.assert_allclose(tiny.apply(model)(made, tokens_BT).logits, expected, atol=1e-4)


@pytest.mark.parametrize(
  ('change', 'method', 'message'),
  [
    (
      {},
      'stepwise',
      r'no_rope_layers=\(\) cannot .* makes \(1,\) of layers .* --config.model.no_rope_layers="\(1,\)"',
    ),
    ({'no_rope_layers': (1, 2)}, 'stepwise', r'no_rope_layers=\(1, 2\) cannot begin'),
    (
      {'no_rope_layers': (1,)},
      'average',
      r'would average layers 1, 3 of init.source, of which 1 do not rotate',
    ),
    ({'no_rope_layers': (1,), 'attention_bias': 'none'}, 'stepwise', 'set --config.model.attention_bias=all'),
    ({'no_rope_layers': (1,), 'qk_norm': False}, 'stepwise', 'set --config.model.qk_norm=True'),
    ({'no_rope_layers': (1,), 'sliding_window': None}, 'stepwise', 'set --config.model.sliding_window=5'),
  ],
)
def test_attention_must_be_that_of_the_source(change, method, message):
  config = tiny.config(kind='recursive', num_recursions=2, **{**OF_FAMILIES, **change})
  with pytest.raises(ConfigError, match=message):
    SharedWeights(config, of_families((1,))[2], method)
