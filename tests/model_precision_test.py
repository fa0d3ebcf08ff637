"""What is promised in float32 is computed in it, whatever the dtype of the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AbstractMesh, AxisType

from mor_jax.parallel import mesh as mesh_lib
from mor_jax.parallel import rules
from mor_jax.training import loss as loss_lib

REDUCTIONS = {
  'scatter-add',
  'scatter_add',
  'reduce_sum',
  'psum',
  'psum_invariant',
  'reduce_scatter',
  'cumsum',
}


def equations(jaxpr):
  """All equations of a jaxpr, at any depth."""
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      for inner in value if isinstance(value, (list, tuple)) else [value]:
        inner = getattr(inner, 'jaxpr', inner)
        if hasattr(inner, 'eqns'):
          yield from equations(inner)


@pytest.mark.parametrize(
  'change',
  [
    {'recursion_encoding': True, 'lora_rank': 2, 'share_norms': False, 'tie_embeddings': False},
    {'kind': 'recursive', 'recursion_encoding': True},
    {'router': 'token_choice', 'kv': 'shared', 'router_alpha': None},
    {'kv': 'hybrid', 'dispatch': 'mask', 'causality': 'aux_router'},
  ],
)
@pytest.mark.parametrize('shape', [(1, 1, 1), (2, 2, 1)])
def test_no_gradient_is_summed_up_in_bfloat16(change, shape):
  """A sum of many terms kept in bfloat16 stops growing once it is 256 times its terms."""
  model, variables = tiny.model(dtype='bfloat16', vocab_size=64, **change)
  mesh = AbstractMesh(shape, mesh_lib.AXES, axis_types=(AxisType.Auto,) * len(shape))
  loss = loss_lib.make_loss(model.apply, model.config, 0, mesh)
  zeros_BT = np.zeros((4, 8), np.int32)
  batch = {'tokens': zeros_BT, 'segment_ids': zeros_BT + 1, 'positions': zeros_BT}
  whole = loss_lib.normalizers(model.config, {'segment_ids': batch['segment_ids'][None]})

  def gradient(params):
    return jax.grad(lambda params: loss(params, batch, whole, {}, jax.random.key(0))[0])(params)

  with jax.sharding.use_abstract_mesh(mesh):
    jaxpr = jax.make_jaxpr(rules.on_mesh(mesh, gradient))(variables['params'])
  totals = [
    (equation.primitive.name, variable.aval.shape)
    for equation in equations(jaxpr.jaxpr)
    for variable in equation.outvars
    if equation.primitive.name in REDUCTIONS and variable.aval.dtype == jnp.bfloat16
  ]
  assert not totals


def test_the_gradient_of_a_frequent_token_has_all_its_terms():
  model, variables = tiny.model(kind='vanilla', dtype='bfloat16')
  tokens_BT = jnp.zeros((4, 512), jnp.int32)
  weights_BTD = jax.random.uniform(jax.random.key(1), (4, 512, model.config.d_model)).astype(jnp.bfloat16)

  def total(params):
    x_BTD = model.apply({'params': params}, tokens_BT, method='embedded')
    return (x_BTD * weights_BTD).astype(jnp.float32).sum()

  found_D = jax.grad(total)(variables['params'])['embed']['embedding'][0]
  np.testing.assert_allclose(found_D, np.asarray(weights_BTD, np.float64).sum((0, 1)), rtol=1e-5)


def test_routers_multiply_in_float32_on_every_device():
  model, variables = tiny.model(dtype='bfloat16', router_head='mlp')
  rows_BT = jnp.zeros((1, 8), jnp.int32)
  jaxpr = jax.make_jaxpr(lambda tokens_BT: model.apply(variables, tokens_BT))(rows_BT)
  precisions = [
    equation.params['precision']
    for equation in equations(jaxpr.jaxpr)
    if equation.primitive.name == 'dot_general' and all(v.aval.dtype == jnp.float32 for v in equation.invars)
  ]
  assert precisions == [(jax.lax.Precision.HIGHEST,) * 2] * 2 * model.config.recursions
