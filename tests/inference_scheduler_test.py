"""Many requests at once: the tokens of each alone, whatever the company; stops, cancellation, bad input, statistics."""

import dataclasses
import functools
import itertools
import random
import time

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from mor_jax.config import ConfigError
from mor_jax.data import tokenizer as tokenizers
from mor_jax.inference import engine as engine_lib
from mor_jax.inference import prefill
from mor_jax.inference import scheduler as scheduler_lib
from mor_jax.inference import ticks as ticks_lib
from mor_jax.inference.requests import Request, RequestError, Result
from mor_jax.inference.scheduler import Scheduler
from mor_jax.inference.text import complete
from mor_jax.serving import server
from tests import tiny, tiny_engine

MODELS = {
  'mor': {'num_layers': 5, 'num_recursions': 3, 'router_alpha': 0.8},
  'token-choice': {'num_layers': 5, 'num_recursions': 3, 'router': 'token_choice'},
  'recursive': {'kind': 'recursive'},
  'vanilla': {'kind': 'vanilla'},
}
SLOW = ('token-choice', 'recursive')
LENGTHS = (1, 9, 4, 20, 1, 33, 2, 7)


@functools.cache
def engine(name='mor', **options):
  made, variables = tiny.model(seed=9, **MODELS[name])
  return tiny_engine.engine(made, variables, **{'slots': 4, 'lanes': 3, 'boundary_lanes': 2, **options})


def answers(requests, ticks_per_call=64, name='mor'):
  return [result.tokens for result in Scheduler(engine(name), None, ticks_per_call).run(requests)]


@pytest.mark.parametrize(
  'name', [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in MODELS]
)
def test_company_and_order_change_no_token(name):
  """Greedy requests all at once, in several orders, against each alone."""
  requests = [
    dataclasses.replace(request, max_new_tokens=10 + 5 * index)
    for index, request in enumerate(tiny_engine.requests(LENGTHS))
  ]
  alone = [answers([request], name=name)[0] for request in requests]
  assert len({tuple(tokens[:3]) for tokens in alone}) > 3, 'equal texts would show nothing'
  for order, ticks in ((0, 64), (1, 7), (2, 1000)):
    shuffled = list(range(len(requests)))
    random.Random(order).shuffle(shuffled)
    together = answers([requests[index] for index in shuffled], ticks, name)
    assert together == [alone[index] for index in shuffled]


@pytest.mark.parametrize('is_invariant', [pytest.param(False, marks=pytest.mark.slow), True])
def test_company_changes_no_bit_where_that_is_asked_for(is_invariant):
  """Log-probabilities of prompts and answers, scored or not, alike or not, beside some that vanish, against each alone."""
  common = tiny_engine.prompt(20, seed=3)
  requests = [
    Request(
      common + tiny_engine.prompt(length, seed=length),
      max_new_tokens=8,
      temperature=1.0,
      seed=length,
      prompt_logprobs=length % 2 == 0,
    )
    for length in (3, 14, 25, 6)
  ]
  made = engine(max_len=96, chunks=(8, 16, 32), top_logprobs=1, batch_invariant=is_invariant)
  alone = [Scheduler(made).run([request])[0].logprobs for request in requests]
  scheduler = Scheduler(made, ticks_per_call=5, prefill_tokens=16)
  together = [scheduler.submit(request) for request in (*requests, requests[0], requests[1])]
  vanishing = [scheduler.submit(dataclasses.replace(request, max_new_tokens=30)) for request in requests[:2]]
  while scheduler.busy:
    scheduler.step()
    if scheduler.waiting == 0:
      for result in vanishing:
        scheduler.cancel(result)
  assert [result.finish for result in vanishing] == ['cancelled'] * 2
  equal = [result.logprobs for result in together] == [*alone, *alone[:2]]
  assert equal == is_invariant, 'without the option other programs, which sum in another order'


def test_what_drafts_together_is_not_invariant():
  with pytest.raises(ConfigError, match='batch_invariant cannot be used with speculate=2'):
    engine(batch_invariant=True, speculate=2)


def test_greedy_tokens_are_those_of_full_forward_passes():
  made, variables = tiny.model(seed=9, **MODELS['mor'])
  request = tiny_engine.requests((6,))[0]
  tokens = list(request.prompt)
  for _ in range(12):
    row = jnp.asarray([tokens + [0] * (20 - len(tokens))], jnp.int32)
    logits = tiny.apply(made, 'threshold')(variables, row, max_len=64, slack=None).logits
    tokens.append(int(logits[0, len(tokens) - 1].argmax()))
  assert answers([dataclasses.replace(request, max_new_tokens=12)])[0] == tokens[6:]


