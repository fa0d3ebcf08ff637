"""Loss of a model on held-out rows: negative log-likelihood and router metrics, summed exactly."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from mor_jax.config import Config
from mor_jax.model import router
from mor_jax.model.recursion import Given
from mor_jax.model.transformer import Transformer
from mor_jax.parallel import mesh as mesh_lib
from mor_jax.parallel import rules
from mor_jax.training import loss as loss_lib
from mor_jax.training import targets as targets_lib
from mor_jax.training import vocabulary_loss
from mor_jax.training.meter import add_up, router_metrics


def make_nll_step(
  model: nn.Module,
  config: Config,
  mesh: Mesh,
  routing: str = 'topk',
  max_recursions: int | None = None,
  by_position: bool = False,
  difficulties: int = 0,
  choose: Callable[[Any, targets_lib.Batch], jax.Array] | None = None,
) -> Callable[[Any, targets_lib.Batch], dict[str, Any]]:
  """Returns the jitted function (variables, batch (B, T)) -> sums 'nll' in nats, 'targets', router 'counts'.

  With `by_position`, there is also 'position': sums (T,) by the number of preceding tokens in the document.
  These are 'nll' and 'targets' of predicted tokens and, if the model has a router, 'tokens', 'depth' and
  'overflow' of all tokens.

  Args:
    difficulties: of data that know how hard their tokens are, how many kinds there are. Then there are also 'correct',
      how many tokens are predicted right, and 'difficulty': sums (K,) of 'nll', 'targets' and 'correct', and
      'depth_KR1', how many tokens of a difficulty took 0 to R recursions where they were predicted.
    choose: (variables, batch) -> depths (B, T) in place of those that the model would choose. Without a router
      there is then also 'chosen', sums 'depth' and 'tokens'.
  """

  def nll_step(variables, batch: targets_lib.Batch):
    batch = targets_lib.visible_batch(batch, config.data.segment_mask)
    depths_BT = choose(variables, batch) if choose else None
    x_BTD, kernel_DV, routed = model.apply(
      variables,
      batch['tokens'],
      routing=routing,
      segment_ids=batch['segment_ids'],
      positions=batch['positions'],
      max_recursions=max_recursions,
      given=Given(depths_BT=depths_BT),
      rngs={'routing': router.evaluation_key(batch['tokens'])},
      method=Transformer.states_and_head,
    )
    sums = {'targets': targets_lib.predicted(batch).sum()}
    groups = {'position': (batch['positions'] + 1, batch['tokens'].shape[1])} if by_position else {}
    if difficulties:
      groups['difficulty'] = (jnp.roll(batch['difficulty'], -1, axis=1), difficulties)
    sums['nll'], found = _nll_by_group(x_BTD, kernel_DV, batch, groups, config.train.loss_chunk, mesh)
    sums |= found
    if by_position:
      sums['position'] |= _routing_by_position(batch, routed)
    if difficulties:
      if routed is not None:
        depths_BT = routed.depth_BT
      elif depths_BT is None:
        depths_BT = jnp.full(batch['tokens'].shape, max_recursions or config.model.recursions)
      sums['difficulty']['depth_KR1'] = _depth_by_difficulty(
        batch, depths_BT, config.model.recursions, difficulties
      )
    if routed is not None:
      return sums | {'counts': routed.counts}
    if choose:
      real_BT = batch['segment_ids'] > 0
      sums['chosen'] = {'depth': jnp.where(real_BT, depths_BT, 0).sum(), 'tokens': real_BT.sum()}
    return sums

  return jax.jit(rules.on_mesh(mesh, nll_step), out_shardings=mesh_lib.replicated(mesh))


def _nll_by_group(x_BTD, kernel_DV, batch, groups, chunk, mesh):
  """Sums over the predicted tokens, in total and by group.

  Args:
    groups: by name the group (B, T) of the token that is predicted from each, and how many groups there are.
  """

  def token_loss(logits_NV, targets_mask_groups_N):
    targets_N, mask_N, groups_N = targets_mask_groups_N
    nll_N = jnp.where(mask_N, vocabulary_loss.token_nll(logits_NV, targets_N), 0)
    counted = {'nll': nll_N, 'targets': mask_N.astype(nll_N.dtype)}
    found = {}
    if 'difficulty' in groups:
      counted['correct'] = (mask_N & (logits_NV.argmax(axis=-1) == targets_N)).astype(nll_N.dtype)
      found['correct'] = counted['correct'].sum()
    for name, (_, count) in groups.items():
      found[name] = {key: _by_group(value, groups_N[name], count) for key, value in counted.items()}
    return nll_N.sum(), found

  groups_BT = {name: group_BT for name, (group_BT, _) in groups.items()}
  return loss_lib.sum_over_predicted(token_loss, x_BTD, kernel_DV, batch, chunk, mesh, groups_BT, None)


def _depth_by_difficulty(batch, depth_BT, recursions, difficulties):
  """Numbers of scored tokens (K, R + 1) by difficulty and the recursions taken where they are predicted."""
  scored_BT = targets_lib.predicted(batch)
  cell_BT = batch['difficulty'][:, 1:] * (recursions + 1) + depth_BT[:, :-1]
  counts = _by_group(scored_BT, jnp.where(scored_BT, cell_BT, 0), difficulties * (recursions + 1))
  return counts.reshape(difficulties, recursions + 1)


def _routing_by_position(batch, routed):
  if routed is None:
    return {}
  real_BT, length = batch['segment_ids'] > 0, batch['tokens'].shape[1]
  counted = {'tokens': real_BT, 'depth': routed.depth_BT, 'overflow': routed.overflow_RBT.any(axis=0)}
  return {
    name: _by_group(jnp.where(real_BT, value_BT, 0), batch['positions'], length)
    for name, value_BT in counted.items()
  }


def _by_group(values, group, count):
  return jax.ops.segment_sum(values.astype(jnp.float32).ravel(), group.ravel(), num_segments=count)


def run(nll_step: Callable, variables: Any, batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
  """The sums of one batch, on the host in float64."""
  return add_up(None, nll_step(variables, mesh_lib.put(batch, mesh_lib.batch_sharding(mesh))))


def evaluate(
  nll_step: Callable, variables: Any, batches: Iterable[dict[str, np.ndarray]], mesh: Mesh
) -> dict[str, float]:
  """Returns 'nll' in nats per predicted token over all batches, and the router metrics.

  Raises:
    ValueError: the batches have no token to predict.
  """
  sums = totals(nll_step, variables, batches, mesh)
  nll = {'nll': float(sums['nll'] / sums['targets'])}
  return nll | (router_metrics(sums['counts']) if 'counts' in sums else {})


def totals(
  nll_step: Callable, variables: Any, batches: Iterable[dict[str, np.ndarray]], mesh: Mesh
) -> dict[str, Any]:
  """The sums of all batches, on the host in float64.

  Padding rows contribute nothing, so they may fill the last batch.

  Raises:
    ValueError: the batches have no token to predict.
  """
  sharding = mesh_lib.batch_sharding(mesh)
  added, queued = None, None
  for batch in batches:
    sums = nll_step(variables, mesh_lib.put(batch, sharding))
    added, queued = add_up(added, queued), sums  # fetched when the next batch is already queued
  added = add_up(added, queued)
  if added is None or not added['targets']:
    raise ValueError('there is no token to predict in these rows')
  return added


def bits_per_byte(nats_per_token: float, tokens: int, num_bytes: int) -> float:
  """Bits per byte of a text, from its loss per token and its size in tokens and bytes."""
  return nats_per_token * tokens / num_bytes / math.log(2)
