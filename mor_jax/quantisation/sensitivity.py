"""Which inputs the kernels of a model meet, and how much errors cost there, added up over all recursions.

A kernel that is off by D changes its product for a token by x D, x its input, and the loss by this times the gradient g
of the product. Taken for independent of x, |g|^2 weighs the token, and the second moments sum |g|^2 x x^T over all
tokens say what an error costs (the Hessian of GPTQ, arXiv 2210.17323, where every token weighs the same).
A token counts in each recursion that it takes, with the inputs that it has there, and in no other: of a recursion that
it does not take the gradient is zero. Reverse differentiation adds up the recursions by itself, however layers share
their parameters, as it does the gradients of shared kernels: a product gets a derivative with respect to a second
argument, which is this sum.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh

from mor_jax.config import Config, with_changes
from mor_jax.data.loader import Batch
from mor_jax.model import kernels, router
from mor_jax.model.transformer import Transformer
from mor_jax.parallel import mesh as mesh_lib
from mor_jax.parallel import rules
from mor_jax.training import loss as loss_lib
from mor_jax.training import targets as targets_lib

PARTS = ('first', 'block', 'last')


@struct.dataclass
class Measured:
  """A kernel (..., I, O) whose products have a derivative with respect to `sums` (..., I, I): the moments, see above."""

  kernel: jax.Array
  sums: jax.Array

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the kernel."""
    return self.kernel.shape

  def whole(self) -> jax.Array:
    """The kernel."""
    return self.kernel

  def plus(self, change: jax.Array) -> 'Measured':
    """The changed kernel, measured too."""
    return self.replace(kernel=self.kernel + change)

  def product(self, x_NI: jax.Array) -> jax.Array:
    """x @ kernel."""
    return _measured_product(x_NI, self.kernel, self.sums)


@jax.custom_vjp
def _measured_product(x_NI, kernel_IO, sums_II):
  return x_NI @ kernel_IO


def _forward(x_NI, kernel_IO, sums_II):
  return x_NI @ kernel_IO, (x_NI, kernel_IO)


def _backward(kept, gradient_NO):
  x_NI, kernel_IO = kept
  weight_N1 = jnp.square(gradient_NO).sum(axis=1, keepdims=True)
  return gradient_NO @ kernel_IO.T, jnp.zeros_like(kernel_IO), (x_NI * weight_N1).T @ x_NI


_measured_product.defvjp(_forward, _backward)


def _zeros(kernel):
  *stacked, inputs, _ = kernel.shape
  return jnp.zeros((*stacked, inputs, inputs))


def kernel_paths(params: dict) -> list[str]:
  """Paths of the kernels of all layers, 'block/mlp/up/kernel'."""
  found: list[str] = []
  kernels.map_paths(
    lambda path, _: found.append(path), {name: params[name] for name in PARTS if name in params}
  )
  return [path for path in found if path.endswith('/kernel')]


def measure(
  config: Config,
  variables: dict[str, Any],
  batches: Iterable[Batch],
  mesh: Mesh,
  max_recursions: int | None = None,
) -> dict[str, np.ndarray]:
  """The moments (..., I, I) of every kernel of the layers by its path, summed over all tokens and recursions.

  Args:
    config: of the model, which is computed in float32.
    batches: rows that it is computed on, with causal routing.
    max_recursions: recursions that tokens take at most; None: all.
  """
  config = with_changes(config, model={'dtype': 'float32'})
  model = Transformer(config.model)
  paths = set(kernel_paths(variables['params']))

  def loss(sums, variables, batch):
    params = kernels.map_paths(
      lambda path, leaf: Measured(kernels.whole(leaf), sums[path]) if path in paths else leaf,
      variables['params'],
    )
    x_BTD, kernel_DV, _ = model.apply(
      {**variables, 'params': params},
      batch['tokens'],
      routing='threshold' if config.model.kind == 'mor' else 'topk',
      segment_ids=batch['segment_ids'],
      positions=batch['positions'],
      max_recursions=max_recursions,
      rngs={'routing': router.evaluation_key(batch['tokens'])},
      method=Transformer.states_and_head,
    )
    return loss_lib.next_token_nll(x_BTD, kernel_DV, batch, config.train.loss_chunk, mesh)

  def step(variables, batch):
    batch = targets_lib.visible_batch(batch, config.data.segment_mask)
    zeros: dict[str, jax.Array] = {}
    kernels.map_paths(
      lambda path, leaf: zeros.update({path: _zeros(leaf)} if path in paths else {}), variables['params']
    )
    return jax.grad(loss)(zeros, variables, batch)

  compiled = jax.jit(rules.on_mesh(mesh, step), out_shardings=mesh_lib.replicated(mesh))
  total: dict[str, np.ndarray] = {}
  for batch in batches:
    found = compiled(variables, mesh_lib.put(batch, mesh_lib.batch_sharding(mesh)))
    total = {path: total.get(path, 0) + np.asarray(sums) for path, sums in found.items()}
  return total
