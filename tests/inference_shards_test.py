"""Decoding on a mesh of 8 devices: the tokens of one device, and nothing of a sequence leaves its devices."""

import functools
import types

import programs
import pytest
from jax.sharding import AbstractMesh

from mor_jax.config import ConfigError
from mor_jax.inference import shards
from mor_jax.parallel import mesh as mesh_lib
from tests import tiny, tiny_engine

ONE, REPLICAS, PARTS, TENSOR, ALL_AXES = None, (8, 1, 1), (1, 8, 1), (1, 4, 2), (2, 2, 2)
STRICT = {'num_layers': 5, 'num_recursions': 3, 'router_alpha': 0.8}
MODELS = {
  'vanilla': {'kind': 'vanilla'},
  'expert_choice': STRICT,
  'residual': {**STRICT, 'gating': 'residual', 'router_head': 'mlp'},
  'shared': {**STRICT, 'kv': 'shared'},
  'hybrid': {**STRICT, 'kv': 'hybrid', 'causality': 'aux_router'},
  'token_choice': {**STRICT, 'router_alpha': None, 'router': 'token_choice', 'token_capacity_factor': 1.0},
  'relaxed': {'kind': 'recursive', 'lora_rank': 4, 'share_norms': False, 'tie_embeddings': False},
}
IN_DEFAULT_SUITE = ('expert_choice',)
DRAFTED = ('shared', 'token_choice')  # on meshes, against what one device gives without drafts
MESHES = dict.fromkeys(MODELS, (PARTS, ALL_AXES)) | {
  'residual': (REPLICAS, TENSOR),
  'vanilla': (ALL_AXES,),
  'relaxed': (TENSOR,),
}


@functools.cache
def measured(name: str) -> dict:
  """What decode_mesh_check.py prints, by mesh."""
  meshes = (ONE, *MESHES[name])
  options = {'read': 'groups' if name == 'shared' else 'gather'} if name in ('shared', 'hybrid') else {}
  options['unroll'] = name == 'token_choice'
  if name in DRAFTED:  # a slot is larger than the logits of all tokens that are checked
    options |= {'speculate': 2, 'max_len': 256}
  cases = [{'model': MODELS[name], 'mesh': mesh, 'options': options} for mesh in meshes]
  return dict(zip(meshes, programs.measure('decode_mesh_check', cases), strict=True))


MODELS_BY_SPEED = [n if n in IN_DEFAULT_SUITE else pytest.param(n, marks=pytest.mark.slow) for n in MODELS]


@pytest.mark.parametrize('name', MODELS_BY_SPEED)
def test_every_mesh_gives_the_tokens_of_one_device(name):
  """More requests than slots, so that slots are used again on every part."""
  found = measured(name)
  one = found[ONE]
  assert len({tuple(tokens[:3]) for tokens in one['tokens']}) > 3, 'equal texts would show nothing'
  for mesh in MESHES[name]:
    assert found[mesh]['tokens'] == one['tokens'], mesh
    assert found[mesh]['depths'] == one['depths'], mesh
    assert found[mesh]['devices'] == 8, 'every device has a part of the caches'
    assert found[mesh]['bytes'] == found[mesh]['state_bytes'], 'what was told before it was made'


@pytest.mark.parametrize('name', MODELS_BY_SPEED)
def test_nothing_of_a_sequence_leaves_its_devices(name):
  """No collectives at all over replica and fsdp; over tensor activations and logits, no part of a cache."""
  for mesh in MESHES[name]:
    found = measured(name)[mesh]
    for program, collectives in found['collectives'].items():
      if mesh[2] == 1 or program in ('insert', 'release'):
        assert collectives == [], (mesh, program)
        continue
      # A check has the logits of several tokens of a lane, which are brought into another order.
      more = {'all-to-all'} if program == 'drafts' else set()
      assert {kind for kind, _ in collectives} <= {'all-reduce', 'all-gather', *more}
      assert collectives, 'the devices work together'
      if program in ('ticks', 'drafts'):
        assert max(size for _, size in collectives) < found['slot']
    assert ('drafts' in found['collectives']) == (name in DRAFTED)
    assert found['left'], 'left to the compiler, a slot would travel'


@pytest.mark.parametrize('name', ['slots', 'lanes', 'boundary_lanes', 'prefill_lanes'])
def test_sizes_that_do_not_divide_are_refused(name):
  made, variables = tiny.model(vocab_size=64)
  mesh = AbstractMesh((2, 2, 1), mesh_lib.AXES)
  sizes = {'slots': 8, 'lanes': 8, 'boundary_lanes': 8, 'prefill_lanes': 8} | {name: 6}
  with pytest.raises(ConfigError, match=rf'^{name}=6 cannot be divided among the 4 parts .* use 4 or 8'):
    tiny_engine.engine(made, variables, mesh=mesh, **sizes)


def test_heads_that_do_not_divide_are_refused():
  made, variables = tiny.model(vocab_size=64)
  mesh = AbstractMesh((1, 1, 4), mesh_lib.AXES)
  with pytest.raises(ConfigError, match=r'model.num_kv_heads=2 cannot be split into parallel.tensor=4'):
    tiny_engine.engine(made, variables, mesh=mesh)


def test_lanes_of_another_part_are_refused():
  made, variables = tiny.model(vocab_size=64)
  engine = tiny_engine.engine(made, variables, slots=4)
  engine.parts = 2  # as over two devices
  request = tiny_engine.requests((3,))[0]
  with pytest.raises(ValueError, match='lane 0 of prefill is not of part 1'):
    engine.insert(None, types.SimpleNamespace(lengths_B=[0] * 4), 0, 3, request)


def test_one_device_needs_no_division():
  assert shards.share(None, 'slots', 7) == 7


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['int8', 'int4'])
def test_quantised_weights_give_the_tokens_of_one_device(kind):
  """Scales lie with their channels, and so do groups of rows where devices share them equally."""
  model = {**STRICT, 'tie_embeddings': False, 'd_model': 64, 'mlp_dim': 128}
  cases = [{'model': model, 'mesh': mesh, 'weights': kind} for mesh in (ONE, PARTS, TENSOR, ALL_AXES)]
  one, *others = programs.measure('decode_mesh_check', cases)
  for found in others:
    assert (found['tokens'], found['depths']) == (one['tokens'], one['depths'])
    assert found['devices'] == 8
