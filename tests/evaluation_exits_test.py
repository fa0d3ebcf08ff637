"""Recursions one by one: readouts, calibration, explained variance, other choosers, and results by difficulty."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mor_jax.config import Config, ConfigError, with_changes
from mor_jax.evaluation import choosers, difficulty, exits, nll
from mor_jax.model.recursion import Given
from mor_jax.model.transformer import Transformer
from mor_jax.parallel import mesh as mesh_lib
from tests import tiny

LENGTH, ROWS, WEIGHTS = 16, 4, (0.0, 0.5)
CHANGE = {'router_target': 'benefit', 'num_layers': 5, 'num_recursions': 3}
MESH = mesh_lib.make_mesh(devices=jax.devices()[:1])


def batch() -> dict[str, np.ndarray]:
  """Rows of one document whose tokens are of three difficulties; every third is not scored."""
  tokens_BT = np.array(tiny.tokens(ROWS, LENGTH))
  difficulty_BT = np.broadcast_to(np.arange(LENGTH) % 3, (ROWS, LENGTH)).astype(np.int32)
  return {
    'tokens': tokens_BT,
    'segment_ids': np.ones_like(tokens_BT),
    'positions': np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH)).copy(),
    'loss_mask': (difficulty_BT < 2).astype(np.int32),
    'difficulty': np.where(difficulty_BT < 2, difficulty_BT + 1, -1).astype(np.int32),
  }


@functools.cache
def model():
  made, variables = tiny.model(seed=3, **CHANGE)
  return made, variables, with_changes(Config(), model=vars(made.config), data={'seq_len': LENGTH})


@functools.cache
def measured():
  made, variables, config = model()
  return exits.measure(made, config, MESH, variables, [batch()], WEIGHTS)


def scored() -> np.ndarray:
  """Which places (B, T - 1) predict a token that counts."""
  return batch()['loss_mask'][:, 1:] > 0


def losses(logits_BTV) -> np.ndarray:
  """Loss (B, T - 1) of every next token, in float64."""
  logprobs_BTV = jax.nn.log_softmax(np.asarray(logits_BTV, np.float64))[:, :-1]
  return -np.take_along_axis(np.asarray(logprobs_BTV), batch()['tokens'][:, 1:, None], axis=-1)[..., 0]


def test_the_first_recursions_are_those_of_a_cut_model():
  made, variables, _ = model()
  apply = jax.jit(functools.partial(made.apply, routing='threshold'), static_argnames='max_recursions')
  found = {(entry['control'], entry['k']): entry for entry in measured()['readouts']}
  assert list(found) == [
    *(('prefix', k) for k in (1, 2, 3)),
    *((c, k) for c in ('repeat', 'suffix') for k in (1, 2)),
  ]
  for k in (1, 2, 3):
    logits = apply(variables, batch()['tokens'], max_recursions=k).logits
    nll_BT = losses(logits)
    assert found['prefix', k]['nll'] == pytest.approx(nll_BT[scored()].mean(), rel=1e-5)
    assert found['prefix', k]['nll_other_rows'] == pytest.approx(
      nll_BT[1::2][scored()[1::2]].mean(), rel=1e-5
    )
    temperature = found['prefix', k]['temperature']
    cooled = losses(logits / temperature)[1::2][scored()[1::2]].mean()
    assert found['prefix', k]['nll_at_temperature'] == pytest.approx(cooled, rel=1e-5)
    # Fitted on the other rows: none of the temperatures is better there.
    even = [losses(logits / t)[::2][scored()[::2]].mean() for t in (1.0, *exits.TEMPERATURES)]
    assert min(even) == pytest.approx(losses(logits / temperature)[::2][scored()[::2]].mean(), rel=1e-6)


def test_controls_are_sums_of_updates():
  states = jnp.array([0.0, 1.0, 3.0, 7.0])[:, None, None, None]  # updates 1, 2, 4
  wanted = {('prefix', 2): 3, ('repeat', 1): 3, ('repeat', 2): 5, ('suffix', 1): 4, ('suffix', 2): 6}
  for name, value in wanted.items():
    assert float(exits.stream(*name, states).squeeze()) == value


def test_no_contrast_is_the_model_itself():
  found = measured()
  whole = found['readouts'][2]['nll']
  assert [entry['weight'] for entry in found['contrast']] == list(WEIGHTS)
  assert found['contrast'][0]['nll'] == pytest.approx(whole, rel=1e-6)  # sums in another order
  assert abs(found['contrast'][1]['nll'] - whole) > 1e-4
  logits = tiny.tokens(2, 8).astype(jnp.float32) / 7
  np.testing.assert_array_equal(exits.contrasted(logits, logits[::-1], 0.0), logits)


def test_what_routers_thought_is_held_against_what_it_was_worth():
  made, variables, config = model()
  tokens_BT = batch()['tokens']
  give = jax.jit(
    lambda depth: made.apply(variables, tokens_BT, given=Given(depths_BT=jnp.full((ROWS, LENGTH), depth)))
  )
  nll_RBT = np.stack([losses(give(depth).logits) for depth in (1, 2, 3)])
  probability_RBT = np.asarray(jax.nn.sigmoid(give(3).routing.logits_RBT))[:, :, :-1]
  found = measured()['calibration']
  for recursion in (2, 3):
    entries = [entry for entry in found if entry['recursion'] == recursion]
    assert sum(entry['tokens'] for entry in entries) == scored().sum()
    gain = nll_RBT[recursion - 2] - nll_RBT[recursion - 1]
    better = nll_RBT[recursion - 1 :].min(axis=0) < nll_RBT[recursion - 2] - config.model.benefit_margin
    for entry in entries:
      probability = probability_RBT[recursion - 1]
      inside = scored() & (probability >= entry['from']) & (probability < entry['to'])
      assert inside.sum() == entry['tokens']
      assert entry['gain'] == pytest.approx(gain[inside].mean(), abs=1e-5)
      assert entry['better'] == pytest.approx(better[inside].mean())


def test_of_two_routers_the_one_that_decides_is_judged():
  made, variables = tiny.model(causality='aux_router', num_layers=5, num_recursions=3)
  config = with_changes(Config(), model=vars(made.config), data={'seq_len': LENGTH})
  found = exits.measure(made, config, MESH, variables, [batch()])['calibration']
  tokens_BT = batch()['tokens']
  output = jax.jit(
    lambda: made.apply(variables, tokens_BT, given=Given(depths_BT=jnp.full((ROWS, LENGTH), 3)))
  )()
  goes_on_BT = np.asarray(output.routing.causal_RBT)[1, :, :-1]
  seen = sum(entry['tokens'] for entry in found if entry['recursion'] == 2 and entry['from'] >= 0.5)
  assert seen == (goes_on_BT & scored()).sum()
  assert 0 < seen < scored().sum()


def test_explained_variance_is_that_between_groups():
  rng = np.random.default_rng(0)
  group = rng.integers(0, 5, 400)
  values = group + rng.normal(size=400)
  sums = np.array(
    [[np.sum(group == g), values[group == g].sum(), (values[group == g] ** 2).sum()] for g in range(5)]
  )
  expected = np.var([values[group == g].mean() for g in group]) / np.var(values)
  assert exits.explained(sums) == pytest.approx(expected)
  assert exits.explained(np.array([[3.0, 3.0, 3.0]])) is None
  for entry in measured()['explained']:
    assert 0 <= entry['token'] <= 1
    assert 0 <= entry['position'] <= 1


@pytest.mark.parametrize('seed', range(3))
def test_rank_correlation_is_spearmans(seed):
  rng = np.random.default_rng(seed)
  first, second = rng.integers(0, 4, 300), rng.integers(0, 3, 300)
  second += first * (seed > 0)
  counts = np.zeros((4, 6))
  np.add.at(counts, (first, second), 1)
  expected = stats.spearmanr(first, second).statistic
  assert difficulty.rank_correlation(counts) == pytest.approx(expected)
  # Difficulties that are drawn anew have nothing to do with the depth.
  permuted = np.zeros((4, 6))
  np.add.at(permuted, (rng.permutation(first), second), 1)
  assert abs(difficulty.rank_correlation(permuted)) < 0.2
  assert difficulty.rank_correlation(counts[:1]) is None


def test_results_by_difficulty_are_those_of_its_tokens():
  made, variables, config = model()
  step = nll.make_nll_step(made, config, MESH, 'threshold', by_position=True, difficulties=3)
  sums = nll.totals(step, variables, [batch()], MESH)
  output = tiny.apply(made, 'threshold')(variables, jnp.asarray(batch()['tokens']))
  nll_BT, depth_BT = losses(output.logits), np.asarray(output.routing.depth_BT)[:, :-1]
  right_BT = np.asarray(output.logits.argmax(-1))[:, :-1] == batch()['tokens'][:, 1:]
  found = difficulty.summarize(sums['difficulty'])
  assert [entry['difficulty'] for entry in found['by_difficulty']] == [1, 2]
  for entry in found['by_difficulty']:
    of_it = batch()['difficulty'][:, 1:] == entry['difficulty']
    assert entry['predicted_tokens'] == of_it.sum()
    assert entry['nll'] == pytest.approx(nll_BT[of_it].mean(), rel=1e-5)
    assert entry['accuracy'] == pytest.approx(right_BT[of_it].mean())
    assert entry['mean_depth'] == pytest.approx(depth_BT[of_it].mean())
  expected = stats.spearmanr(batch()['difficulty'][:, 1:][scored()], depth_BT[scored()]).statistic
  assert found['rank_correlation'] == pytest.approx(expected)
  assert sums['nll'] == pytest.approx(nll_BT[scored()].sum(), rel=1e-5)
  assert sums['position']['targets'].sum() == sums['targets'] == scored().sum()


# ---- other choosers ----


def test_chosen_depths():
  nll_RBT = jnp.array([[[2.0, 1.0, 3.0]], [[1.0, 0.98, 2.0]], [[0.5, 2.0, 1.98]]])
  assert choosers.oracle_depths(nll_RBT, 0.05).tolist() == [[3, 1, 2]]
  confidence_RBT = jnp.array([[[0.9, 0.1, 0.3]], [[0.1, 0.6, 0.4]], [[0.2, 0.9, 0.1]]])
  assert choosers.confident_depths(confidence_RBT, 0.5).tolist() == [[1, 2, 3]]
  _, _, config = model()
  depths_BT = np.asarray(choosers.random_depths(config, batch()))
  assert [(depths_BT > r).sum(axis=1).tolist() for r in range(3)] == [[16] * 4, [10] * 4, [5] * 4]
  assert len({tuple(row) for row in depths_BT}) == ROWS


@pytest.mark.parametrize('wanted', [1.2, 1.9, 2.5])
def test_margin_of_confidence_spends_what_it_may(wanted):
  confidence_RN = np.random.default_rng(0).uniform(size=(3, 2000))
  margin = choosers.fit_margin(confidence_RN, wanted)
  depth = np.asarray(choosers.confident_depths(jnp.asarray(confidence_RN), margin)).mean()
  assert wanted - 0.02 < depth <= wanted


@functools.cache
def chosen_by(name):
  made, variables, config = model()
  choose = choosers.make(name, made, config, MESH, variables, [batch()])
  step = nll.make_nll_step(made, config, MESH, 'threshold', difficulties=3, choose=choose)
  return nll.totals(step, variables, [batch()], MESH)


@pytest.mark.parametrize('name', choosers.CHOOSERS)
def test_every_chooser_evaluates_the_same_weights(name):
  sums = chosen_by(name)
  depths = sums['difficulty']['depth_KR1'].sum(axis=0)
  assert depths.sum() == scored().sum()
  if name == 'all':
    assert depths.tolist() == [0, 0, 0, scored().sum()]
  else:
    assert depths[1:].max() < depths.sum()


def test_hindsight_is_better_than_lots_and_all():
  found = {name: chosen_by(name)['nll'] for name in ('random', 'all', 'oracle')}
  assert found['oracle'] < min(found['random'], found['all'])


def test_confidence_spends_what_it_is_given():
  made, variables, config = model()
  choose = choosers.make('confidence', made, config, MESH, variables, [batch()], mean_depth=1.5)
  depths_BT = jax.jit(choose)(variables, batch())
  assert 1.3 < float(depths_BT.mean()) <= 1.5


def test_depths_given_to_a_recursive_model_are_counted():
  made, variables = tiny.model(kind='recursive', num_layers=5, num_recursions=3, kv='shared')
  config = with_changes(Config(), model=vars(made.config), data={'seq_len': LENGTH})

  def choose(variables, batch):
    return 1 + batch['positions'] % 2

  step = nll.make_nll_step(made, config, MESH, difficulties=3, choose=choose)
  sums = nll.totals(step, variables, [batch()], MESH)
  depths = 1 + np.broadcast_to(np.arange(LENGTH) % 2, (ROWS, LENGTH))[:, :-1][scored()]
  assert sums['difficulty']['depth_KR1'].sum(axis=0).tolist() == np.bincount(depths, minlength=4).tolist()
  real_BT = batch()['segment_ids'] > 0
  assert sums['chosen']['depth'] == (1 + batch()['positions'] % 2)[real_BT].sum()
  assert sums['chosen']['tokens'] == real_BT.sum()


def test_models_without_exits_are_refused():
  made = Transformer(tiny.config(kind='vanilla'))
  config = with_changes(Config(), model=vars(made.config))
  with pytest.raises(ConfigError, match='have no exits'):
    exits.measure(made, config, MESH, {}, [])
  with pytest.raises(ConfigError, match='--router=all chooses recursions'):
    choosers.make('all', made, config, MESH, {}, [])
