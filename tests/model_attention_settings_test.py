"""Biases, norms, windows, layers without rotation and scaled rotations, through routing, sharing and decoding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mor_jax.config import ConfigError
from mor_jax.model import flops, sharing
from mor_jax.model.rotary import rotation
from mor_jax.model.transformer import Transformer
from mor_jax.training import optimizer
from tests import tiny, tiny_engine

WINDOW = 6
SETTINGS = {
  'biases': {'attention_bias': 'qkv'},
  'all biases': {'attention_bias': 'all'},
  'norms': {'qk_norm': True},
  'window': {'sliding_window': WINDOW},
  'no rotation': {'no_rope_layers': (1,)},
  'yarn': {'rope_scaling': 'yarn', 'rope_scaling_factor': 4.0, 'rope_original_length': 16},
  'dynamic': {
    'rope_scaling': 'dynamic',
    'rope_scaling_factor': 4.0,
    'rope_original_length': 16,
    'rope_length': 64,
  },
}
TOGETHER = {
  **SETTINGS['all biases'],
  **SETTINGS['norms'],
  **SETTINGS['window'],
  **SETTINGS['no rotation'],
  **SETTINGS['yarn'],
}
EXPERT = {'num_layers': 8, 'num_recursions': 3}  # two layers in the block, of which one rotates
TOKEN = {**EXPERT, 'router': 'token_choice', 'token_capacity_factor': 1.0}


def alone_or_together():
  """All settings together, and each alone, among the slow tests."""
  return [
    pytest.param(TOGETHER, id='together'),
    *(pytest.param(SETTINGS[name], id=name, marks=pytest.mark.slow) for name in SETTINGS),
  ]


@pytest.mark.parametrize(
  'kind',
  [
    {**EXPERT, 'kv': 'shared'},
    pytest.param({**EXPERT, 'kv': 'recursion_wise'}, marks=pytest.mark.slow),
    pytest.param({**EXPERT, 'kv': 'hybrid'}, marks=pytest.mark.slow),
    pytest.param(TOKEN, marks=pytest.mark.slow),
  ],
)
@pytest.mark.parametrize('change', alone_or_together())
def test_gathered_tokens_are_those_of_the_whole_row(change, kind):
  """A window counts positions, and not the places that selected tokens have among each other."""
  made, variables = tiny.model(**kind, **change)
  masked = Transformer(dataclasses.replace(made.config, dispatch='mask'))
  tokens_BT = tiny.tokens(2, 40)
  segments_BT = jnp.asarray(np.repeat([[1] * 25 + [2] * 11 + [0] * 4], 2, axis=0))

  found, expected = (
    tiny.apply(each)(variables, tokens_BT, segment_ids=segments_BT).logits for each in (made, masked)
  )
  np.testing.assert_allclose(found[:, :36], expected[:, :36], atol=1e-4)


DECODED = {
  'expert': (EXPERT, 'gather', 1, True),
  'expert shared': ({**EXPERT, 'kv': 'shared'}, 'lanes', 0, False),
  'expert hybrid': ({**EXPERT, 'kv': 'hybrid'}, 'lanes', 0, True),
  'token': (TOKEN, 'lanes', 0, True),
  'token, all lanes': (TOKEN, 'groups', 0, True),
  'vanilla': ({'kind': 'vanilla'}, 'lanes', 0, True),
  'vanilla shared': ({'kind': 'vanilla', 'kv': 'shared', 'no_rope_layers': (1, 3)}, 'gather', 0, True),
  'recursive': ({'kind': 'recursive', 'num_recursions': 2}, 'gather', 0, True),
  'recursive sequence': (
    {'kind': 'recursive', 'sharing': 'middle_sequence', 'kv': 'shared'},
    'lanes',
    0,
    True,
  ),
}


@pytest.mark.usefixtures('room_after_test')
@pytest.mark.parametrize(
  'name', [pytest.param(name, marks=pytest.mark.slow) if case[3] else name for name, case in DECODED.items()]
)
def test_decoding_equals_the_full_forward(name):
  """Prompts of mixed length, in chunks longer than the window, then token by token."""
  change, read, seed, _ = DECODED[name]
  made, variables = tiny.model(seed=seed, **{**TOGETHER, **change})
  engine = tiny_engine.engine(made, variables, keep_logits=True, slack=1.0, read=read)
  scheduler = tiny_engine.KeepingScheduler(engine)
  results = scheduler.run(tiny_engine.requests((1, 20, 45, 9), temperature=1.0, max_new_tokens=64))
  tiny_engine.assert_as_full_forward(scheduler, tiny_engine.rows(made, variables, results, 64, 1.0))


@pytest.mark.slow
def test_drafts_and_used_prefixes_keep_the_window():
  made, variables = tiny.model(seed=1, **TOGETHER, **EXPERT)
  plain = tiny_engine.engine(made, variables, slack=1.0)
  drafting = tiny_engine.engine(made, variables, slack=1.0, speculate=3)
  requests = tiny_engine.requests((1, 20, 45, 9), temperature=1.0, max_new_tokens=64)
  again = [dataclasses.replace(request, prompt=(*requests[2].prompt[:40], 3)) for request in requests]
  expected = [result.tokens for result in tiny_engine.Scheduler(plain).run([*requests, *again])]
  scheduler = tiny_engine.Scheduler(drafting, drafting=True)
  assert [result.tokens for result in scheduler.run([*requests, *again])] == expected


@pytest.mark.parametrize(
  'change',
  [
    {'kind': 'vanilla', 'num_layers': 4},
    # Who is chosen does not hang on the tokens, and they are gathered.
    {'random_router': True, 'causality': 'none', 'num_layers': 4, 'kv': 'shared'},
    pytest.param({'random_router': True, 'causality': 'none', 'num_layers': 4}, marks=pytest.mark.slow),
    pytest.param({'kind': 'recursive', 'num_layers': 4}, marks=pytest.mark.slow),
  ],
)
def test_tokens_outside_all_windows_do_not_matter(change):
  """Through n layers a token reaches n (w - 1) positions: not one less, and nothing after them, nor before itself."""
  made, variables = tiny.model(num_recursions=2, sliding_window=WINDOW, **change)
  tokens_BT, at = tiny.tokens(1, 40), 3
  other_BT = tokens_BT.at[0, at].add(1) % made.config.vocab_size
  found, changed = (tiny.apply(made)(variables, tokens).logits[0] for tokens in (tokens_BT, other_BT))
  differs_T = np.asarray(jnp.abs(found - changed).max(axis=-1) > 0)
  reach = 4 * (WINDOW - 1)
  assert not differs_T[:at].any()
  assert not differs_T[at + reach + 1 :].any()
  assert differs_T[at]
  if change.get('kind') == 'vanilla':
    assert differs_T[at : at + reach + 1].all()
  else:
    assert differs_T[at + WINDOW : at + reach + 1].any()


def test_a_window_of_the_whole_row_is_none():
  made, variables = tiny.model(kind='vanilla', num_layers=2)
  windowed = Transformer(dataclasses.replace(made.config, sliding_window=24))
  tokens_BT = tiny.tokens(1, 24)
  one, other = (tiny.apply(each)(variables, tokens_BT).logits for each in (made, windowed))
  np.testing.assert_array_equal(one, other)


def test_without_rotation_the_order_of_what_came_before_is_nothing():
  made, variables = tiny.model(kind='vanilla', num_layers=1, no_rope_layers=(0,))
  rotating = Transformer(dataclasses.replace(made.config, no_rope_layers=()))
  tokens_BT = tiny.tokens(1, 12)
  shuffled_BT = tokens_BT.at[0, :-1].set(tokens_BT[0, -2::-1])

  def last(made, tokens_BT):
    return tiny.apply(made)(variables, tokens_BT).logits[0, -1]

  np.testing.assert_allclose(last(made, tokens_BT), last(made, shuffled_BT), atol=1e-5)
  assert jnp.abs(last(rotating, tokens_BT) - last(rotating, shuffled_BT)).max() > 1e-2


@pytest.mark.parametrize('scheme', ['middle_cycle', pytest.param('sequence', marks=pytest.mark.slow)])
def test_a_shared_layer_rotates_or_not_wherever_it_is_used(scheme):
  """As in the unrolled vanilla model, where every use of it is a layer."""
  change = {'kind': 'recursive', 'num_recursions': 2, 'sharing': scheme, 'num_layers': 6}
  made, variables = tiny.model(**{**TOGETHER, **change, 'no_rope_layers': (1,)})
  slots = sharing.layer_slots(made.config)
  layers = tuple(depth for depth, slot in enumerate(slots) if slot == 1)
  assert len(layers) == 2
  unrolled = Transformer(
    dataclasses.replace(made.config, kind='vanilla', num_recursions=2, no_rope_layers=layers)
  )
  params = {name: leaf for name, leaf in variables['params'].items() if name in ('embed', 'final_norm')}
  parts = [tiny.layer_parameters(made.config, variables['params'], slot) for slot in slots]
  params['block'] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
  tokens_BT = tiny.tokens(2, 30)
  found = tiny.apply(made)(variables, tokens_BT).logits
  np.testing.assert_allclose(found, tiny.apply(unrolled)({'params': params}, tokens_BT).logits, atol=1e-4)


def test_dynamic_rotations_are_those_of_a_larger_base():
  """theta * (factor * length / original - (factor - 1)) ** (E / (E - 2)), and none of it at the original length."""
  config = tiny.config(head_dim=16, **SETTINGS['dynamic'])
  plain = dataclasses.replace(config, rope_scaling='none', rope_length=None)
  positions_BC = jnp.arange(100)[None]
  larger = dataclasses.replace(plain, rope_theta=10000.0 * (4.0 * 64 / 16 - 3.0) ** (16 / 14))
  short = dataclasses.replace(config, rope_length=None)
  for one, other in ((config, larger), (short, plain)):
    np.testing.assert_allclose(
      rotation(one, positions_BC).cos_BC1E, rotation(other, positions_BC).cos_BC1E, atol=1e-4
    )


@pytest.mark.parametrize('change', [*SETTINGS.values(), TOGETHER])
@pytest.mark.parametrize('kind', [EXPERT, {'kind': 'vanilla'}])
def test_parameters_are_counted_made_and_decayed_as_they_should(change, kind):
  made = Transformer(tiny.config(**{**kind, **change}))
  shapes = nn.unbox(jax.eval_shape(made.init, jax.random.key(0), tiny.tokens(1, 1)))['params']
  assert flops.count_parameters(made.config).total == sum(leaf.size for leaf in jax.tree.leaves(shapes))
  mask = jax.tree_util.tree_leaves_with_path(optimizer.decayed(shapes))
  plain = {path[-1].key for path, decays in mask if not decays}
  assert plain == ({'scale', 'bias'} if 'attention_bias' in change else {'scale'})
  biases = sorted({path[-2].key for path, _ in mask if path[-1].key == 'bias'})
  wanted = {'qkv': ['key', 'query', 'value'], 'all': ['key', 'output', 'query', 'value']}
  assert biases == wanted.get(made.config.attention_bias, [])


def test_biases_begin_at_zero_and_norms_at_one():
  made = Transformer(tiny.config(kind='vanilla', num_layers=2, attention_bias='all', qk_norm=True))
  attention = nn.unbox(jax.jit(made.init)(jax.random.key(0), tiny.tokens(1, 1)))['params']['block'][
    'attention'
  ]
  assert all(not attention[name]['bias'].any() for name in ('query', 'key', 'value', 'output'))
  for name in ('query_norm', 'key_norm'):
    np.testing.assert_array_equal(attention[name]['scale'], np.ones((2, made.config.head_width)))


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'attention_bias': 'q'}, r"attention_bias='q' is not one of none, qkv, all"),
    ({'sliding_window': 0}, r'sliding_window=0 is not allowed: must be at least 1, or none'),
    ({'no_rope_layers': (4,)}, r'no_rope_layers=\(4,\) .* this model has 4'),
    ({'no_rope_layers': (1, 1)}, r'no_rope_layers=\(1, 1\) must be different'),
    ({'kind': 'vanilla', 'kv': 'shared', 'no_rope_layers': (1,)}, 'has some of the layers 1, 3, but not all'),
    (
      {'kind': 'vanilla', 'kv': 'shared', 'no_rope_layers': (1,), 'sharing': 'sequence'},
      'has some of the layers 0, 1,',
    ),
    (
      {'rope_length': 9000},
      r'rope_length=9000 has no effect with model.rope_scaling=none; set it to dynamic',
    ),
    ({'rope_attention_factor': 1.5}, 'rope_attention_factor=1.5 has no effect'),
    (SETTINGS['yarn'] | {'rope_beta_fast': 0.5}, r'rope_beta_fast=0.5 .* above rope_beta_slow=1.0'),
    (SETTINGS['yarn'] | {'rope_attention_factor': 0.0}, r'rope_attention_factor=0.0 is not allowed'),
    (SETTINGS['dynamic'] | {'rope_length': 8}, r'rope_length=8 .* at least rope_original_length=16'),
    (SETTINGS['dynamic'] | {'head_dim': 2}, r'head_dim=2 has a single rotation'),
  ],
)
def test_what_cannot_be_meant_is_refused(change, message):
  with pytest.raises(ConfigError, match=message):
    tiny.config(**change)
