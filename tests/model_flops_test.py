"""Closed formulas against initialised trees, published tables and XLA's own counts."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from mor_jax.config import Config
from mor_jax.model import flops
from mor_jax.model.transformer import Transformer
from tests import tiny

BASE_360M = Config().model  # the defaults are the paper's 360M shape


def shape_360m(kind, steps, layers):
  return dataclasses.replace(BASE_360M, kind=kind, num_recursions=steps, num_layers=layers, vocab_size=49152)


@pytest.mark.parametrize('kind', ['vanilla', 'recursive', 'mor'])
@pytest.mark.parametrize('sharing', ['cycle', 'middle_cycle'])
@pytest.mark.parametrize('tied', [True, False])
def test_parameter_count_is_the_size_of_the_tree(kind, sharing, tied):
  config = tiny.config(kind=kind, sharing=sharing, tie_embeddings=tied, head_dim=6)
  tree = jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
  count = flops.count_parameters(config)
  assert count.total == sum(leaf.size for leaf in jax.tree.leaves(tree))
  assert count.total == count.embedding + count.non_embedding


@pytest.mark.parametrize(
  ('kind', 'steps', 'layers', 'millions'),
  [('vanilla', 1, 32, 315), ('mor', 2, 32, 167), ('mor', 3, 32, 118), ('recursive', 4, 34, 98)],
)
def test_published_parameter_counts(kind, steps, layers, millions):
  """Non-embedding parameters of the paper's Table 3."""
  count = flops.count_parameters(shape_360m(kind, steps, layers))
  assert round(count.non_embedding / 1e6) == millions


@pytest.mark.parametrize(
  ('kind', 'steps', 'layers', 'released_steps'),
  [
    ('vanilla', 1, 32, 9438),
    ('recursive', 3, 32, 9438),
    ('recursive', 4, 34, 8883),
    ('mor', 2, 32, 12619),
    ('mor', 3, 32, 14161),
    ('mor', 4, 34, 14216),
    ('mor shared', 3, 32, 14672),
  ],
)
def test_published_step_counts(kind, steps, layers, released_steps):
  """16.5e18 FLOPs at 1024 x 2048 tokens a step give the released runs' lengths."""
  kind, _, kv = kind.partition(' ')
  config = dataclasses.replace(shape_360m(kind, steps, layers), kv=kv or 'recursion_wise')
  per_token = flops.paper_flops_per_token(config, 2048)
  assert abs(16.5e18 / (per_token * 1024 * 2048) - released_steps) < 1.01


@pytest.mark.parametrize(('kind', 'steps'), [('vanilla', 1), ('mor', 2), ('mor', 4)])
def test_causal_half_is_what_the_paper_counts(kind, steps):
  """The two formulas meet where heads are ungrouped; ours has head and routers besides."""
  config = dataclasses.replace(shape_360m(kind, steps, 34), num_kv_heads=15)
  routers = 2 * flops.router_parameters(config) if kind == 'mor' else 0
  own = flops.forward_flops_per_token(config, 2048, attention=0.5) - 2 * 960 * 49152 - routers
  assert own == pytest.approx(flops.paper_flops_per_token(config, 2048))
  assert flops.train_flops_per_token(config, 2048, attention=0.5) == 3 * (own + 2 * 960 * 49152 + routers)


@pytest.mark.parametrize(('steps', 'share'), [(2, 0.75), (3, 0.667), (4, 0.625)])
def test_kv_cache_share_of_the_shared_layers(steps, share):
  """(R + 1) / 2R of the vanilla model's bytes for recursion-wise caching (paper, Table 2)."""
  config = dataclasses.replace(shape_360m('mor', steps, 36), sharing='cycle', num_layers=36)
  ratio = flops.kv_cache_bytes(config, 2400) / flops.kv_cache_bytes(flops.vanilla_of(config), 2400)
  assert ratio == pytest.approx(share, abs=1e-3)
  one_layer = 2 * 2400 * config.num_kv_heads * config.head_width * 2
  assert flops.kv_cache_bytes(flops.vanilla_of(config), 2400) == 36 * one_layer


