"""What a model says of every token after each recursion, if all tokens take all of them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mor_jax.model.recursion import Given
from mor_jax.model.transformer import Transformer
from mor_jax.training import vocabulary_loss
from mor_jax.training.targets import Batch, targets


def after_each(
  model: Transformer,
  batch: Batch,
  function: Callable[[jax.Array, jax.Array], Any],
  chunk: int | None,
  mesh: Mesh | None,
  max_recursions: int | None = None,
) -> tuple[jax.Array, Any]:
  """For `model.apply(..., method=after_each)`; no gradient flows through it.

  Args:
    function: (logits (N, V), targets (N,)) -> a tree of arrays (N, ...).
    chunk, mesh: as in `vocabulary_loss.map_tokens`.
    max_recursions: R; None: all of the model.

  Returns:
    The streams (R + 1, B, T, D) before the recursions and after each, and the function's tree of (R, B, T, ...) for
    the exits after 1 to R of them.
  """
  place = {'segment_ids': batch['segment_ids'], 'positions': batch['positions']}
  everywhere = Given(depths_BT=jnp.full(batch['tokens'].shape, model.config.recursions))
  states_EBTD, _ = model.trajectory(batch['tokens'], given=everywhere, max_recursions=max_recursions, **place)
  states_EBTD = jax.lax.stop_gradient(states_EBTD)
  hidden_RBTD, kernel_DV = model.read(states_EBTD[1:], **place)

  def look(x_BTD):
    return vocabulary_loss.map_tokens(function, x_BTD, kernel_DV, targets(batch), chunk, mesh)

  return states_EBTD, jax.lax.map(look, hidden_RBTD)
