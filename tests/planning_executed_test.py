"""FLOPs counted in jaxprs, against the closed formula of the model and products written out."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from mor_jax.model import flops
from mor_jax.model.transformer import Transformer
from mor_jax.parallel import mesh as mesh_lib
from mor_jax.planning.executed import executed_flops
from tests import tiny

A, B = jnp.zeros((3, 4, 5)), jnp.zeros((3, 5, 7))
PRODUCT = 2 * 3 * 4 * 5 * 7


def test_products_loops_and_branches():
  def branches(pick, a, b):
    return jax.lax.cond(pick, lambda: a @ b, lambda: (a @ b) @ b.swapaxes(1, 2) @ b)

  def scanned(a, b):
    return jax.lax.scan(lambda carry, _: (carry + (a @ b).sum(), None), 0.0, length=6)[0]

  assert executed_flops(jax.make_jaxpr(jnp.matmul)(A, B)) == PRODUCT
  assert executed_flops(jax.make_jaxpr(jax.jit(scanned))(A, B)) == 6 * PRODUCT
  assert executed_flops(jax.make_jaxpr(branches)(True, A, B)) == 3 * PRODUCT
  assert executed_flops(jax.make_jaxpr(jnp.sin)(A)) == 0


def test_a_program_for_one_device_counts_on_all():
  mesh = mesh_lib.make_mesh()
  rows = PartitionSpec('replica')
  mapped = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(rows, rows), out_specs=rows)
  shape = mesh.size, 4, 4
  whole = jnp.zeros(shape)
  assert executed_flops(jax.make_jaxpr(mapped)(whole, whole)) == mesh.size * 2 * 4**3


@pytest.mark.parametrize(
  ('change', 'forwards'),
  [
    ({'kind': 'vanilla'}, 3),
    ({'kind': 'recursive'}, 3),
    ({'num_recursions': 2}, 3),
    ({'num_recursions': 4, 'kv': 'shared'}, 3),
    ({'num_recursions': 2, 'dispatch': 'mask'}, 3),
    ({'kind': 'vanilla', 'remat': 'full'}, None),
  ],
)
def test_training_executes_what_the_formula_says(change, forwards):
  # Others leave out pairs of queries and keys, and compute weights again.
  change = change | {'attention': 'reference'}
  config = tiny.config(**change)
  model, variables = tiny.model(**change)
  tokens_BT = tiny.tokens(2, 24)

  def loss(variables):
    return model.apply(variables, tokens_BT).logits.sum()

  counted = executed_flops(jax.make_jaxpr(jax.grad(loss))(variables))
  expected = flops.train_flops_per_token(config, 24) * tokens_BT.size
  if forwards:
    assert counted == expected
  else:  # every layer once more, the head not
    head = 2 * config.d_model * config.vocab_size
    again = (flops.forward_flops_per_token(config, 24) - head) * tokens_BT.size
    assert expected < counted <= expected + again
  assert isinstance(model, Transformer)
