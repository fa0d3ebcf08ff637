"""What a token may depend on: causality under threshold routing, segments, padding, places."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.model import expert_choice, router
from tests import tiny

STRICT = {'num_layers': 5, 'num_recursions': 3, 'router_alpha': 0.8}


TOKEN = {**STRICT, 'router': 'token_choice', 'router_alpha': None}
LIMITED = {**TOKEN, 'token_capacity_factor': 1.0}
EXPERT_CHOICE = {
  'aux loss, weighted': {},
  'aux loss, additive': {'gating': 'additive'},
  'aux loss, residual': {'gating': 'residual'},
  'aux router, weighted': {'causality': 'aux_router'},
  'aux router, additive': {'causality': 'aux_router', 'gating': 'additive', 'router_head': 'wide_mlp'},
  'aux router, residual': {'causality': 'aux_router', 'gating': 'residual', 'router_head': 'mlp'},
  'untaught, weighted': {'causality': 'none', 'router_head': 'mlp'},
  'untaught, additive': {'causality': 'none', 'gating': 'additive'},
  'untaught, residual': {'causality': 'none', 'gating': 'residual', 'router_temperature': 0.5},
  'tanh': {'router_activation': 'tanh'},
  'identity': {'router_activation': 'identity', 'router_alpha': 0.1},
  'moving threshold': {'selection': 'ema_threshold'},
  'shared': {'kv': 'shared'},
  'benefit': {'router_target': 'benefit', 'embed_factor': 8},
  'hybrid': {'kv': 'hybrid', 'causality': 'aux_router'},
}
EXPERT_CHOICE = {name: {**STRICT, **change} for name, change in EXPERT_CHOICE.items()}
# Who chooses without a look at the row is causal in training, too.
CAUSAL = {
  'token choice': TOKEN,
  'token choice, places': LIMITED,
  'token choice, every step': {**LIMITED, 'token_gating': 'every_step', 'balancing': 'loss_free'},
  'token choice, shared': {**LIMITED, 'kv': 'shared', 'gating': 'additive'},
  'token choice, random': {**LIMITED, 'random_router': True, 'balancing': 'none'},
  'random': {**STRICT, 'random_router': True, 'causality': 'none'},
}
IN_DEFAULT_SUITE = ('aux loss, weighted', 'aux router, residual', 'token choice, places')


def futures_replaced(apply, variables, draws=20, rows=4, length=24, **options):
  """Largest change of logits up to a random t when all tokens after t are replaced, over many draws."""
  rng = np.random.default_rng(0)
  shape = draws * rows, length
  before_BT, other_BT = (rng.integers(0, tiny.SHAPE['vocab_size'], shape) for _ in range(2))
  kept_BT = np.arange(length) < np.repeat(rng.integers(1, length - 1, draws), rows)[:, None]
  after_BT = np.where(kept_BT, before_BT, other_BT)
  first, second = (
    apply(variables, jnp.asarray(tokens_BT, jnp.int32), **options).logits
    for tokens_BT in (before_BT, after_BT)
  )
  return float(jnp.abs(first - second)[kept_BT].max())


def also_slow(names):
  """Those of IN_DEFAULT_SUITE, the others among the slow tests."""
  return [n if n in IN_DEFAULT_SUITE else pytest.param(n, marks=pytest.mark.slow) for n in names]


def model_with_state(change):
  """A model and variables, a moving threshold and a balancing bias not 0."""
  made, variables = tiny.model(**change)
  shift = {name: leaf + 0.05 for name, leaf in variables.get('routing', {}).items()}
  return made, {**variables, 'routing': shift} if shift else variables


@pytest.mark.parametrize('name', also_slow([*EXPERT_CHOICE, *CAUSAL]))
def test_threshold_routing_is_causal_and_top_k_is_not(name):
  """Of every router; the choice of the best tokens looks ahead, the others do not even in training."""
  made, variables = model_with_state((EXPERT_CHOICE | CAUSAL)[name])
  threshold = tiny.apply(made, 'threshold')
  options = {'max_len': 24, 'slack': 0.8}
  counts = threshold(variables, tiny.tokens(80, 24), **options).routing.counts
  assert (counts['depth_R1'][1:] > 0).all(), 'every depth must be taken, or the test shows nothing'
  if min(made.config.step_capacities) < 1:
    assert counts['overflow_R'].sum() > 0, 'some regions must be full'
  assert futures_replaced(threshold, variables, **options) < 1e-5
  looked_ahead = futures_replaced(tiny.apply(made, 'topk'), variables)
  assert looked_ahead < 1e-5 if name in CAUSAL else looked_ahead > 1e-2


@pytest.mark.parametrize('change', [STRICT, pytest.param(LIMITED, marks=pytest.mark.slow)])
def test_places_given_to_the_latest_would_be_noticed(change, monkeypatch):
  """The test above fails for token-choice, too, once something in the future counts."""

  def from_the_end(wants_BT, starts_BT, places):
    del starts_BT
    return jnp.cumsum(wants_BT[:, ::-1], axis=1)[:, ::-1] <= places

  monkeypatch.setattr(router, 'has_place', from_the_end)
  made, variables = tiny.model(**change)
  apply = jax.jit(
    lambda variables, tokens_BT: made.apply(variables, tokens_BT, routing='threshold', slack=0.5)
  )
  assert futures_replaced(apply, variables) > 1e-2


@pytest.mark.parametrize('kind', ['vanilla', 'recursive', 'mor'])
def test_packed_documents_give_what_they_give_alone(kind):
  made, variables = tiny.model(kind=kind, **STRICT)
  lengths = (9, 5, 7)
  row_T = np.asarray(tiny.tokens(1, 24))[0]
  segments_T = np.repeat([1, 2, 3, 0], (*lengths, 24 - sum(lengths)))
  apply = tiny.apply(made, 'threshold')
  packed = apply(variables, row_T[None], segment_ids=segments_T[None], max_len=24)
  for segment, length in enumerate(lengths, start=1):
    tokens_T = row_T[segments_T == segment]
    alone = np.zeros((1, 24), np.int32)
    alone[0, :length] = tokens_T
    ids = (np.arange(24) < length)[None].astype(np.int32)
    expected = apply(variables, alone, segment_ids=ids, max_len=24)
    np.testing.assert_allclose(
      packed.logits[0, segments_T == segment], expected.logits[0, :length], atol=1e-5
    )
    if kind == 'mor':
      np.testing.assert_array_equal(
        packed.routing.depth_BT[0, segments_T == segment], expected.routing.depth_BT[0, :length]
      )


@pytest.mark.parametrize('dispatch', ['gather', 'mask'])
@pytest.mark.parametrize('routing', ['topk', 'threshold'])
def test_padding_changes_nothing(dispatch, routing):
  """What stands in the padding, and its presence in another row, leaves every other number alone."""
  made, variables = tiny.model(dispatch=dispatch, **STRICT)
  apply = tiny.apply(made, routing)
  tokens_BT = np.array(tiny.tokens(2, 24))
  ids_BT = np.ones((2, 24), np.int32)
  ids_BT[1, 10:] = 0
  first = apply(variables, tokens_BT, segment_ids=ids_BT)
  tokens_BT[1, 10:] = (tokens_BT[1, 10:] + 7) % tiny.SHAPE['vocab_size']
  second = apply(variables, tokens_BT, segment_ids=ids_BT)
  np.testing.assert_allclose(first.logits[ids_BT > 0], second.logits[ids_BT > 0], atol=1e-6)
  assert not first.routing.selected_RBT[:, ids_BT == 0].any()
  for left, right in zip(
    jax.tree.leaves((first.routing.counts, first.routing.losses)),
    jax.tree.leaves((second.routing.counts, second.routing.losses)),
    strict=True,
  ):
    np.testing.assert_allclose(left, right, rtol=1e-5)
  if routing == 'topk':
    expected_R = router.entrants(made.config, jnp.asarray(ids_BT))
    np.testing.assert_array_equal(first.routing.counts['entered_R'], expected_R)
    np.testing.assert_array_equal(first.routing.losses['aux'].count, expected_R)


class AdmissionTest(chex.TestCase):
  """The causal choice, as the compiled model makes it and as plain calls do."""

  @chex.variants(with_jit=True, without_jit=True)
  def test_follows_the_written_rule(self):
    """Against the rule spelled out token by token in plain Python."""
    admit = self.variant(expert_choice.admit)
    rng = np.random.default_rng(3)
    overflowed = 0
    for _ in range(50):
      length, places = 30, int(rng.integers(1, 6))
      segments_T = np.sort(rng.integers(1, 4, length))
      starts_T = np.r_[True, segments_T[1:] != segments_T[:-1]]
      active_T = rng.random(length) < 0.8
      logits_T = rng.normal(size=length)
      selected, overflow, taken = [], [], {}
      for t in range(length):
        wants = active_T[t] and logits_T[t] > 0.2
        free = taken.get(segments_T[t], 0) < places
        selected.append(wants and free)
        overflow.append(wants and not free)
        taken[segments_T[t]] = taken.get(segments_T[t], 0) + (wants and free)
      got, lost = admit(*(jnp.asarray(a)[None] for a in (logits_T, active_T, starts_T)), places, False, 0.2)
      np.testing.assert_array_equal(got[0], selected)
      np.testing.assert_array_equal(lost[0], overflow)
      overflowed += sum(overflow)
    assert overflowed > 0


def test_places_run_out_and_are_counted():
  made, variables = tiny.model(**STRICT)
  apply = tiny.apply(made, 'threshold')
  tokens_BT = tiny.tokens(4, 24)
  ample = apply(variables, tokens_BT, max_len=24, slack=3.0).routing
  tight = apply(variables, tokens_BT, max_len=24, slack=0.3).routing
  assert made.config.step_places(24, 0.3) == (8, 5, 3)
  assert ample.counts['overflow_R'].tolist() == [0, 0, 0]
  assert tight.counts['overflow_R'][1] > 0
  assert tight.counts['overflow_R'][0] == 0, 'a step of capacity 1 admits every token'
  assert (tight.selected_RBT.sum(axis=2) <= np.array([24, 5, 3])[:, None]).all()


def test_places_are_whole_numbers_in_spite_of_float_capacities():
  config = tiny.config(capacities=(1.0, 0.1))
  assert config.step_places(30, 1.0) == (30, 3)
  assert config.step_places(31, 1.0) == (31, 4)


def test_bad_arguments_are_refused():
  made, variables = tiny.model()
  with pytest.raises(ValueError, match="routing='greedy'"):
    made.apply(variables, tiny.tokens(1, 4), routing='greedy')
  with pytest.raises(ValueError, match='max_len=3 is shorter'):
    made.apply(variables, tiny.tokens(1, 4), routing='threshold', max_len=3)
