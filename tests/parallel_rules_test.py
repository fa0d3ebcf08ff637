import functools

import jax
import jax.numpy as jnp
import mesh_check
import programs
import pytest
import tiny
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax.sharding import AbstractMesh, PartitionSpec

from mor_jax.config import Config, ConfigError
from mor_jax.model import axes
from mor_jax.model.transformer import Transformer, abstract_variables, parameter_axes
from mor_jax.parallel import mesh as mesh_lib
from mor_jax.parallel import rules
from mor_jax.training.optimizer import make_optimizer
from mor_jax.training.state import TrainState

ONE, SPLIT = (1, 1, 1), (1, 8, 1)
QUICK = (ONE, SPLIT, (2, 2, 2))  # in the default suite
MESHES = (*QUICK, (8, 1, 1), (1, 4, 2))  # for the first model among the slow tests
CHUNK = 5  # tokens whose logits exist at once
MODELS = {
  'vanilla': {'kind': 'vanilla'},
  'expert_choice': {'num_recursions': 2},
  'shared': {'num_recursions': 2, 'kv': 'shared'},
  'benefit': {'num_recursions': 2, 'router_target': 'benefit', 'benefit_rows': 1.0},
  'token_choice': {'num_recursions': 2, 'router': 'token_choice', 'token_capacity_factor': 1.0},
  'recursive': {'kind': 'recursive', 'num_recursions': 2, 'lora_rank': 8},
  'all of attention': {
    'num_recursions': 2,
    'attention_bias': 'all',
    'qk_norm': True,
    'sliding_window': 5,
    'no_rope_layers': (1,),
  },
}
MADE_IN_PARTS = 'expert_choice'  # the model whose initialisation is measured


@functools.cache
def on_meshes(name: str, meshes: tuple) -> list[dict]:
  """Results for some meshes, and one for SPLIT in which routing is left to the compiler."""
  cases = [{'model': MODELS[name], 'mesh': mesh, 'chunk': CHUNK} for mesh in meshes]
  left_to_compiler = cases[meshes.index(SPLIT)] | {'local': False, 'init': name == MADE_IN_PARTS}
  return programs.measure('mesh_check', [*cases, left_to_compiler])


def state_shapes(model) -> TrainState:
  """Shapes of a training's whole state."""

  def make():
    variables = nn.unbox(model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))
    opt_state = make_optimizer(Config().train, model.config).init(variables['params'])
    return TrainState(jnp.int32(0), variables['params'], opt_state, variables.get('routing', {}))

  return jax.eval_shape(make)


STATES = [
  {'kind': 'vanilla', 'tie_embeddings': False},
  {'causality': 'aux_router', 'router_head': 'mlp', 'lora_rank': 8, 'share_norms': False},
  {'lora_rank': 8, 'lora_sharing': 'one', 'lora_layers': 'all'},
  {'router': 'token_choice', 'balancing': 'loss_free', 'recursion_encoding': True},
  {'selection': 'ema_threshold'},
  {'router_target': 'benefit'},
  {'attention_bias': 'all', 'qk_norm': True},
]


@pytest.mark.parametrize('change', STATES)
def test_state_is_split_like_the_parameters_with_little_left_whole(change):
  made = Transformer(tiny.config(**{'vocab_size': 64, 'd_model': 64, **change}))
  mesh = AbstractMesh((2, 4, 2), mesh_lib.AXES)
  shapes = state_shapes(made)
  names = parameter_axes(made.config)
  laid_out = rules.shardings(mesh, shapes, names)
  rules.check_split(mesh, shapes.params, names)
  whole, total = 0, 0
  for leaf, sharding in zip(jax.tree.leaves(shapes), jax.tree.leaves(laid_out), strict=True):
    total += leaf.size
    whole += leaf.size if not any('fsdp' in str(part) for part in sharding.spec) else 0
  assert whole / total < 0.06  # tiny matrices: norm scales and routers weigh more than they do else
  kernel = laid_out.params['block']['mlp']['up']['kernel'].spec
  assert kernel == PartitionSpec(None, 'fsdp', 'tensor')
  assert str(kernel) in str([sharding.spec for sharding in jax.tree.leaves(laid_out.opt_state)])


@pytest.mark.parametrize('change', STATES)
def test_every_axis_of_every_parameter_has_a_name(change):
  made = Transformer(tiny.config(**change))
  params = nn.unbox(abstract_variables(made.config))['params']
  names, leaves = parameter_axes(made.config), flatten_dict(params, sep='/')
  assert set(names) == set(leaves)
  assert {path: len(found) for path, found in names.items()} == {
    path: leaf.ndim for path, leaf in leaves.items()
  }
  is_lora = [path for path in leaves if 'lora/' in path]
  unnamed = [path for path, found in names.items() if None in found and path not in is_lora]
  assert not unnamed


def test_a_mesh_axis_is_used_once_in_an_array():
  with nn.logical_axis_rules([('embed', ('fsdp',)), ('batch', ('replica', 'fsdp'))]):
    assert axes.spec(('batch', 'length', 'width')) == PartitionSpec(('replica', 'fsdp'), None, None)
    with pytest.raises(ValueError, match=r"\('batch', 'embed'\) use the mesh axis 'fsdp' twice"):
      axes.spec(('batch', 'embed'))


def test_parameters_left_whole_are_noticed():
  made = Transformer(tiny.config(vocab_size=64, lora_rank=6, num_recursions=2))
  shapes = state_shapes(made).params
  with pytest.raises(ConfigError, match=r'parallel.fsdp=4 would leave \d+% of the parameters whole'):
    rules.check_split(AbstractMesh((1, 4, 1), mesh_lib.AXES), shapes, parameter_axes(made.config))


def also_slow(*names: str) -> list:
  """The first of the models on few meshes in the default suite; among the slow tests on all, and the others on few."""
  meshes = {name: MESHES if name == names[0] else QUICK for name in names}
  return [(names[0], QUICK), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in meshes.items())]


@pytest.mark.parametrize(
  ('name', 'meshes'), also_slow('expert_choice', *sorted(set(MODELS) - {'expert_choice'}))
)
def test_every_mesh_computes_what_one_device_does(name, meshes):
  one, *others = on_meshes(name, meshes)
  for result in others:
    assert result['loss'] == pytest.approx(one['loss'], abs=1e-5)
    assert result['error'] < 1e-5
    assert result['bytes']  # the devices did work together


@pytest.mark.parametrize(('name', 'meshes'), also_slow('expert_choice', 'shared', 'token_choice'))
def test_routing_needs_no_communication(name, meshes):
  """Against a vanilla model, whose layers are as many to gather as the passes of the shared block."""
  *routed, left_to_compiler = on_meshes(name, meshes)
  vanilla = on_meshes('vanilla', meshes)
  for mesh, result, reference in zip(meshes, routed, vanilla, strict=False):
    assert mesh_check.communicates_no_more(result['bytes'], reference['bytes']), mesh
  assert not mesh_check.communicates_no_more(left_to_compiler['bytes'], vanilla[meshes.index(SPLIT)]['bytes'])


def test_the_state_is_made_in_parts():
  """No device, and so no host, holds the whole of it."""
  made = on_meshes(MADE_IN_PARTS, QUICK)[-1]
  assert made['init'] < made['state'] / 8 * 2
