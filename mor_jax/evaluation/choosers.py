"""Other ways to choose the depths of a trained model's tokens, to see what its own choice is worth.

Weights trained under one router are evaluated with another (`mor_jax.evaluate --router=NAME`):

* `random`: as many tokens at every recursion as the capacities say, drawn by lot in each row;
* `all`: every token takes all recursions;
* `confidence`: nothing is trained; a token leaves after the first recursion whose readout is sure, that is, whose two
  best tokens differ by at least a margin of probability. The margin is fitted, for each half of the rows on the other,
  to spend what the capacities would (early exit, Schuster et al. 2022);
* `oracle`: **optimistic**, by hindsight: the first exit whose loss is within the benefit margin of the best exit's. It
  knows the target, so no model can choose like that; it is a bound of what choosing can gain.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mor_jax.config import Config, ConfigError
from mor_jax.data.loader import Batch
from mor_jax.model.router import evaluation_key
from mor_jax.model.transformer import Transformer
from mor_jax.parallel import mesh as mesh_lib
from mor_jax.parallel import rules
from mor_jax.training import readout, vocabulary_loss
from mor_jax.training import targets as targets_lib

CHOOSERS = ('random', 'all', 'confidence', 'oracle')
Choose = Callable[[Any, targets_lib.Batch], jax.Array]


def make(
  name: str,
  model: Transformer,
  config: Config,
  mesh: Mesh,
  variables: Any,
  other_rows: Iterable[Batch],
  mean_depth: float | None = None,
) -> Choose:
  """(variables, batch) -> depths (B, T), 1 to R.

  Args:
    name: one of CHOOSERS.
    other_rows: batches that are not evaluated, which `confidence` is fitted on.
    mean_depth: recursions that `confidence` may spend on a token; None: what the capacities say.

  Raises:
    ConfigError: tokens of this model cannot stop early.
  """
  if not config.model.can_stop_early:
    raise ConfigError(
      f'--router={name} chooses recursions, and tokens of a model of model.kind={config.model.kind}, '
      f'model.sharing={config.model.sharing} cannot stop after some of them'
    )
  if name == 'random':
    return lambda variables, batch: random_depths(config, batch)
  if name == 'all':
    return lambda variables, batch: jnp.full(batch['tokens'].shape, config.model.recursions)
  if name == 'oracle':
    return lambda variables, batch: oracle_depths(
      exits(model, config, mesh, variables, batch)['nll'], config.model.benefit_margin
    )
  wanted = sum(config.model.step_capacities) if mean_depth is None else mean_depth
  margin = _fit_confidence(model, config, mesh, variables, other_rows, wanted)
  return lambda variables, batch: confident_depths(
    exits(model, config, mesh, variables, batch)['confidence'], margin
  )


def random_depths(config: Config, batch: targets_lib.Batch) -> jax.Array:
  """Depths (B, T) by lot: in every row, the capacity's share of its tokens at every recursion."""
  real_BT = batch['segment_ids'] > 0
  drawn_BT = jax.random.uniform(evaluation_key(batch['tokens']), real_BT.shape)
  rank_BT = jnp.argsort(jnp.argsort(jnp.where(real_BT, drawn_BT, 2.0), axis=1), axis=1)
  taken_R11 = jnp.array(config.model.selected_tokens(real_BT.shape[1]))[:, None, None]
  return jnp.maximum((rank_BT < taken_R11).sum(axis=0), 1)


def oracle_depths(nll_RBT: jax.Array, margin: float) -> jax.Array:
  """The first exit (B, T), counted from 1, that no later one beats by more than the margin."""
  best_BT = nll_RBT.min(axis=0)
  return 1 + (nll_RBT <= best_BT + margin).argmax(axis=0)


def confident_depths(confidence_RBT: jax.Array, margin: float | jax.Array) -> jax.Array:
  """The first exit (B, T), counted from 1, that is so sure, or the last."""
  sure_RBT = (confidence_RBT >= margin).at[-1].set(True)
  return 1 + sure_RBT.argmax(axis=0)


def exits(
  model: Transformer, config: Config, mesh: Mesh, variables: Any, batch: targets_lib.Batch
) -> dict[str, jax.Array]:
  """What the model says of every token after each of 1 to R recursions, if all tokens take all of them.

  Returns arrays (R, B, T): 'nll' of the token that follows; 'confidence', by how much the probability of the best
  token exceeds that of the second.
  """

  def look(logits_NV, targets_N):
    best_N2 = jax.lax.top_k(jax.nn.softmax(logits_NV), 2)[0]
    nll_N = vocabulary_loss.token_nll(logits_NV, targets_N)
    return {'nll': nll_N, 'confidence': best_N2[:, 0] - best_N2[:, 1]}

  arguments = batch, look, config.train.loss_chunk, mesh
  return model.apply(variables, *arguments, method=readout.after_each)[1]


def _fit_confidence(model, config, mesh, variables, rows, wanted) -> float:
  """The margin with which tokens take so many recursions in the mean."""

  def confidence(variables, batch):
    batch = targets_lib.visible_batch(batch, config.data.segment_mask)
    return exits(model, config, mesh, variables, batch)['confidence']

  step = jax.jit(rules.on_mesh(mesh, confidence), out_shardings=mesh_lib.replicated(mesh))
  seen = []
  for batch in rows:
    confidence_RBT = np.asarray(step(variables, mesh_lib.put(batch, mesh_lib.batch_sharding(mesh))))
    seen.append(confidence_RBT[:, batch['segment_ids'] > 0])
  if not seen:
    raise ConfigError(
      '--router=confidence is fitted on half of the rows and needs two batches of them; raise --rows'
    )
  return fit_margin(np.concatenate(seen, axis=1), wanted)


def fit_margin(confidence_RN: np.ndarray, mean_depth: float) -> float:
  """The largest margin with which N tokens take at most so many recursions in the mean, by bisection."""
  low, high = 0.0, 1.0
  for _ in range(30):
    middle = (low + high) / 2
    depth = np.asarray(confident_depths(jnp.asarray(confidence_RN), middle)).mean()
    low, high = (middle, high) if depth <= mean_depth else (low, middle)
  return low
