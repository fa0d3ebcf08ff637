"""Routers that learn the benefit of going on: their labels worked out from cut models, and what learns from them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from mor_jax.config import ConfigError, with_changes
from mor_jax.model import flops
from mor_jax.model.recursion import Given
from mor_jax.training import benefit, budget, phases
from mor_jax.training import loss as loss_lib
from tests import tiny

CHANGE = {'router_target': 'benefit', 'num_layers': 5, 'num_recursions': 3, 'benefit_rows': 0.5}
LENGTH, MARGIN = 12, 0.05


def batch(rows: int = 4) -> dict[str, jax.Array]:
  """Rows with two documents, padding, and tokens that are not scored."""
  tokens_BT = tiny.tokens(rows, LENGTH)
  segments_BT = jnp.broadcast_to(jnp.array([1] * 5 + [2] * 5 + [0] * 2), (rows, LENGTH))
  positions_BT = jnp.broadcast_to(jnp.array([*range(5), *range(5), 0, 0]), (rows, LENGTH))
  mask_BT = jnp.ones((rows, LENGTH), jnp.int32).at[:, 3].set(0)
  return {'tokens': tokens_BT, 'segment_ids': segments_BT, 'positions': positions_BT, 'loss_mask': mask_BT}


@functools.cache
def model():
  return tiny.model(seed=3, **CHANGE)


@functools.partial(jax.jit, static_argnums=0)
def at_depth(made, variables, rows, depth):
  """The model's output if all tokens take so many recursions."""
  place = {name: rows[name] for name in ('segment_ids', 'positions')}
  depths_BT = jnp.full(rows['tokens'].shape, depth)
  return made.apply(variables, rows['tokens'], given=Given(depths_BT=depths_BT), **place)


def losses_of_cut_models(made, variables, rows) -> np.ndarray:
  """Loss (R, B, T) of the token after each, from one model for each exit, whose tokens all take 1 to R recursions."""
  found = []
  for exit_ in range(1, made.config.recursions + 1):
    logits_BTV = at_depth(made, variables, rows, exit_).logits
    logprobs_BTV = np.asarray(jax.nn.log_softmax(logits_BTV))
    targets_BT = np.roll(rows['tokens'], -1, axis=1)
    found.append(-np.take_along_axis(logprobs_BTV, targets_BT[..., None], axis=-1)[..., 0])
  return np.stack(found)


def expected_labels(nll_RBT, rows) -> np.ndarray:
  """Token by token, by the words of docs/model.md."""
  exits, batch_size, length = nll_RBT.shape
  found = np.zeros((exits - 1, batch_size, length), bool)
  for b in range(batch_size):
    for t in range(length - 1):
      same = rows['segment_ids'][b, t] == rows['segment_ids'][b, t + 1] > 0
      if same and rows['loss_mask'][b, t + 1]:
        for taken in range(1, exits):
          later = [nll_RBT[exit_ - 1, b, t] for exit_ in range(taken + 1, exits + 1)]
          found[taken - 1, b, t] = any(nll < nll_RBT[taken - 1, b, t] - MARGIN for nll in later)
  return found


def sums_of(made, variables, rows):
  return _sums(made, variables['params'], rows)


@functools.partial(jax.jit, static_argnums=0)
def _sums(made, params, rows):
  return benefit.make_loss(made.apply, made.config, chunk=5, mesh=None)(params, rows)


def by_hand(made, variables, rows, labels_RBT) -> float:
  """Cross-entropy of the routers' logits on the streams that they see, with these labels."""
  logits_RBT = at_depth(made, variables, rows, made.config.recursions).routing.logits_RBT
  probability_RBT = np.asarray(jax.nn.sigmoid(logits_RBT), np.float64)[1:]
  chosen_RBT = np.where(labels_RBT, probability_RBT, 1 - probability_RBT)
  return float(-(np.log(chosen_RBT) * (np.asarray(rows['segment_ids']) > 0)).sum())


def test_loss_is_that_of_labels_from_cut_models():
  """And not that of labels a token off, or of the exit that the token is at: both are told apart."""
  made, variables = model()
  rows = {name: array[::2] for name, array in batch().items()}  # the labelled half
  nll_RBT = losses_of_cut_models(made, variables, rows)
  wanted_RBT = expected_labels(nll_RBT, rows)
  assert 0.2 < wanted_RBT[:, :, :9].mean() < 0.8
  found = sums_of(made, variables, batch())
  assert found['benefit'] == pytest.approx(by_hand(made, variables, rows, wanted_RBT), rel=1e-4)
  assert float(found['tokens']) == 2 * 10
  shifted_RBT = np.roll(wanted_RBT, 1, axis=2)
  same_exit_RBT = expected_labels(np.concatenate([nll_RBT[1:], nll_RBT[-1:]]), rows)
  for wrong_RBT in (shifted_RBT, same_exit_RBT):
    assert found['benefit'] != pytest.approx(by_hand(made, variables, rows, wrong_RBT), rel=1e-2)


