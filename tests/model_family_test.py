"""The rest of the model family: routers, KV strategies and relaxations, alone and together."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.config import Config, ConfigError, with_changes
from mor_jax.model import flops, relaxation, router, token_choice
from mor_jax.model.transformer import Transformer, token_context
from tests import tiny

SEGMENTS = jnp.array([[1] * 9 + [2] * 8 + [0] * 6, [1] * 23])
TOKENS = tiny.tokens(*SEGMENTS.shape)
LAYERS = {1: 3, 2: 4, 3: 5}  # unrolled depth with one shared layer

EXPERT = [
  {},
  {'router_head': 'mlp', 'router_activation': 'tanh', 'router_z_loss_weight': 0.01},
  {'router_head': 'wide_mlp', 'router_activation': 'identity', 'gating': 'residual'},
  {'causality': 'aux_router', 'gating': 'additive'},
  {'selection': 'ema_threshold', 'causality': 'none'},
  {'random_router': True, 'causality': 'none'},
  {'router_target': 'benefit', 'init': 'scaled', 'embed_std': 0.3, 'embed_factor': 8},
]
TOKEN = [
  {'router': 'token_choice', **change}
  for change in (
    {},
    {'router_activation': 'sigmoid', 'balancing': 'loss_free', 'router_z_loss_weight': 0.01},
    {'token_gating': 'every_step', 'router_head': 'mlp'},
    {'gating': 'additive'},
  )
]
LIMITED = {'token_capacity_factor': 1.0}


def loss(model, variables):
  """A scalar that depends on every real token's logits and on all the routers' losses."""
  output = model.apply(variables, TOKENS, segment_ids=SEGMENTS)
  logprobs_BTV = jax.nn.log_softmax(output.logits)
  total = -jnp.where(SEGMENTS > 0, logprobs_BTV[..., 7], 0).mean()
  weights = router.loss_weights(model.config)
  for name, term in output.routing.losses.items():
    total += 10 * weights[name] * (term.sum / term.count).sum()
  return total, output


value_and_grad = jax.jit(
  lambda model, params, rest: jax.value_and_grad(
    lambda params: loss(model, {'params': params, **rest}), has_aux=True
  )(params),
  static_argnums=0,
)


def evaluate(model, variables):
  rest = {name: value for name, value in variables.items() if name != 'params'}
  return value_and_grad(model, variables['params'], rest)


def assert_gather_equals_mask(**settings):
  gathered, variables = tiny.model(dispatch='gather', **settings)
  masked = Transformer(dataclasses.replace(gathered.config, dispatch='mask'))
  (value, output), gradients = evaluate(gathered, variables)
  (expected, reference), expected_gradients = evaluate(masked, variables)
  np.testing.assert_array_equal(output.routing.selected_RBT, reference.routing.selected_RBT)
  np.testing.assert_array_equal(output.routing.overflow_RBT, reference.routing.overflow_RBT)
  real_BT = np.asarray(SEGMENTS > 0)
  np.testing.assert_allclose(output.logits[real_BT], reference.logits[real_BT], atol=5e-5)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
    other = expected_gradients
    for entry in path:
      other = other[entry.key]
    assert np.isfinite(gradient).all()
    scale = 1 + np.abs(other).max()
    np.testing.assert_allclose(gradient, other, atol=5e-5 * scale, err_msg=jax.tree_util.keystr(path))
  return output


@pytest.mark.parametrize(
  'change',
  [
    EXPERT[1],
    *(
      pytest.param(change, marks=pytest.mark.slow)
      for change in [*EXPERT[2:], *({**change, **LIMITED} for change in TOKEN)]
    ),
  ],
)
def test_gather_equals_mask(change):
  output = assert_gather_equals_mask(num_layers=5, num_recursions=3, router_alpha=0.8, **change)
  if change.get('router') == 'token_choice':
    assert output.routing.overflow_RBT.sum() > 0, 'places must run out, or the limit is not tested'


ALL = [
  (change, kv, sharing, steps)
  for change, kv, sharing, steps in itertools.product(
    [*EXPERT, *({**change, **LIMITED} for change in TOKEN)],
    ('recursion_wise', 'shared', 'hybrid'),
    ('cycle', 'middle_cycle'),
    (1, 2, 3),
  )
  if not (kv == 'hybrid' and change.get('router') == 'token_choice')
]


@pytest.mark.slow
@pytest.mark.parametrize(
  ('change', 'kv', 'sharing', 'steps'), ALL[10::19]
)  # so that sharing, steps and keys all change
def test_gather_equals_mask_in_combination(change, kv, sharing, steps):
  ends = 2 if sharing == 'middle_cycle' else 0
  assert_gather_equals_mask(num_layers=ends + steps, num_recursions=steps, kv=kv, sharing=sharing, **change)


def test_token_choice_with_room_for_all_is_exact():
  """Every token takes just the depth it chose, and the latest are refused first where room is short."""
  model, variables = tiny.model(router='token_choice', num_layers=5, num_recursions=3)
  routing = tiny.apply(model)(variables, TOKENS, segment_ids=SEGMENTS).routing
  choice_BT = routing.logits_RBT.argmax(axis=0) + 1
  np.testing.assert_array_equal(routing.depth_BT, jnp.where(SEGMENTS > 0, choice_BT, 0))
  limited = Transformer(dataclasses.replace(model.config, token_capacity_factor=1.0))
  routing = tiny.apply(limited)(variables, TOKENS, segment_ids=SEGMENTS).routing
  for step, places in enumerate(limited.config.selected_tokens(23)):
    for row in range(2):
      wanted = np.flatnonzero((choice_BT[row] > step) & routing.entered_RBT[step, row])
      np.testing.assert_array_equal(np.flatnonzero(routing.selected_RBT[step, row]), wanted[:places])


@pytest.mark.parametrize('change', [EXPERT[3], EXPERT[4], {**TOKEN[1], **LIMITED}])
def test_threshold_routing_is_causal(change):
  """Replacing all later tokens leaves logits as they are; see also model_routing_test."""
  model, variables = tiny.model(num_layers=5, num_recursions=3, router_alpha=0.8, **change)
  if 'threshold' in variables.get('routing', {}):
    variables = {**variables, 'routing': {**variables['routing'], 'threshold': jnp.array([-9.0, 0.1, -0.2])}}
  apply = tiny.apply(model, 'threshold')
  tokens_BT = np.array(tiny.tokens(8, 24))
  first = apply(variables, tokens_BT)
  assert (first.routing.counts['depth_R1'][1:] > 0).all()
  for cut in (3, 11, 20):
    other_BT = tokens_BT.copy()
    other_BT[:, cut:] = np.array(tiny.tokens(8, 24, seed=cut))[:, cut:]
    second = apply(variables, other_BT)
    np.testing.assert_allclose(first.logits[:, :cut], second.logits[:, :cut], atol=1e-5)


def test_the_moving_threshold_takes_what_top_k_takes():
  """Once the average has settled on one batch, the causal rule makes the top-k choice of that batch."""
  model, variables = tiny.model(selection='ema_threshold', causality='none', num_layers=5, num_recursions=3)
  row_BT = tiny.tokens(1, 40)
  counts = tiny.apply(model)(variables, row_BT).routing.counts
  state = router.update_state(model.config, variables['routing'], counts, jnp.int32(0))
  assert state['updates'].tolist() == [0, 1, 1], 'the first step takes all tokens and has no border'
  routing = tiny.apply(model)({**variables, 'routing': state}, row_BT).routing
  np.testing.assert_array_equal(routing.causal_RBT[1:] & routing.entered_RBT[1:], routing.selected_RBT[1:])
  moved = {**counts, 'border_R': counts['border_R'] + counts['border_rows_R']}  # every border one higher
  later = router.update_state(model.config, state, moved, jnp.int32(1))
  step = 1 - model.config.ema_decay
  np.testing.assert_allclose(later['threshold'][1:], state['threshold'][1:] + step, rtol=1e-4)


def test_the_bias_moves_towards_the_neglected_depths():
  model, variables = tiny.model(**TOKEN[1], num_layers=5, num_recursions=3)
  counts = tiny.apply(model)(variables, TOKENS, segment_ids=SEGMENTS).routing.counts
  load_R = np.asarray(counts['chosen_R'])
  assert load_R.sum() == 40
  bias_R = router.update_state(model.config, variables['routing'], counts, jnp.int32(0))['bias']
  np.testing.assert_allclose(bias_R, 0.001 * np.sign(load_R.mean() - load_R))
  pushed = {**variables, 'routing': {'bias': jnp.array([0.0, 0.0, 9.0])}}
  routing = tiny.apply(model)(pushed, TOKENS, segment_ids=SEGMENTS).routing
  assert (routing.depth_BT == 3 * (SEGMENTS > 0)).all()


def test_balancing_loss_is_one_for_an_even_load():
  config = tiny.config(router='token_choice', num_layers=5, num_recursions=3)
  choice_BT = jnp.arange(30).reshape(2, 15) % 3
  gates_BTR = jnp.full((2, 15, 3), 1 / 3)
  losses = token_choice._losses(config, jnp.zeros((2, 15, 3)), gates_BTR, choice_BT, choice_BT >= 0)
  np.testing.assert_allclose(losses['balancing'].sum / losses['balancing'].count, 1.0, rtol=1e-6)
  np.testing.assert_allclose(losses['z'].sum / losses['z'].count, np.log(3) ** 2, rtol=1e-6)


def test_auxiliary_router_does_not_disturb_the_model():
  """Its loss reaches its own parameters alone, and its scores decide only where the future is unknown."""
  model, variables = tiny.model(causality='aux_router', num_layers=4)

  @jax.jit
  @jax.grad
  def gradient(params):
    term = model.apply({'params': params}, TOKENS).routing.losses['aux']
    return (term.sum / term.count).sum()

  gradients = gradient(variables['params'])
  norms = {
    name: float(sum(jnp.abs(leaf).sum() for leaf in jax.tree.leaves(g))) for name, g in gradients.items()
  }
  assert norms.pop('aux_router') > 0
  assert set(norms.values()) == {0.0}


@pytest.mark.parametrize('change', [{'causality': 'none'}, {'router': 'token_choice', 'balancing': 'none'}])
def test_random_router_draws_anew_for_every_key(change):
  model, variables = tiny.model(random_router=True, num_layers=5, num_recursions=3, **change)
  apply = tiny.apply(model)
  selected = [
    apply(variables, TOKENS, segment_ids=SEGMENTS, rngs={'routing': jax.random.key(seed)}).routing
    for seed in (1, 1, 2)
  ]
  a, b, c = (np.asarray(routing.selected_RBT) for routing in selected)
  np.testing.assert_array_equal(a, b)
  assert (a != c).any()
  assert 'router' not in variables['params']


@pytest.mark.parametrize('change', [{'causality': 'none'}, {'router': 'token_choice', 'balancing': 'none'}])
@pytest.mark.parametrize('gate', [None, 0.3])
def test_a_random_router_weighs_all_tokens_alike(change, gate):
  """So that only the choice is random, and differences to a learned router are those of the choice."""
  config = tiny.config(random_router=True, random_gate=gate, num_layers=5, num_recursions=3, **change)
  expected = gate or {'expert_choice': 0.05, 'token_choice': 1 / 3}[config.router]
  logits = jax.random.normal(jax.random.key(0), (2, 3, 3))
  np.testing.assert_allclose(router.activate(config, logits), expected, rtol=1e-6)
  with pytest.raises(ConfigError, match=r'model\.random_gate=0\.3 is for model\.random_router=True'):
    tiny.config(random_gate=0.3)


def test_a_random_router_is_evaluated_on_other_places_of_every_batch():
  keys = [jax.random.key_data(router.evaluation_key(tiny.tokens(2, 8, seed))) for seed in (1, 1, 2)]
  np.testing.assert_array_equal(keys[0], keys[1])
  assert (keys[0] != keys[2]).any()


@pytest.mark.parametrize(
  ('sharing', 'change'),
  [
    ('cycle', {'lora_rank': 3, 'share_norms': False, 'recursion_encoding': True}),
    ('middle_sequence', {'lora_rank': 3, 'share_norms': False}),
  ],
)
def test_relaxed_steps_equal_layers_written_out(sharing, change):
  """Each unrolled layer called by itself, with the changes of its recursion added by hand."""
  model, variables = tiny.model(kind='recursive', sharing=sharing, num_layers=6, num_recursions=2, **change)
  order = {'cycle': [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)], 'middle_sequence': None}[sharing]
  if order is None:
    order = [None, (0, 0), (1, 0), (0, 1), (1, 1), None]
  params, steps = variables['params'], variables['params']['steps']
  x_BTD = params['embed']['embedding'][TOKENS]
  context = token_context(TOKENS, None, None)
  slot = {'cycle': lambda n: n, 'middle_sequence': lambda n: n + 1}[sharing]
  for depth, place in enumerate(order):
    index = (0 if depth == 0 else 3) if place is None else slot(place[1])
    layer = jax.tree.map(np.array, tiny.layer_parameters(model.config, params, index))
    if place is not None:
      step, n = place
      for name, factors in steps.get('lora', {}).items():
        group, kernel = name.split('_')
        layer[group][kernel]['kernel'] += 32 / 3 * factors['down'][step, n] @ factors['up'][step, n]
      for name, change_of in steps.get('norms', {}).items():
        layer[name]['scale'] += change_of['scale'][step, n]
      starts_pass = sharing == 'middle_sequence' or n == 0
      if 'encoding' in steps and starts_pass:
        x_BTD = x_BTD + steps['encoding']['embedding'][step]
    x_BTD, _ = tiny.run_layer(model.config, layer, x_BTD, context)
  got = model.apply(variables, TOKENS).hidden
  np.testing.assert_allclose(got, tiny.final_norm(model.config, params, x_BTD), atol=3e-5)


def test_low_rank_factors_of_full_rank_are_exact():
  rng = np.random.default_rng(0)
  residual = rng.normal(size=(2, 6, 4)).astype(np.float32)
  down, up = relaxation.low_rank(residual, rank=4, scale=2.5)
  np.testing.assert_allclose(2.5 * down @ up, residual, atol=1e-5)
  down, up = relaxation.low_rank(residual, rank=2, scale=2.5)
  values = np.linalg.svd(residual, compute_uv=False)
  error = np.linalg.norm(2.5 * down @ up - residual, axis=(1, 2))
  np.testing.assert_allclose(error, np.linalg.norm(values[:, 2:], axis=1), rtol=1e-4)


@pytest.mark.parametrize(
  ('sharing', 'source'), [('cycle', (0, 1, 2, 0, 1, 2)), ('sequence', (0, 0, 2, 2, 4, 4))]
)
def test_vanilla_layers_that_read_shared_keys_and_values(sharing, source):
  model, variables = tiny.model(kind='vanilla', kv='shared', sharing=sharing, num_recursions=2)
  context = token_context(TOKENS, None, None)
  params, made = variables['params'], {}
  x_BTD = params['embed']['embedding'][TOKENS]
  for depth, origin in enumerate(source):
    layer = tiny.layer_parameters(model.config, params, depth)
    x_BTD, made[depth] = tiny.run_layer(model.config, layer, x_BTD, context, made.get(origin))
  got = model.apply(variables, TOKENS).hidden
  np.testing.assert_allclose(got, tiny.final_norm(model.config, params, x_BTD), atol=3e-5)


@pytest.mark.parametrize(
  'change',
  [
    *EXPERT,
    *TOKEN,
    {'lora_rank': 3},
    {'lora_rank': 2, 'lora_targets': 'query_value'},
    {'lora_rank': 3, 'lora_layers': 'all'},
    {'lora_rank': 3, 'lora_sharing': 'one', 'lora_layers': 'all', 'share_norms': False},
    {'lora_rank': 3, 'lora_sharing': 'one', 'sharing': 'sequence', 'num_layers': 6, 'kind': 'recursive'},
    {'lora_rank': 3, 'kind': 'vanilla', 'lora_layers': 'all', 'lora_targets': 'query_value'},
    {'lora_rank': 3, 'kind': 'vanilla', 'lora_layers': 'all', 'kv': 'shared'},
    {'share_norms': False},
    {'recursion_encoding': True},
  ],
)
def test_parameter_count_is_the_size_of_the_tree(change):
  config = tiny.config(**{'num_layers': 5, 'num_recursions': 3, 'head_dim': 6, **change})
  tree = jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))['params']
  assert flops.count_parameters(config).total == sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'router_activation': 'softmax'}, 'use one of auto, sigmoid, tanh, identity'),
    ({'router': 'token_choice', 'router_activation': 'tanh'}, 'use one of auto, softmax, sigmoid'),
    ({'router': 'token_choice', 'capacities': (1.0, 0.5)}, 'set model.token_capacity_factor'),
    ({'router': 'token_choice', 'kv': 'hybrid'}, 'needs model.kind=mor and model.router=expert_choice'),
    ({'router': 'token_choice', 'gating': 'residual'}, 'use weighted or additive'),
    ({'router': 'token_choice', 'gating': 'additive', 'token_gating': 'every_step'}, 'no gate to apply'),
    ({'router': 'token_choice', 'selection': 'ema_threshold'}, 'leave it at top_k'),
    ({'router': 'token_choice', 'random_router': True}, 'set model.balancing=none'),
    ({'selection': 'ema_threshold', 'causality': 'aux_router'}, 'both decide'),
    ({'random_router': True}, 'set model.causality=none'),
    ({'token_capacity_factor': 1.5}, 'set model.capacities'),
    ({'kind': 'recursive', 'kv': 'hybrid'}, 'needs model.kind=mor'),
    ({'kv': 'shared', 'capacities': (0.9, 0.5)}, 'set the first capacity to 1.0'),
    ({'kind': 'vanilla', 'lora_rank': 4}, 'which model.kind=vanilla does not have'),
    ({'kind': 'vanilla', 'share_norms': False}, 'which model.kind=vanilla does not have'),
    ({'kind': 'recursive', 'sharing': 'sequence', 'recursion_encoding': True}, 'use cycle or middle_cycle'),
    ({'num_layers': 2}, 'needs at least 3 layers'),
  ],
)
def test_combinations_without_sense_are_refused(change, message):
  with pytest.raises(ConfigError) as error:
    with_changes(Config(), model={**tiny.SHAPE, **change})
  assert message in str(error.value)
