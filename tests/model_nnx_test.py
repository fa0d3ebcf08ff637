"""The model inside an NNX training (docs/architecture.md)."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import nnx, traverse_util

from mor_jax.model.transformer import Transformer


def nll(logits_BTV: jax.Array, tokens_BT: jax.Array) -> jax.Array:
  return optax.softmax_cross_entropy_with_integer_labels(logits_BTV[:, :-1], tokens_BT[:, 1:]).mean()


@pytest.mark.slow
def test_a_step_of_nnx_is_the_step_of_linen():
  """One update of SGD through `nnx.bridge.ToNNX` and `nnx.Optimizer`, against `jax.grad` of the Linen module."""
  linen, tokens_BT = Transformer(tiny.config(num_layers=4, num_recursions=2)), tiny.tokens(2, 12)
  with nnx.use_eager_sharding(False):  # one device: the names of the axes ask for no mesh
    model = nnx.bridge.ToNNX(linen, rngs=nnx.Rngs(0)).lazy_init(tokens_BT)
  before = parameters(model)
  optimizer = nnx.Optimizer(model, optax.sgd(0.5), wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer, tokens_BT):
    loss, grads = nnx.value_and_grad(lambda model: nll(model(tokens_BT).logits, tokens_BT))(model)
    optimizer.update(model, grads)
    return loss

  loss = step(model, optimizer, tokens_BT)

  def linen_loss(params):
    return nll(linen.apply({'params': params}, tokens_BT).logits, tokens_BT)

  expected, grads = jax.jit(jax.value_and_grad(linen_loss))(before)
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  after = parameters(model)
  assert set(after) == set(before)
  wanted = jax.tree.map(lambda leaf, grad: leaf - 0.5 * grad, before, grads)
  chex.assert_trees_all_close(after, wanted, atol=1e-6)
  moved = jax.tree.map(lambda one, other: float(jnp.abs(one - other).max()), after, before)
  assert min(traverse_util.flatten_dict(moved['block'], sep='/').values()) > 0


def parameters(model: nnx.Module) -> dict:
  """The parameters of a bridged module as Linen has them."""
  return nnx.to_pure_dict(nnx.state(model, nnx.Param))