def test_drawn_tokens_depend_on_the_seed_alone():
  requests = tiny_engine.requests((5, 5, 12), temperature=1.0, top_k=20, top_p=0.9, max_new_tokens=20)
  alone = [answers([request])[0] for request in requests]
  assert answers(requests[::-1], 5) == alone[::-1]
  assert answers([dataclasses.replace(requests[0], seed=99)])[0] != alone[0]


def test_stop_tokens_and_length_end_a_text():
  request = tiny_engine.requests((5,), temperature=1.0, max_new_tokens=30)[0]
  tokens = answers([request])[0]
  stop = next(token for index, token in enumerate(tokens) if index > 3 and token not in tokens[:index])
  scheduler = Scheduler(engine())
  results = scheduler.run([dataclasses.replace(request, stop_tokens=(stop,)), request])
  assert [result.finish for result in results] == ['stop_token', 'length']
  assert results[0].tokens == tokens[: tokens.index(stop)]
  assert results[1].tokens == tokens
  full = scheduler.run([dataclasses.replace(request, max_new_tokens=1000)])[0]
  assert len(full.tokens) == 64 - 5, 'the cache is full'


def test_a_request_cancelled_in_flight_leaves_the_others_alone():
  requests = tiny_engine.requests(LENGTHS, max_new_tokens=25)
  expected = answers(requests)
  scheduler = Scheduler(engine(), ticks_per_call=9)
  results = [scheduler.submit(request) for request in requests]
  scheduler.step()
  scheduler.cancel(results[1])  # in a slot
  scheduler.cancel(results[-1])  # in the queue
  scheduler.cancel(results[-1])  # again: nothing happens
  while scheduler.busy:
    scheduler.step()
  assert results[1].finish == results[-1].finish == 'cancelled'
  assert 0 < len(results[1].tokens) < 25
  assert results[1].tokens == expected[1][: len(results[1].tokens)]
  kept = [index for index in range(len(requests)) if index not in (1, len(requests) - 1)]
  assert [results[index].tokens for index in kept] == [expected[index] for index in kept]


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'prompt': ()}, 'the prompt is empty'),
    ({'prompt': (1,) * 64}, 'max_len=64'),
    ({'prompt': (1, 61)}, 'token 61 is outside the vocabulary'),
    ({'prompt': (-1,)}, 'token -1 is outside'),
    ({'temperature': -0.5}, 'temperature=-0.5'),
    ({'temperature': float('nan')}, 'temperature=nan'),
    ({'top_p': 0.0}, 'top_p=0.0'),
    ({'top_k': -1}, 'top_k=-1'),
    ({'top_k': 2**31}, 'top_k=2147483648 is not allowed: must be from 0 to 2'),
    ({'temperature': 1e300}, 'temperature=1e.300'),
    ({'threshold_shift': -1e300}, 'threshold_shift=-1e.300'),
    ({'repetition_penalty': 1e-300}, 'repetition_penalty=1e-300'),
    ({'repetition_penalty': 0.0}, 'repetition_penalty=0.0'),
    ({'max_new_tokens': 0}, 'max_new_tokens=0'),
    ({'seed': -1}, 'seed=-1'),
    ({'stop_tokens': tuple(range(9))}, 'at most 8 ids'),
    ({'stop_strings': ('',)}, 'non-empty texts'),
    ({'stop_strings': ('a',)}, 'need a tokenizer'),
    ({'max_recursions': 4}, 'max_recursions=4'),
  ],
)
def test_bad_requests_are_refused_and_the_others_answered(change, message):
  good = tiny_engine.requests((3, 5), max_new_tokens=6)
  scheduler = Scheduler(engine())
  results = [scheduler.submit(good[0])]
  with pytest.raises(RequestError, match=message):
    scheduler.submit(dataclasses.replace(good[0], **change))
  results.append(scheduler.submit(good[1]))
  while scheduler.busy:
    scheduler.step()
  assert [result.tokens for result in results] == answers(good)


def test_samples_of_a_prompt_share_its_computation(monkeypatch):
  """Equal prompts take one lane of prefill, and get the tokens that they get alone."""
  request = tiny_engine.requests((20,), temperature=1.0, max_new_tokens=6)[0]
  samples = [dataclasses.replace(request, seed=seed) for seed in (3, 4, 3)]
  other = dataclasses.replace(request, max_recursions=1)
  scheduler, seen = Scheduler(engine()), []
  begin = scheduler.engine.begin
  monkeypatch.setattr(scheduler.engine, 'begin', lambda *args: seen.append(args[0]) or begin(*args))
  results = scheduler.run([*samples, other])
  assert [[request is not None for request in requests] for requests in seen] == [[True, True, False, False]]
  alone = [scheduler.run([sample])[0].tokens for sample in (*samples, other)]
  assert [result.tokens for result in results] == alone
  assert results[0].tokens == results[2].tokens != results[1].tokens