def test_depth_prior_is_of_the_mean_that_routers_expect():
  made, variables = model()
  rows = {name: array[::2] for name, array in batch().items()}
  routed = at_depth(made, variables, rows, 3).routing
  second_BT, third_BT = np.asarray(jax.nn.sigmoid(routed.logits_RBT))[1:]
  mean = (1 + second_BT + second_BT * third_BT)[np.asarray(rows['segment_ids']) > 0].mean()
  expected = 20 * (mean - sum(made.config.step_capacities)) ** 2
  assert sums_of(made, variables, batch())['depth_prior'] == pytest.approx(expected, rel=1e-4)


def test_labels_teach_the_routers_alone_and_the_text_everything_else():
  made, variables = model()
  rows = batch()
  whole = loss_lib.normalizers(made.config, jax.tree.map(lambda a: a[None], rows))
  loss = loss_lib.make_loss(made.apply, made.config)

  def values(params):
    total, parts = loss(params, rows, whole, {}, jax.random.key(0))
    return jnp.stack([parts['benefit_loss'], total - parts['benefit_loss']])

  gradients = jax.jit(jax.jacrev(values))(variables['params'])
  largest = jax.tree.map(lambda leaf: np.abs(leaf).reshape(2, -1).max(axis=1), gradients)
  from_labels, from_text = (jax.tree.map(lambda leaf, i=i: float(leaf[i]), largest) for i in (0, 1))
  assert max(jax.tree.leaves(from_labels.pop('router'))) > 1e-4
  assert max(jax.tree.leaves(from_labels)) == 0
  assert max(jax.tree.leaves(from_text.pop('router'))) == 0
  assert min(jax.tree.leaves({name: from_text[name] for name in ('block', 'embed')})) > 1e-6


@pytest.mark.slow
def test_noise_moves_the_choice_in_training_and_nowhere_else():
  made, variables = model()
  tokens_BT = tiny.tokens(4, 24)

  @functools.partial(jax.jit, static_argnames='routing')
  def noisy(seed, routing='topk'):
    return made.apply(variables, tokens_BT, routing=routing, rngs={'noise': jax.random.key(seed)})

  quiet = tiny.apply(made)(variables, tokens_BT).routing.selected_RBT
  one, same, other = (noisy(seed).routing.selected_RBT for seed in (1, 1, 2))
  assert (one == same).all()
  assert not (one == other).all()
  assert (one.sum((1, 2)) == quiet.sum((1, 2))).all()
  for seed in (1, 2):
    expected = tiny.apply(made, 'threshold')(variables, tokens_BT).logits
    np.testing.assert_allclose(noisy(seed, 'threshold').logits, expected, atol=1e-5)


@pytest.mark.parametrize(
  'change',
  [
    {'num_layers': 5, 'num_recursions': 3},
    {'num_layers': 5, 'num_recursions': 3, 'dispatch': 'mask', 'kv': 'shared'},
    {'kind': 'recursive', 'num_layers': 5, 'num_recursions': 3},
    {'router': 'token_choice', 'num_layers': 5, 'num_recursions': 3, 'token_capacity_factor': 1.0},
  ],
)
def test_a_row_that_may_take_fewer_recursions_is_that_of_a_cut_model(change):
  made, variables = tiny.model(**change)
  tokens_BT = tiny.tokens(3, 16)

  @functools.partial(jax.jit, static_argnames='max_recursions')
  def logits(most_B=None, max_recursions=None):
    given = Given(most_B=most_B)
    return made.apply(variables, tokens_BT, given=given, max_recursions=max_recursions).logits

  cut = logits(jnp.array([1, 2, 3]))
  for row, most in enumerate((1, 2, 3)):
    expected = logits(max_recursions=most)
    np.testing.assert_allclose(cut[row], expected[row], atol=2e-5)


def test_readouts_train_rows_of_every_length_and_count_only_who_may_enter():
  model_change = {'num_layers': 5, 'num_recursions': 3}
  config = with_changes(tiny_run.CONFIG, model=model_change, train={'readout_rows': 0.9, 'global_batch': 8})
  run = tiny_run.run(config)
  _, metrics = run.step(run.initial(), next(tiny_run.batches(config)))
  counts = metrics['counts']
  assert counts['entered_R'][0] > counts['selected_R'][2] > 0
  assert counts['entered_R'][1] < counts['selected_R'][0]  # rows that stop after the first
  assert np.isfinite(metrics['loss'])


