"""Attention backends against the reference, and rotation against its defining property."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.model import attention
from mor_jax.model.layers import rotate, rotation
from tests import tiny


@pytest.mark.parametrize('backend', ['xla', 'auto'])
@pytest.mark.parametrize('subset', [False, True], ids=['self', 'gathered_queries'])
def test_backends_equal_the_reference(backend, subset):
  """Values and gradients, with gathered positions, several segments and padding."""
  rng = np.random.default_rng(0)
  q, k, v, target = (rng.normal(size=(2, 12, heads, 8)).astype(np.float32) for heads in (6, 2, 2, 6))
  positions_BS = np.sort(rng.choice(40, (2, 12), replace=False), axis=1)
  segments_BS = np.array([[1] * 5 + [2] * 4 + [0] * 3, [3] * 12])
  chosen = np.array([1, 2, 4, 7, 9, 10]) if subset else np.arange(12)
  visible = attention.visible(positions_BS[:, chosen], positions_BS, segments_BS[:, chosen], segments_BS)

  def loss(q, k, v, backend):
    return (attention.attend(q[:, chosen], k, v, visible, backend) * target[:, chosen]).sum()

  got = jax.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v, backend)
  expected = jax.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v, 'reference')
  for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(left, right, atol=2e-5)


def test_only_the_past_of_the_same_segment_is_visible():
  positions, segments = jnp.array([[0, 3, 5, 0, 2]]), jnp.array([[1, 1, 1, 2, 2]])
  visible = attention.visible(positions, positions, segments, segments)[0]
  expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
  np.testing.assert_array_equal(visible, np.array(expected, bool))


def test_unknown_backend_is_refused():
  x = jnp.zeros((1, 2, 1, 4))
  with pytest.raises(ValueError, match="unknown attention backend 'flash'"):
    attention.attend(x, x, x, jnp.ones((1, 2, 2), bool), 'flash')


def test_rotation_depends_on_distance_only():
  rng, config = np.random.default_rng(0), tiny.config(head_dim=16)
  q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 16)), jnp.float32) for _ in range(2))

  def score(query_position, key_position):
    rotated_q = rotate(q, *rotation(config, jnp.array([[query_position]])))
    rotated_k = rotate(k, *rotation(config, jnp.array([[key_position]])))
    return float((rotated_q * rotated_k).sum())

  np.testing.assert_allclose(score(9, 4), score(105, 100), rtol=1e-4)
  assert abs(score(9, 4) - score(9, 5)) > 1e-3
  np.testing.assert_allclose(score(7, 7), float((q * k).sum()), rtol=1e-5)
