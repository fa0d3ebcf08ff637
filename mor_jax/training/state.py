"""Everything that a checkpoint holds: step, parameters, optimiser state, router state.

The data position needs no field: the batch of a step is a function of (seed, step).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import struct, traverse_util
from jax.sharding import Mesh

from mor_jax.model.transformer import Transformer, parameter_axes
from mor_jax.parallel import rules

SEED = jax.ShapeDtypeStruct((), jnp.uint32)


@struct.dataclass
class TrainState:
  """State after `step` updates.

  Attributes:
    step: updates done, int32 ().
    params: parameters of the model, float32.
    opt_state: state of the optimiser.
    routing: what routers keep beside their parameters (`router.init_state`), mostly nothing.
    skipped: updates left out because their loss or gradient was not finite, int32 (); they count as steps.
    halted: bool (). Once true, steps change nothing: an update was not finite and none may be skipped (any more).
  """

  step: jax.Array
  params: Any
  opt_state: Any
  routing: Any = struct.field(default_factory=dict)
  skipped: Any = struct.field(default_factory=lambda: jnp.zeros((), jnp.int32))
  halted: Any = struct.field(default_factory=lambda: jnp.zeros((), jnp.bool_))

  @property
  def variables(self) -> dict[str, Any]:
    """What `model.apply` takes."""
    return {'params': self.params, 'routing': self.routing} if self.routing else {'params': self.params}


def initializer(
  model: Transformer, optimizer: optax.GradientTransformation, mesh: Mesh, seq_len: int
) -> Callable[[jax.Array], TrainState]:
  """The jitted function from a seed (uint32) to the state at step 0: every device makes its part of it."""

  def initialize(seed: jax.Array) -> TrainState:
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # says what platform it is for
      variables = nn.unbox(model.init(jax.random.key(seed), jnp.zeros((1, seq_len), jnp.int32)))
    opt_state = optimizer.init(variables['params'])
    return TrainState(jnp.zeros((), jnp.int32), variables['params'], opt_state, variables.get('routing', {}))

  shapes = jax.eval_shape(initialize, SEED)
  names = parameter_axes(model.config)
  rules.check_split(mesh, shapes.params, names)
  # It runs once, and on a CPU takes three times as long to compile with optimisation as without.
  quick = {'xla_backend_optimization_level': 0} if mesh.devices.flat[0].platform == 'cpu' else None
  return jax.jit(initialize, out_shardings=rules.shardings(mesh, shapes, names), compiler_options=quick)


def abstract_state(initialize: Callable[[jax.Array], TrainState]) -> TrainState:
  """Shapes, dtypes and sharding of the state that an `initializer` makes.

  What a step is compiled for and a checkpoint restored to.
  """
  return initialize.eval_shape(SEED)


def begin_from(state: TrainState, weights: Any) -> TrainState:
  """The state with parameters from elsewhere, each device reading its own part of a leaf.

  Args:
    state: at step 0; leaves that are replaced are deleted.
    weights: `interop.weights.Weights` of the same model; what they do not have stays.
  """
  leaves = traverse_util.flatten_dict(state.variables, sep='/')
  for path, leaf in weights.leaves():
    old, leaf = leaves[path], np.asarray(leaf, leaves[path].dtype)
    leaves[path] = jax.make_array_from_callback(old.shape, old.sharding, leaf.__getitem__)
    old.delete()
  variables = traverse_util.unflatten_dict(leaves, sep='/')
  return state.replace(params=variables['params'], routing=variables.get('routing', state.routing))