def test_nobody_is_forgotten_when_prompts_cannot_be_computed(monkeypatch):
  good = tiny_engine.requests((3, 5, 1, 4), max_new_tokens=6)
  scheduler = Scheduler(engine())
  results = [scheduler.submit(request) for request in good]
  with monkeypatch.context() as patch:
    patch.setattr(scheduler.engine, 'begin', lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      scheduler.step()
  while scheduler.busy:
    scheduler.step()
  assert [result.tokens for result in results] == answers(good)


def test_a_long_prompt_does_not_stall_the_others():
  """Chunks of 16 between calls: texts go on meanwhile, all get the tokens that they get alone, cancelled ones nothing."""
  short, *long = tiny_engine.requests((2, 60, 50, 55), max_new_tokens=60)
  long = [dataclasses.replace(request, max_new_tokens=3) for request in long]
  scheduler = Scheduler(engine(prefill_lanes=1), ticks_per_call=4, prefill_tokens=16)
  running = scheduler.submit(short)
  scheduler.step()
  results, lengths = [scheduler.submit(request) for request in long], []
  while not results[0].tokens:
    scheduler.step()
    lengths.append(len(running.tokens))
  assert len(lengths) > 3
  assert all(after > before for before, after in itertools.pairwise(lengths))
  assert scheduler.resident == 4
  scheduler.cancel(results[1])
  while scheduler.busy:
    scheduler.step()
  assert (results[1].finish, results[1].tokens) == ('cancelled', [])
  expected = answers([short, *long])
  assert [running.tokens, results[0].tokens, results[2].tokens] == [expected[0], expected[1], expected[3]]


def test_prompts_are_computed_in_no_more_lanes_and_tokens_than_they_need(monkeypatch):
  """A single prompt in one lane; a chunk that would be mostly empty gives way to smaller ones; the same tokens always."""
  computed = []

  def extend(cached, mesh, params, prefix, tokens_BC, *rest):
    computed.append(tokens_BC.shape)
    return original(cached, mesh, params, prefix, tokens_BC, *rest)

  original = prefill.extend
  monkeypatch.setattr(prefill, 'extend', extend)
  several = {'chunks': (4, 8, 32), 'prefill_lanes': 3}
  for lengths, expected in {
    (5,): [(1, 4)],
    (10,): [(1, 8), (1, 4)],
    (12, 18): [(3, 32)],
    (40,): [(1, 32), (1, 8)],
    (3, 2): [(3, 4)],
  }.items():
    requests = tiny_engine.requests(lengths, max_new_tokens=3)
    made = [result.tokens for result in Scheduler(engine(**several)).run(requests)]
    assert computed == expected, lengths
    assert made == answers(requests)
    computed.clear()


def test_the_warm_up_of_the_server_compiles_every_program_for_prompts():
  """What follows may be in several chunks, or copied in part, or scored: nothing is compiled any more."""
  scheduler = Scheduler(engine(chunks=(8, 16), top_logprobs=2), ticks_per_call=4)
  for prompts, scored in server.first_prompts(scheduler.engine):
    scheduler.run([Request(prompt, max_new_tokens=2, prompt_logprobs=scored) for prompt in prompts])
  programs = prefill.extend, engine_lib._insert, engine_lib._reuse, ticks_lib.run
  before = [program._cache_size() for program in programs]
  for options in ({}, {'prompt_logprobs': True}):
    requests = tiny_engine.requests((3, 12, 40, 61, 30), max_new_tokens=3, **options)
    again = [dataclasses.replace(request, prompt=(*request.prompt[:-1], 3, 4)) for request in requests[1:]]
    scheduler.run([*requests, *again])
    scheduler.run(again[:1])
  assert scheduler.prompt_tokens[1] > 100, 'copied'
  assert [program._cache_size() for program in programs] == before


def test_statistics_add_up():
  """More requests than slots: the queue keeps slots and lanes busy; depths are those of the results."""
  scheduler = Scheduler(engine(), ticks_per_call=16)
  requests = tiny_engine.requests((1,) * 12, temperature=1.0, max_new_tokens=20)
  results = scheduler.run(requests)
  statistics = scheduler.statistics
  assert statistics.sampled == sum(len(result.tokens) for result in results) == 12 * 20
  depths = np.concatenate([result.depths for result in results])
  assert statistics.passes == depths.sum()
  assert statistics.mean_depth == pytest.approx(depths.mean())
  assert 0.8 < statistics.slot_occupancy <= 1
  assert 0.8 < statistics.lane_occupancy <= 1
  assert statistics.lane_occupancy == pytest.approx(depths.sum() / (statistics.ticks * 3))
  for result in results:
    assert 0 < result.submitted < result.first_token <= result.finished
  summary = statistics.summary()
  assert summary['time_to_first_token'] == pytest.approx(
    np.mean([result.first_token - result.submitted for result in results])
  )
  assert summary['tokens_per_second'] == pytest.approx(240 / statistics.seconds)


# ---- with a tokenizer ----


@pytest.fixture(scope='module')
def bytes_tokenizer():
  return tokenizers.build(tiny_run.CONFIG.data)


@functools.cache
def text_engine():
  run = tiny_run.run()
  return tiny_engine.engine(run.model, run.initial().variables, slots=2)


def test_stop_strings_end_a_text_before_them(bytes_tokenizer):
  request = Request(tuple(b'Go'), temperature=1.0, max_new_tokens=40, seed=1)
  text = Scheduler(text_engine(), bytes_tokenizer).run([request])[0].text
  assert len(text) > 20
  stop = text[12:14]
  for ticks in (1, 50):
    stopping = dataclasses.replace(request, stop_strings=('no such text', stop))
    result = Scheduler(text_engine(), bytes_tokenizer, ticks).run([stopping])[0]
    assert result.finish == 'stop_string'
    assert result.text == text[: text.index(stop)]
    assert bytes_tokenizer.decode(result.tokens).startswith(result.text)


def test_a_stop_string_ends_the_work_of_the_device_soon(bytes_tokenizer, monkeypatch):
  """However long calls are: with one text resident, a tick is a token at most."""
  monkeypatch.setattr(scheduler_lib, 'STOP_TICKS', 5)
  request = Request(tuple(b'Go'), temperature=1.0, max_new_tokens=40, seed=1)
  whole = Scheduler(text_engine(), bytes_tokenizer, 1000)
  text = whole.run([request])[0].text
  stopping = Scheduler(text_engine(), bytes_tokenizer, 1000)
  result = stopping.run([dataclasses.replace(request, stop_strings=(text[12:14],))])[0]
  assert result.finish == 'stop_string'
  assert len(result.tokens) <= stopping.statistics.sampled <= len(result.tokens) + 2 + 5
  assert whole.statistics.sampled == 40


def test_time_of_the_host_is_what_is_left_between_the_calls(monkeypatch):
  scheduler = Scheduler(engine(), ticks_per_call=8)
  collect = scheduler._collect
  monkeypatch.setattr(scheduler, '_collect', lambda: time.sleep(0.05) or collect())
  results = scheduler.run(tiny_engine.requests((1, 1), max_new_tokens=16))
  done = scheduler.statistics
  calls = -(-done.ticks // 8)
  assert done.host_share * done.call_seconds >= 0.05 * calls
  assert [result.tokens for result in results] == answers(tiny_engine.requests((1, 1), max_new_tokens=16)), (
    'tokens and depths are taken up where the last call left them'
  )


@pytest.mark.parametrize(
  ('text', 'stop', 'tokens'),
  [('déjà vu', ' v', 'déjà'), ('a€€b', '€b', 'a€'), ('a€', '€', 'a'), ('€€', '€', ''), ('ab', 'zz', 'ab')],
)
def test_tokens_are_those_of_the_text_before_a_stop_string(bytes_tokenizer, text, stop, tokens):
  """Characters of several tokens, before the stop string and in it."""
  given, before = tuple(text.encode()), (257, 71)
  result = Result(
    Request(before, stop_strings=(stop,)), list(given), depths=[1] * (len(before) + len(given) - 1)
  )
  stopped = Scheduler(text_engine(), bytes_tokenizer)._update_text(result)
  assert stopped == (stop in text)
  assert (bytes(result.tokens).decode(), result.text) == (tokens, tokens)
  if stopped:
    assert len(result.depths) == len(before) + len(result.tokens)


def test_streamed_text_grows(bytes_tokenizer):
  request = Request(tuple(b'Go'), temperature=1.0, max_new_tokens=20, seed=1)
  seen = [result.text for result in Scheduler(text_engine(), bytes_tokenizer, 4).stream(request)]
  assert len(seen) > 4
  assert all(after.startswith(before.rstrip('�')) for before, after in itertools.pairwise(seen))


def test_a_text_completed(bytes_tokenizer):
  run = tiny_run.run()

  def text(prompt='Go', **options):
    return complete(run.model, run.initial().variables, bytes_tokenizer, prompt, 6, **options)

  assert text(temperature=0.0) == text(temperature=0.0, seed=5)
  with pytest.raises(RequestError, match='the prompt is empty'):
    text(prompt='', temperature=0.0)
  with pytest.raises(RequestError, match='temperature=-1'):
    text(temperature=-1)
