"""FLOPs executed by a traced program: the matrix products in its jaxpr.

XLA's own cost analysis counts the body of a loop once, so it is wrong for programs that scan over layers.
"""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend import core


def executed_flops(jaxpr: core.Jaxpr | core.ClosedJaxpr) -> float:
  """FLOPs of all matrix products, summed over all devices.

  A product counts exactly (2mkn). The body of a scan counts once per iteration, a conditional counts its
  most expensive branch, and a loop of unknown length counts once. A kernel (`pallas_call`) counts its
  declared cost or, without one, its products at every point of its grid.
  """
  if isinstance(jaxpr, core.ClosedJaxpr):
    jaxpr = jaxpr.jaxpr
  return sum(_equation_flops(equation) for equation in jaxpr.eqns)


def _equation_flops(equation: core.JaxprEqn) -> float:
  name, params = equation.primitive.name, equation.params
  if name == 'dot_general':
    return _product_flops(equation)
  if name == 'cond':
    return max(executed_flops(branch) for branch in params['branches'])
  if name == 'pallas_call' and params.get('cost_estimate') is not None:
    return params['cost_estimate'].flops
  inner = sum(executed_flops(jaxpr) for value in params.values() for jaxpr in _jaxprs(value))
  return inner * _repetitions(name, params) if inner else 0.0


def _repetitions(name: str, params: dict[str, Any]) -> int:
  """How often the jaxpr in an equation's parameters runs."""
  if name == 'scan':
    return params['length']
  if name == 'shard_map':  # written for one device
    manual = params['newly_manual_axes'] if 'newly_manual_axes' in params else params['manual_axes']
    return math.prod(
      params['mesh'].shape[axis] for axis in manual
    )  # the name differs between versions of JAX
  if name == 'pallas_call':
    return math.prod(params['grid_mapping'].grid)
  return 1


def _product_flops(equation: core.JaxprEqn) -> float:
  """Two FLOPs per multiply-add: 2 * output elements * length of the contracted axes."""
  (contracted, _), _ = equation.params['dimension_numbers']
  left = equation.invars[0].aval.shape
  return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _jaxprs(value: Any) -> Iterator[core.Jaxpr | core.ClosedJaxpr]:
  if isinstance(value, (core.Jaxpr, core.ClosedJaxpr)):
    yield value
  elif isinstance(value, (tuple, list)):
    for item in value:
      yield from _jaxprs(item)
