"""Loss of a model on held-out rows: negative log-likelihood and router metrics, summed exactly."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from mor_jax.config import Config
from mor_jax.model.transformer import Transformer
from mor_jax.parallel import mesh as mesh_lib
from mor_jax.parallel import rules
from mor_jax.training import loss as loss_lib
from mor_jax.training.meter import add_up, router_metrics


def make_nll_step(
  model: nn.Module, config: Config, mesh: Mesh, routing: str = 'topk'
) -> Callable[[Any, loss_lib.Batch], dict[str, Any]]:
  """The jitted function (variables, batch (B, T)) -> sums 'nll' in nats, 'targets', 'counts' of the routers."""

  def nll_step(variables, batch: loss_lib.Batch):
    batch = loss_lib.visible_batch(batch, config.data.segment_mask)
    x_BTD, kernel_DV, routed = model.apply(
      variables,
      batch['tokens'],
      routing=routing,
      segment_ids=batch['segment_ids'],
      positions=batch['positions'],
      method=Transformer.hidden_and_head,
    )
    sums = {
      'nll': loss_lib.next_token_nll(x_BTD, kernel_DV, batch, config.train.loss_chunk, mesh),
      'targets': loss_lib.predicted(batch['segment_ids']).sum(),
    }
    return sums if routed is None else sums | {'counts': routed.counts}

  return jax.jit(rules.on_mesh(mesh, nll_step), out_shardings=mesh_lib.replicated(mesh))


def run(nll_step: Callable, variables: Any, batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
  """The sums of one batch, on the host in float64."""
  return add_up(None, nll_step(variables, mesh_lib.put(batch, mesh_lib.batch_sharding(mesh))))


def evaluate(
  nll_step: Callable, variables: Any, batches: Iterable[dict[str, np.ndarray]], mesh: Mesh
) -> dict[str, float]:
  """'nll' in nats per predicted token over all batches, and the router metrics.

  Rows of padding count for nothing, so the last batch may be filled up with them.

  Raises:
    ValueError: no token in the batches is predicted.
  """
  sharding = mesh_lib.batch_sharding(mesh)
  totals, queued = None, None
  for batch in batches:
    sums = nll_step(variables, mesh_lib.put(batch, sharding))
    totals, queued = add_up(totals, queued), sums  # fetched when the next batch is already queued
  totals = add_up(totals, queued)
  if totals is None or not totals['targets']:
    raise ValueError('there is no token to predict in these rows')
  nll = {'nll': float(totals['nll'] / totals['targets'])}
  return nll | (router_metrics(totals['counts']) if 'counts' in totals else {})


def bits_per_byte(nats_per_token: float, tokens: int, num_bytes: int) -> float:
  """Bits per byte of text, from the loss per token and the size of the text in both units."""
  return nats_per_token * tokens / num_bytes / math.log(2)