@pytest.mark.parametrize('steps', [2, 3, 4])
def test_shared_keys_and_values_are_cached_once(steps):
  """1 / R of the vanilla model's bytes (paper, Table 2)."""
  config = dataclasses.replace(shape_360m('mor', steps, 36), sharing='cycle', kv='shared')
  ratio = flops.kv_cache_bytes(config, 2400) / flops.kv_cache_bytes(flops.vanilla_of(config), 2400)
  assert ratio == pytest.approx(1 / steps)


def compiled_train_flops(config, batch, length):
  """XLA's own count of forward and backward, on an unrolled program (it counts a loop body once)."""
  return compile_gradient(config, batch, length).cost_analysis()['flops']


def compile_gradient(config, batch, length):
  model = Transformer(dataclasses.replace(config, unroll_layers=True))
  tokens_BT = jax.ShapeDtypeStruct((batch, length), jnp.int32)
  variables = jax.eval_shape(model.init, jax.random.key(0), tokens_BT)

  def loss(variables, tokens_BT):
    return jax.nn.log_softmax(model.apply(variables, tokens_BT).logits)[..., 0].mean()

  return jax.jit(jax.grad(loss)).lower(variables, tokens_BT).compile()


@pytest.mark.parametrize(
  ('steps', 'kv'),
  [
    pytest.param(2, 'recursion_wise', marks=pytest.mark.slow),
    pytest.param(3, 'recursion_wise', marks=pytest.mark.slow),
    (3, 'shared'),
    pytest.param(3, 'hybrid', marks=pytest.mark.slow),
  ],
)
def test_compiled_flops_fall_as_the_formula_says(steps, kv):
  # The formula counts every query with every key, and nothing twice, as the reference computes them.
  shape = {'num_layers': 2 + 6, 'd_model': 64, 'mlp_dim': 160, 'attention': 'reference'}
  config = tiny.config(num_recursions=steps, kv=kv, **shape)
  vanilla = flops.vanilla_of(config)
  batch, length = 2, 96
  ratio = flops.train_flops_per_token(config, length) / flops.train_flops_per_token(vanilla, length)
  compiled = compiled_train_flops(config, batch, length), compiled_train_flops(vanilla, batch, length)
  assert compiled[0] / compiled[1] == pytest.approx(ratio, rel=0.03)
  if kv != 'recursion_wise':
    return
  expected = flops.train_flops_per_token(vanilla, length) * batch * length
  assert compiled[1] == pytest.approx(expected, rel=0.06)  # the rest is element-wise work
  masked = dataclasses.replace(config, dispatch='mask')
  assert compiled_train_flops(masked, batch, length) > 0.97 * compiled[1], 'masking must not look cheaper'


@pytest.mark.slow
@pytest.mark.parametrize(
  'change',
  [
    {},
    {'kv': 'shared'},
    {'kv': 'hybrid'},
    {'router': 'token_choice', 'token_capacity_factor': 1.0},
    {'router': 'token_choice', 'token_capacity_factor': 1.0, 'kv': 'shared'},
  ],
)
def test_gathering_saves_flops_and_memory_of_the_compiled_step(change):
  # The formula counts every query with every key, as the reference computes them.
  shape = {'num_layers': 8, 'num_recursions': 3, 'd_model': 64, 'mlp_dim': 160, 'attention': 'reference'}
  config = tiny.config(**shape, **change)
  gathered, masked = (
    compile_gradient(dataclasses.replace(config, dispatch=dispatch), 2, 192)
    for dispatch in ('gather', 'mask')
  )
  flops_ratio = gathered.cost_analysis()['flops'] / masked.cost_analysis()['flops']
  per_token = [
    flops.train_flops_per_token(dataclasses.replace(config, dispatch=dispatch), 192)
    for dispatch in ('gather', 'mask')
  ]
  assert flops_ratio == pytest.approx(per_token[0] / per_token[1], rel=0.03)
  memory = [program.memory_analysis().temp_size_in_bytes for program in (gathered, masked)]
  assert memory[0] < 0.9 * memory[1]
