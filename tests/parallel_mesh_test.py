import jax
import pytest
from jax.sharding import AbstractMesh

from mor_jax.config import Config, ConfigError, ModelConfig, ParallelConfig, TrainConfig, with_changes
from mor_jax.parallel import mesh as mesh_lib


def test_all_devices_are_replicas():
  mesh = mesh_lib.make_mesh()
  assert dict(mesh.shape) == {'replica': len(jax.devices()), 'fsdp': 1, 'tensor': 1}


@pytest.mark.parametrize(('global_batch', 'accumulation'), [(8, 1), (8, 2), (96, 3)])
def test_batches_that_divide_are_accepted(global_batch, accumulation):
  mesh = AbstractMesh((4, 1, 1), mesh_lib.AXES)
  mesh_lib.check_batch(mesh, TrainConfig(global_batch=global_batch, accumulation=accumulation))


@pytest.mark.parametrize(
  ('global_batch', 'accumulation', 'remedy'), [(6, 1, '4 or 8'), (2, 1, '4'), (12, 2, '8 or 16')]
)
def test_batches_that_do_not_divide_are_refused_with_the_nearest_that_do(global_batch, accumulation, remedy):
  mesh = AbstractMesh((4, 1, 1), mesh_lib.AXES)
  with pytest.raises(ConfigError, match=f'among 4 devices; set train.global_batch to {remedy}$'):
    mesh_lib.check_batch(mesh, TrainConfig(global_batch=global_batch, accumulation=accumulation))


@pytest.mark.parametrize('sizes', [{'fsdp': 3}, {'replica': 2, 'fsdp': 1}, {'dcn_fsdp': 2}])
def test_sizes_that_do_not_multiply_to_the_devices_are_refused(sizes):
  with pytest.raises(ConfigError, match=r'cannot be laid out on 1 (devices|slices); set sizes'):
    mesh_lib.make_mesh(ParallelConfig(**sizes), jax.devices()[:1])


def test_only_one_size_can_fill():
  with pytest.raises(ConfigError, match='-1 cannot both fill what is left within a slice'):
    with_changes(Config(), parallel={'fsdp': -1})


@pytest.mark.parametrize(
  ('shape', 'model', 'named'),
  [
    ((1, 1, 2), {'num_heads': 15}, 'model.num_heads=15'),
    ((1, 1, 5), {'mlp_dim': 2561}, 'model.mlp_dim=2561'),
    ((1, 7, 1), {}, 'model.d_model=960'),
  ],
)
def test_models_that_do_not_divide_are_refused(shape, model, named):
  with pytest.raises(ConfigError, match=f'^{named} cannot be split into parallel'):
    mesh_lib.check_model(AbstractMesh(shape, mesh_lib.AXES), ModelConfig(**model))
