import jax
import pytest
from jax.sharding import AbstractMesh

from mor_jax.config import ConfigError, TrainConfig
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
