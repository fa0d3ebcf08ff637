"""Selection of tokens: every way makes one choice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.model import tokens


@pytest.mark.parametrize('count', [1, 7, 20, 39, 40])
@pytest.mark.parametrize('way', [tokens.by_top_k, tokens.by_threshold, tokens.best])
def test_every_way_chooses_what_a_stable_sort_does(way, count):
  """Also among equal scores, zeros of both signs, infinities, and tokens that have left (minus infinity)."""
  rng = np.random.default_rng(count)
  scores_BT = rng.normal(size=(4, 40)).astype(np.float32)
  scores_BT[1] = np.round(scores_BT[1])  # many ties
  scores_BT[2, ::2] = -np.inf
  scores_BT[3] = -np.inf
  scores_BT[0, :6] = [np.inf, -1e-42, 1e-42, 3e38, -3e38, 1e-3]  # the second and third are not normal numbers
  scores_BT = scores_BT + 0.0  # no -0.0, which a sort by value does not tell from 0.0
  order_BT = np.argsort(-scores_BT, axis=1, kind='stable')
  expected_BC = np.sort(order_BT[:, :count], axis=1)
  found_BC = jax.jit(way, static_argnums=1)(jnp.asarray(scores_BT), count)
  np.testing.assert_array_equal(found_BC, expected_BC)


def test_zeros_of_both_signs_are_chosen_alike():
  scores_BT = jnp.array([[0.0, -0.0, 0.0, -0.0, -1.0, 1.0]])
  for count in range(1, 6):
    np.testing.assert_array_equal(tokens.by_threshold(scores_BT, count), tokens.by_top_k(scores_BT, count))
