"""Incremental decoding against the full threshold forward: every router, KV strategy and kind of sharing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.config import ConfigError
from mor_jax.inference.requests import Request, RequestError
from mor_jax.inference.scheduler import Scheduler
from mor_jax.model import cache as cache_lib
from mor_jax.model import flops
from mor_jax.model.transformer import Transformer
from tests import decoding_cases, tiny, tiny_engine
from tests.decoding_cases import EXPERT, TOKEN

DRAFTED = ('token limited',)  # in the default suite


@pytest.mark.usefixtures('room_after_test')
@pytest.mark.parametrize('name', decoding_cases.NAMES)
def test_decoding_equals_the_full_forward(name):
  """Logits to 1e-4 in float32, equal depths: 200 tokens, prompts of mixed length, slots used again, full regions.

  So it is with drafts (`speculation`), most of which are wrong.
  """
  case = decoding_cases.CASES[name]
  made, variables = decoding_cases.build(case)
  scheduler, results = decoding_cases.decode(case, made, variables)
  rows = tiny_engine.rows(made, variables, results, decoding_cases.MAX_LEN, case.slack)
  lengths = [len(row.result.tokens) for row in rows]
  assert lengths == [decoding_cases.MAX_LEN - length for length in decoding_cases.PROMPTS]
  tiny_engine.assert_as_full_forward(scheduler, rows)
  if made.config.kind == 'mor':
    decoding_cases.assert_choices_show_something(case, made, variables, rows)
    if min(made.config.step_capacities) < 1:
      assert np.sum(scheduler.statistics.overflow) > 0, 'no region was full'
  if case.is_slow or name in DRAFTED:
    drafting, results = decoding_cases.decode(case, made, variables, drafting=True, speculate=3)
    assert [result.tokens for result in results] == [row.result.tokens for row in rows]
    drafted = zip(rows, results, strict=True)
    tiny_engine.assert_as_full_forward(
      drafting, [dataclasses.replace(row, result=one) for row, one in drafted]
    )
    assert drafting.statistics.ticks == 0
    assert 0 < np.sum(drafting.statistics.accepted) <= np.sum(drafting.statistics.judged)
    np.testing.assert_array_equal(drafting.statistics.overflow, scheduler.statistics.overflow)


@pytest.mark.parametrize(
  ('dtype', 'most'),
  [
    pytest.param('bfloat16', 0.1, marks=pytest.mark.slow),
    ('int8', 0.1),
    pytest.param('int4', 2.0, marks=pytest.mark.slow),
  ],
)
def test_prompt_and_decoding_agree_through_a_rounded_cache(dtype, most):
  """A prompt computed in chunks gives the logits of the same tokens decoded one by one."""
  made, variables = tiny.model(seed=9, **EXPERT)
  tokens = tiny_engine.prompt(40)
  options = {'cache_dtype': dtype, 'keep_logits': True, 'slack': 1.0}
  rows = []
  for known in (1, 39):
    engine = tiny_engine.engine(made, variables, **options)
    state, request = engine.init_state(), Request(tokens[:known])
    prefix = engine.prefill([request]) if known > 1 else None
    # The tokens after the prompt are known too, so that both ways compute the same.
    state = engine.insert(state, prefix, 0, 0, Request(tokens, max_new_tokens=2))
    state, _ = engine.generate(state, 1000)
    rows.append(np.asarray(state.logits_NTV[0, 38:41]))
  exact = tiny.apply(made, 'threshold')(variables, jnp.asarray([tokens]), max_len=64, slack=1.0).logits[0, 38]
  error, difference = np.abs(rows[0][0] - exact).max(), np.abs(rows[0] - rows[1]).max()
  assert 1e-4 < error < most, 'rounded, and no more than that'
  # Float32 noise may turn the rounding of single values.
  assert difference < error / 4


@pytest.mark.parametrize('stop', [(), ('given',)])
def test_log_probabilities_are_those_of_the_full_forward(stop):
  """Of prompts, computed in chunks of 16, and of what follows; to 1e-4 in float32, whatever else is in the batch."""
  made, variables = tiny.model(seed=9, **EXPERT)
  scheduler = Scheduler(tiny_engine.engine(made, variables, slots=2, slack=1.0, top_logprobs=3))
  requests = tiny_engine.requests((1, 20, 45), temperature=1.0, max_new_tokens=8, prompt_logprobs=True)
  if stop:
    drawn = scheduler.run(requests)
    requests = [
      dataclasses.replace(request, stop_tokens=(result.tokens[4],))
      for request, result in zip(requests, drawn, strict=True)
    ]
  results = scheduler.run(requests)
  for row in tiny_engine.rows(made, variables, results, 64, 1.0):
    end = [row.result.end_token] if row.result.finish == 'stop_token' else []
    tokens = (*row.result.request.prompt, *row.result.tokens, *end)
    assert bool(end) == bool(stop)
    assert len(row.result.logprobs) == len(row.result.top_logprobs) == len(tokens)
    assert (row.result.logprobs[0], row.result.top_logprobs[0]) == (None, [])
    logprobs_TV = np.asarray(jax.nn.log_softmax(row.full.logits[0]))
    for place in range(1, len(tokens)):
      logprobs_V = logprobs_TV[place - 1]
      assert row.result.logprobs[place] == pytest.approx(logprobs_V[tokens[place]], abs=1e-4)
      ids, values = zip(*row.result.top_logprobs[place], strict=True)
      np.testing.assert_allclose(values, np.sort(logprobs_V)[::-1][:3], atol=1e-4)
      np.testing.assert_allclose(values, logprobs_V[list(ids)], atol=1e-4)


@pytest.mark.parametrize('kind', [pytest.param('recursive', marks=pytest.mark.slow), 'mor'])
def test_fewer_recursions_are_those_of_a_shallower_model(kind):
  """`max_recursions` of the engine or of one request, against a model that has only so many."""
  change = {'num_layers': 5, 'num_recursions': 3, 'kind': kind}
  made, variables = tiny.model(seed=9, **change)
  capacities = made.config.step_capacities[:2] if kind == 'mor' else None
  shallow = Transformer(
    dataclasses.replace(made.config, num_recursions=2, num_layers=4, capacities=capacities)
  )
  params = dict(variables['params'])
  if kind == 'mor':
    params['router'] = jax.tree.map(lambda leaf: leaf[:2], params['router'])
  for of_engine, of_request in ((2, None), (None, 2)):
    engine = tiny_engine.engine(made, variables, max_recursions=of_engine, keep_logits=True, slack=1.0)
    scheduler = tiny_engine.KeepingScheduler(engine)
    requests = tiny_engine.requests((3, 20), temperature=1.0, max_new_tokens=64, max_recursions=of_request)
    results = scheduler.run(requests)
    rows = tiny_engine.rows(shallow, {'params': params}, results, 64, 1.0)
    tiny_engine.assert_as_full_forward(scheduler, rows)
  assert engine.cache_bytes() > tiny_engine.engine(made, variables, max_recursions=2, slack=1.0).cache_bytes()


def test_a_shifted_threshold_spends_less_or_more():
  made, variables = tiny.model(seed=9, **EXPERT)
  engine = tiny_engine.engine(made, variables, slack=3.0)
  scheduler = tiny_engine.Scheduler(engine)
  requests = [
    dataclasses.replace(tiny_engine.requests((30,))[0], threshold_shift=shift) for shift in (1e6, 0.0, -1e6)
  ]
  depths = [np.mean(result.depths) for result in scheduler.run(requests)]
  assert depths[0] == 1.0
  assert depths[2] == 3.0
  assert 1 < depths[1] < 3


@pytest.mark.parametrize(
  'change',
  [
    {'kind': 'vanilla'},
    {'kind': 'vanilla', 'kv': 'shared', 'num_recursions': 2},
    {'kind': 'recursive', 'sharing': 'sequence', 'kv': 'shared'},
    EXPERT,
    {**EXPERT, 'kv': 'shared'},
    {**EXPERT, 'kv': 'hybrid'},
    TOKEN,
  ],
)
def test_allocated_bytes_are_those_of_the_formula(change):
  made, variables = tiny.model(**change)
  for dtype, element, scale in (('float32', 4, 0), ('bfloat16', 2, 0), ('int8', 1, 4), ('int4', 0.5, 4)):
    engine = tiny_engine.engine(made, variables, slots=5, max_len=96, slack=1.0, cache_dtype=dtype)
    state = engine.init_state()
    pools = state.cache.first, state.cache.block, state.cache.last
    allocated = sum(leaf.nbytes for leaf in jax.tree.leaves(pools))
    exact = flops.kv_cache_bytes(made.config, 96, element, scale)
    heads, width, layers = (
      made.config.num_kv_heads,
      made.config.head_width,
      sum(len(pool.keys) for pool in pools),
    )
    most = 2 * layers * heads * (width * element + scale) * (cache_lib.TILE - 1)  # slots have whole tiles
    assert 5 * exact <= allocated <= 5 * (exact + most)
    assert allocated == engine.cache_bytes()


def test_shared_layers_need_less_memory_than_the_vanilla_models():
  """(R + 1) / 2R and 1 / R of its shared layers (paper, Table 2)."""
  sizes = {}
  for name, change in (
    ('vanilla', {'kind': 'vanilla'}),
    ('recursion-wise', {}),
    ('shared', {'kv': 'shared'}),
  ):
    made, variables = tiny.model(**{'num_layers': 6, 'num_recursions': 3, 'sharing': 'cycle', **change})
    sizes[name] = tiny_engine.engine(made, variables, max_len=96, slack=1.0).cache_bytes()
  assert sizes['recursion-wise'] / sizes['vanilla'] == pytest.approx(4 / 6)
  assert sizes['shared'] / sizes['vanilla'] == pytest.approx(1 / 3)


def test_what_no_engine_can_do_is_refused():
  made, variables = tiny.model(**EXPERT)
  for options, message in (
    ({'slots': 0}, 'slots=0'),
    ({'lanes': 9}, 'at most slots=3'),
    ({'cache_dtype': 'int2'}, 'cache_dtype=int2'),
    ({'max_recursions': 4}, 'from 1 to the 3'),
    ({'max_len': 1}, 'max_len=1'),
    ({'read': 'all'}, 'read=all'),
  ):
    with pytest.raises(ConfigError, match=message):
      tiny_engine.engine(made, variables, **options)
  sequence, variables = tiny.model(kind='recursive', sharing='sequence')
  with pytest.raises(ConfigError, match='repeats by itself'):
    tiny_engine.engine(sequence, variables, max_recursions=1)
  with pytest.raises(RequestError, match='threshold_shift'):
    tiny_engine.engine(sequence, variables).check(Request((1,), threshold_shift=0.5))
