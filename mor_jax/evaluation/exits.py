"""What recursions are worth: readouts of the stream after each of them, and what the routers made of it.

A model that is cut after k recursions may do worse because it has computed less, or because its last layer and head
never saw such a stream. Three readouts of the same forward pass tell these apart, each also with a temperature of its
own, which is fitted on every second row and reported on the others. With x_0 the stream before the recursions, x_k
after k of them:

* prefix(k) reads x_k: the model cut after k recursions;
* repeat(k) reads x_k + (R - k) (x_k - x_(k-1)): the last update is repeated in place of those that are missing, so
  that the stream has moved as far as the readout expects, with nothing new computed;
* suffix(k) reads x_0 + x_R - x_(R-k): the updates of the last k recursions, without those they build on.

If prefix(k) is bad and repeat(k) good, the recursions that were cut were worth little.

Contrast decoding reads z_R + w (z_R - z_1), the last exit's logits pushed away from the first's; w = 0 changes nothing.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mor_jax.config import Config, ConfigError
from mor_jax.data.loader import Batch
from mor_jax.model import router
from mor_jax.model.transformer import Transformer
from mor_jax.parallel import mesh as mesh_lib
from mor_jax.parallel import rules
from mor_jax.training import benefit, readout, vocabulary_loss
from mor_jax.training import targets as targets_lib
from mor_jax.training.meter import add_up

TEMPERATURES = tuple(
  float(t) for t in np.exp(np.linspace(np.log(0.5), np.log(3.0), 13))
)  # 1 is not among them
BINS = 10  # of the probability that a router gives to going on


def readouts(recursions: int) -> list[tuple[str, int]]:
  """(control, k) of every readout."""
  cut = range(1, recursions)
  return [
    *(('prefix', k) for k in range(1, recursions + 1)),
    *(('repeat', k) for k in cut),
    *(('suffix', k) for k in cut),
  ]


def stream(control: str, k: int, states_EBTD: jax.Array) -> jax.Array:
  """The stream that a readout reads, of those before the recursions and after each of R."""
  last = states_EBTD.shape[0] - 1
  if control == 'prefix':
    return states_EBTD[k]
  if control == 'repeat':
    return states_EBTD[k] + (last - k) * (states_EBTD[k] - states_EBTD[k - 1])
  return states_EBTD[0] + states_EBTD[last] - states_EBTD[last - k]


def make_step(
  model: Transformer, config: Config, mesh: Mesh, routing: str, contrasts: Sequence[float]
) -> Callable[[Any, targets_lib.Batch], dict[str, Any]]:
  """The jitted function (variables, batch (B, T)) -> sums for `summarize`.

  Args:
    routing: how tokens choose their recursions.
    contrasts: weights w of contrast decoding.
  """
  names = readouts(config.model.recursions)
  temperatures = jnp.array((1.0, *TEMPERATURES))
  chunk = config.train.loss_chunk

  def step(variables, batch: targets_lib.Batch):
    batch = targets_lib.visible_batch(batch, config.data.segment_mask)
    place = {'segment_ids': batch['segment_ids'], 'positions': batch['positions']}
    key = {'routing': router.evaluation_key(batch['tokens'])}
    states_EBTD, routed = model.apply(
      variables, batch['tokens'], routing=routing, rngs=key, **place, method=Transformer.trajectory
    )
    streams = jnp.stack([stream(*name, states_EBTD) for name in names])
    hidden_NBTD, kernel_DV = model.apply(variables, streams, **place, method=Transformer.read)
    wanted_BT = targets_lib.targets(batch)
    scored_BT = jnp.pad(targets_lib.predicted(batch), ((0, 0), (0, 1)))

    def at_temperatures(logits_NV, targets_N):
      return jax.lax.map(lambda t: vocabulary_loss.token_nll(logits_NV / t, targets_N), temperatures).T

    def of_readout(x_BTD):
      nll_BTC = vocabulary_loss.map_tokens(at_temperatures, x_BTD, kernel_DV, wanted_BT, chunk, mesh)
      sums_BC = jnp.where(scored_BT[..., None], nll_BTC, 0).sum(axis=1)
      return jnp.stack([sums_BC[::2].sum(axis=0), sums_BC[1::2].sum(axis=0)])

    sums = {
      'readouts': jax.lax.map(of_readout, hidden_NBTD),
      'targets': jnp.stack([scored_BT[::2].sum(), scored_BT[1::2].sum()]),
    }
    if contrasts:
      ends = tuple(hidden_NBTD[names.index(('prefix', k))] for k in (config.model.recursions, 1))

      def at_weights(logits, targets_N):
        return jnp.stack(
          [vocabulary_loss.token_nll(contrasted(*logits, weight), targets_N) for weight in contrasts], axis=-1
        )

      nll_BTW = vocabulary_loss.map_tokens(at_weights, ends, kernel_DV, wanted_BT, chunk, mesh)
      sums['contrast'] = jnp.where(scored_BT[..., None], nll_BTW, 0).sum(axis=(0, 1))
    if (
      config.model.kind == 'mor' and config.model.router == 'expert_choice' and not config.model.random_router
    ):
      sums['routers'] = _judged(model, config, mesh, variables, batch, scored_BT)
      sums['variance'] = _groups(config, batch, routed)
    return sums

  return jax.jit(rules.on_mesh(mesh, step), out_shardings=mesh_lib.replicated(mesh))


def contrasted(last_NV: jax.Array, first_NV: jax.Array, weight: float) -> jax.Array:
  """Logits z_R + w (z_R - z_1)."""
  return last_NV + weight * (last_NV - first_NV)


def _judged(model, config, mesh, variables, batch, scored_BT):
  """What routers of recursions 2 to R thought of going on, in bins of their probability, and what it was worth."""
  arguments = batch, vocabulary_loss.token_nll, config.train.loss_chunk, mesh
  states_EBTD, nll_RBT = model.apply(variables, *arguments, method=readout.after_each)
  logits_RBT = model.apply(variables, states_EBTD[:-1], method=Transformer.router_logits)[1:]
  bins_RBT = jnp.clip((jax.nn.sigmoid(logits_RBT) * BINS).astype(int), 0, BINS - 1)
  better_RBT = benefit.labels(nll_RBT, scored_BT, config.model.benefit_margin)
  of_each = {'tokens': jnp.ones_like(nll_RBT[1:]), 'better': better_RBT, 'gain': nll_RBT[:-1] - nll_RBT[1:]}

  def binned(values_BT, bins_BT):
    counted = jnp.where(scored_BT, values_BT, 0).astype(jnp.float32)
    return jax.ops.segment_sum(counted.ravel(), bins_BT.ravel(), num_segments=BINS)

  return {name: jax.vmap(binned)(values, bins_RBT) for name, values in of_each.items()}


def _groups(config, batch, routed):
  """Number, sum and square sum of router logits by token and by position, for every recursion."""
  entered_RBT = routed.entered_RBT
  groups = {
    'token': (batch['tokens'], config.model.vocab_size),
    'position': (batch['positions'], batch['tokens'].shape[1]),
  }

  def grouped(name):
    group_BT, count = groups[name]

    def of_step(logits_BT, entered_BT):
      values = jnp.stack([jnp.ones_like(logits_BT), logits_BT, jnp.square(logits_BT)], axis=-1)
      values = jnp.where(entered_BT[..., None], values, 0).reshape(-1, 3)
      return jax.ops.segment_sum(values, group_BT.ravel(), num_segments=count)

    return jax.vmap(of_step)(routed.logits_RBT, entered_RBT)

  return {name: grouped(name) for name in groups}


# ---- results ----


def measure(
  model: Transformer,
  config: Config,
  mesh: Mesh,
  variables: Any,
  batches: Iterable[Batch],
  contrasts: Sequence[float] = (),
) -> dict[str, Any]:
  """All of this for a model on some rows, under threshold routing where it has a router.

  Returns:
    'readouts': for every control and k the loss, the temperature fitted on the even rows, and the losses on the odd
    rows with and without it; 'contrast': weight and loss; and for expert-choice routers 'calibration', by recursion
    and bin of the probability of going on, the share of tokens that a later exit serves better and the mean gain of
    the next recursion; 'explained', the share of the variance of each router's logits that token identity and
    position explain.

  Raises:
    ConfigError: tokens of the model cannot stop after some recursions, or there are fewer than two rows.
  """
  if not config.model.can_stop_early:
    raise ConfigError(
      f'--exits looks at the recursions of a model, and those of model.kind={config.model.kind}, '
      f'model.sharing={config.model.sharing} have no exits'
    )
  step = make_step(model, config, mesh, 'threshold' if config.model.kind == 'mor' else 'topk', contrasts)
  sums = None
  for batch in batches:
    sums = add_up(sums, step(variables, mesh_lib.put(batch, mesh_lib.batch_sharding(mesh))))
  if sums is None or not sums['targets'].all():
    raise ConfigError('--exits fits temperatures on every second row and needs two of them; raise --rows')
  return summarize(sums, config.model.recursions, contrasts)


def summarize(sums: dict[str, Any], recursions: int, contrasts: Sequence[float]) -> dict[str, Any]:
  """What `measure` returns, from the sums of all batches."""
  found: dict[str, Any] = {'readouts': []}
  targets_2 = sums['targets']
  for (control, k), nll_2C in zip(readouts(recursions), sums['readouts'], strict=True):
    plain_2, fitted_2C = nll_2C[:, 0] / targets_2, nll_2C[:, 1:] / targets_2[:, None]
    best = int(fitted_2C[0].argmin())
    is_better = fitted_2C[0, best] < plain_2[0]
    found['readouts'].append(
      {
        'control': control,
        'k': k,
        'nll': float(nll_2C[:, 0].sum() / targets_2.sum()),
        'temperature': TEMPERATURES[best] if is_better else 1.0,
        'nll_other_rows': float(plain_2[1]),
        'nll_at_temperature': float(fitted_2C[1, best] if is_better else plain_2[1]),
      }
    )
  if contrasts:
    losses = sums['contrast'] / targets_2.sum()
    found['contrast'] = [{'weight': w, 'nll': float(nll)} for w, nll in zip(contrasts, losses, strict=True)]
  if 'routers' in sums:
    found['calibration'] = [
      entry
      for step in range(recursions - 1)
      for entry in _bins({name: values[step] for name, values in sums['routers'].items()}, step + 2)
    ]
    found['explained'] = [
      {
        'recursion': step + 1,
        **{name: explained(groups[step]) for name, groups in sums['variance'].items()},
      }
      for step in range(recursions)
    ]
  return found


def _bins(sums: dict[str, np.ndarray], recursion: int) -> list[dict[str, float]]:
  edges = np.linspace(0, 1, BINS + 1)
  return [
    {
      'recursion': recursion,
      'from': float(low),
      'to': float(high),
      'tokens': int(sums['tokens'][index]),
      'better': float(sums['better'][index] / sums['tokens'][index]),
      'gain': float(sums['gain'][index] / sums['tokens'][index]),
    }
    for index, (low, high) in enumerate(itertools.pairwise(edges))
    if sums['tokens'][index]
  ]


def explained(groups_G3: np.ndarray) -> float | None:
  """Share of the variance that lies between groups, from (number, sum, sum of squares) of each; None: no variance."""
  number_G, sum_G, squares_G = groups_G3.T
  count = number_G.sum()
  if not count:
    return None
  mean = sum_G.sum() / count
  total = squares_G.sum() - count * mean**2
  between = (sum_G**2 / np.maximum(number_G, 1)).sum() - count * mean**2
  return float(between / total) if total > 1e-9 * max(squares_G.sum(), 1e-30) else None
