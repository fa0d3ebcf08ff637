"""Selection and movement of tokens: every way makes one choice, and moves alike."""

import re

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


# ---- movement ----
WAYS = {'scattering': tokens.SCATTERING, 'gathering': tokens.GATHERING}
CHOSEN = {
  'some': [[1, 2, 5, 9], [0, 3, 4, 11]],
  'one': [[7], [0]],
  'all': [list(range(12))] * 2,
}


def by_loops(a_BT, values_BC, grad_BT, grad_BC, places_BC):
  """What `take`, `put` and `add` return, each followed by its gradients."""
  taken_BC, back_BC, spread_BT = np.zeros_like(values_BC), np.zeros_like(values_BC), np.zeros_like(a_BT)
  put_BT, added_BT, left_BT = a_BT.copy(), a_BT.copy(), grad_BT.copy()
  for row, places in enumerate(places_BC):
    for number, place in enumerate(places):
      taken_BC[row, number], back_BC[row, number] = a_BT[row, place], grad_BT[row, place]
      spread_BT[row, place], left_BT[row, place] = grad_BC[row, number], 0
      put_BT[row, place] = values_BC[row, number]
      added_BT[row, place] += values_BC[row, number]
  return taken_BC, spread_BT, put_BT, left_BT, back_BC, added_BT, grad_BT, back_BC


@pytest.mark.parametrize('tail', [(3,), (2, 3), ()], ids=['width', 'heads', 'numbers'])
@pytest.mark.parametrize('chosen', CHOSEN.values(), ids=CHOSEN.keys())
@pytest.mark.parametrize('way', WAYS.values(), ids=WAYS.keys())
def test_every_way_moves_tokens_and_gradients_as_loops_do(way, chosen, tail):
  """Values and gradients to the bit, in bfloat16, whose range the whole numbers are in."""
  rng = np.random.default_rng(0)
  a_BT, grad_BT = (rng.integers(-8, 8, (2, 12, *tail)).astype(np.float32) for _ in 'ag')
  values_BC, grad_BC = (rng.integers(-8, 8, (2, len(chosen[0]), *tail)).astype(np.float32) for _ in 'vg')
  places_BC = jnp.array(chosen, jnp.int32)

  @jax.jit
  def run(a, values, grad_a, grad_values):
    taken, back = jax.vjp(lambda a: way.take(a, places_BC), a)
    found = [taken, *back(grad_values)]
    for move in (way.put, way.add):
      moved, back = jax.vjp(lambda a, values, move=move: move(a, places_BC, values), a, values)
      found += [moved, *back(grad_a)]
    return found

  found = run(*(jnp.asarray(array, jnp.bfloat16) for array in (a_BT, values_BC, grad_BT, grad_BC)))
  for one, other in zip(found, by_loops(a_BT, values_BC, grad_BT, grad_BC, chosen), strict=True):
    assert one.dtype == jnp.bfloat16
    np.testing.assert_array_equal(one.astype(jnp.float32), other)


def test_on_a_cpu_nothing_wide_is_scattered():
  """In the gradient of what a recursion step moves: the only scatters are of whole numbers."""

  def step(x_BTD, places_BC):
    return jnp.square(tokens.add(x_BTD, places_BC, 2 * tokens.take(x_BTD, places_BC))).sum()

  x_BTD, places_BC = jnp.ones((2, 12, 3)), jnp.array(CHOSEN['some'], jnp.int32)
  jaxpr = str(jax.make_jaxpr(jax.grad(step))(x_BTD, places_BC))
  results = re.findall(r'(\w+)\[[\d,]*\] = scatter', jaxpr)
  assert results
  assert set(results) == {'i32'}


@pytest.mark.parametrize('dtype', [jnp.bool_, jnp.int32])
def test_what_has_no_gradient_moves_too(dtype):
  a_BT, places_BC = jnp.arange(24).reshape(2, 12).astype(dtype), jnp.array(CHOSEN['some'], jnp.int32)
  taken_BC = tokens.take(a_BT, places_BC)
  assert taken_BC.dtype == dtype
  back_BT = tokens.put(jnp.zeros_like(a_BT), places_BC, taken_BC)
  are_there_BT = tokens.mask(places_BC, jnp.ones_like(places_BC, bool), a_BT.shape[1])
  np.testing.assert_array_equal(back_BT, jnp.where(are_there_BT, a_BT, 0))