def test_recursions_grow_one_by_one():
  change = {'num_layers': 5, 'num_recursions': 3}
  config = with_changes(tiny_run.CONFIG, model=change, train={'growth': (0.25, 0.5), 'steps': 20})
  planned = phases.plan(config)
  assert [(first, phase.train.recursions) for first, phase in planned] == [(0, 1), (5, 2), (10, 3)]
  length = config.data.seq_len
  of = [flops.paper_flops_per_token(config.model, length, recursions) for recursions in (1, 2, 3)]
  assert of[0] < of[1] < of[2] == flops.paper_flops_per_token(config.model, length)
  assert budget.paper_flops_per_token(config) == pytest.approx(0.25 * of[0] + 0.25 * of[1] + 0.5 * of[2])
  phase = planned[0][1]
  run = tiny_run.run(phase)
  _, metrics = run.step(run.initial(), next(tiny_run.batches(phase)))
  assert metrics['counts']['selected_R'].shape == (1,)


def test_labels_are_counted_as_work():
  config = tiny.config(**CHANGE)
  alone = tiny.config(**CHANGE | {'router_target': 'gate', 'benefit_rows': 0.125}, kv='shared')
  extra = flops.train_flops_per_token(config, 64) - 3 * flops.forward_flops_per_token(alone, 64)
  everything = flops.forward_flops_per_token(
    tiny.config(kind='recursive', num_layers=5, num_recursions=3, kv='shared'), 64
  )
  assert extra == flops.label_flops_per_token(config, 64)
  assert 0.5 * everything < extra < 0.5 * 2 * everything
  assert flops.paper_flops_per_token(config, 64) == flops.paper_flops_per_token(alone, 64)


@pytest.mark.parametrize(
  ('model_change', 'train_change', 'problem'),
  [
    ({'router_target': 'benefit', 'router': 'token_choice'}, {}, 'is for model.router=expert_choice'),
    ({'benefit_rows': 0.5}, {}, 'benefit_rows=0.5 has no effect without model.router_target=benefit'),
    ({'router_target': 'benefit', 'causality': 'aux_loss'}, {}, 'causality=aux_loss has nothing to teach'),
    ({'router_target': 'benefit', 'random_router': True}, {}, 'learns nothing'),
    ({'router_target': 'benefit', 'capacities': (0.9, 0.5), 'kv': 'recursion_wise'}, {}, 'begins below 1'),
    ({'router_target': 'benefit', 'router_z_loss_weight': 0.1}, {}, 'a loss on scores as gates'),
    (
      {'router': 'token_choice', 'router_noise': 0.5},
      {},
      'router_noise=0.5 is for model.router=expert_choice',
    ),
    ({'embed_factor': 1}, {}, 'model.embed_factor=1 is not allowed'),
    ({'kind': 'vanilla'}, {'growth': (0.5,)}, r'train.growth=\(0.5,\) stops tokens'),
    (
      {'sharing': 'sequence', 'kind': 'recursive'},
      {'readout_rows': 0.5},
      'train.readout_rows=0.5 stops tokens',
    ),
    ({}, {'growth': (0.5, 0.2)}, 'must be 1 rising shares'),
    ({}, {'growth': (1.0,)}, 'when the training is over'),
    ({}, {'recursions': 3}, 'train.recursions=3 is not allowed: must be from 1 to 2'),
    ({}, {'recursions': 1, 'growth': (0.5,)}, 'both say how many recursions'),
    ({}, {'readout_rows': 1.5}, 'train.readout_rows=1.5 is not allowed'),
  ],
)
def test_what_cannot_work_together_is_refused(model_change, train_change, problem):
  with pytest.raises(ConfigError, match=problem):
    with_changes(tiny_run.CONFIG, model=model_change, train=train_change)


def test_auto_follows_what_decides_on_it():
  config = with_changes(tiny_run.CONFIG, model={'router_target': 'benefit'})
  assert (config.model.kv, config.model.gating, config.model.causality) == ('shared', 'residual', 'none')
  assert (config.model.gate_scale, config.model.noise_scale) == (1.0, 1.0)
  assert with_changes(config, model={'kind': 'vanilla'}).model.kv == 'recursion_wise'
  kept = with_changes(config, model={'kv': 'hybrid'})
  assert with_changes(kept, model={'router_target': 'gate'}).model.kv == 'hybrid'


def test_labelled_rows_must_suit_the_devices():
  config = tiny.config(**CHANGE)
  benefit.check_rows(config, 8, 4)
  with pytest.raises(
    ConfigError, match='makes 4 of the 8 rows of a micro-batch labelled, which 8 devices cannot share'
  ):
    benefit.check_rows(config, 8, 8)
