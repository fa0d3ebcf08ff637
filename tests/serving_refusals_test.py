"""The server over HTTP: what it refuses, and what it does under load."""

import json
import threading
import time

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mor_jax.serving import schemas
from mor_jax.serving.errors import ApiError
from tests import serving
from tests.serving import CHATS, COMPLETIONS, complete, direct


@pytest.fixture(scope='module')
def server():
  with serving.running() as (address, app):
    yield address, app


@pytest.fixture(scope='module')
def address(server):
  return server[0]


# ---- what is refused ----


@pytest.mark.parametrize(
  ('path', 'body', 'status', 'param'),
  [
    (COMPLETIONS, [], 400, None),
    (COMPLETIONS, {'prompt': 'a'}, 400, 'model'),
    (COMPLETIONS, {'model': 'other', 'prompt': 'a'}, 404, 'model'),
    (COMPLETIONS, {'prompt': 7}, 400, 'prompt'),
    (COMPLETIONS, {'prompt': []}, 400, 'prompt'),
    (COMPLETIONS, {'prompt': ['a', []]}, 400, 'prompt'),
    (COMPLETIONS, {'prompt': 'a' * 64}, 400, 'prompt'),
    (COMPLETIONS, {'prompt': '\ud800'}, 400, 'prompt'),
    (COMPLETIONS, {'prompt': [1, 999]}, 400, None),
    (COMPLETIONS, {'max_tokens': 0}, 400, 'max_tokens'),
    (COMPLETIONS, {'max_tokens': True}, 400, 'max_tokens'),
    (COMPLETIONS, {'n': 0}, 400, 'n'),
    (COMPLETIONS, {'n': 3, 'best_of': 2}, 400, 'best_of'),
    (COMPLETIONS, {'best_of': 2, 'stream': True}, 400, 'best_of'),
    (COMPLETIONS, {'logprobs': 21}, 400, 'logprobs'),
    (COMPLETIONS, {'temperature': 'hot'}, 400, 'temperature'),
    (COMPLETIONS, {'temperature': 10**400}, 400, 'temperature'),
    (COMPLETIONS, {'speculate': 1}, 400, 'speculate'),
    (COMPLETIONS, {'top_p': 0}, 400, 'top_p'),
    (COMPLETIONS, {'min_p': 2}, 400, 'min_p'),
    (COMPLETIONS, {'presence_penalty': 3}, 400, 'presence_penalty'),
    (COMPLETIONS, {'logit_bias': {'a': 1}}, 400, 'logit_bias'),
    (COMPLETIONS, {'logit_bias': {'1': 101}}, 400, 'logit_bias'),
    (COMPLETIONS, {'stop': ['a', '']}, 400, 'stop'),
    (COMPLETIONS, {'stop': ['a'] * 17}, 400, 'stop'),
    (COMPLETIONS, {'stop_token_ids': list(range(9))}, 400, 'stop_token_ids'),
    (COMPLETIONS, {'seed': 0.5}, 400, 'seed'),
    (COMPLETIONS, {'max_recursions': 3}, 400, 'max_recursions'),
    (COMPLETIONS, {'suffix': 'b'}, 400, 'suffix'),
    (COMPLETIONS, {'stream': 'yes'}, 400, 'stream'),
    (COMPLETIONS, {'stream_options': 1}, 400, None),
    (CHATS, {}, 400, 'messages'),
    (CHATS, {'messages': [{'role': 'user'}]}, 400, 'messages'),
    (CHATS, {'messages': [{'role': 'user', 'content': [{'type': 'image_url'}]}]}, 400, 'messages'),
    (CHATS, {'messages': [{'role': 'user', 'content': 'a'}], 'top_logprobs': 2}, 400, 'top_logprobs'),
    (CHATS, {'messages': [{'role': 'user', 'content': 'a'}], 'tools': [{}]}, 400, 'tools'),
    ('/tokenize', {'prompt': 1}, 400, 'prompt'),
    ('/detokenize', {'tokens': [257]}, 400, 'tokens'),
  ],
)
def test_a_wrong_value_is_named(address, path, body, status, param):
  if isinstance(body, dict) and path in (COMPLETIONS, CHATS):
    body = {'model': 'tiny', 'prompt': 'a', **body} if body != {'prompt': 'a'} else body
  answer = httpx.post(f'{address}{path}', content=json.dumps(body))
  error = answer.json()['error']
  assert (answer.status_code, error['param']) == (status, param), error
  assert error['type'] == 'invalid_request_error'
  assert 10 < len(error['message']) < 400


def test_other_refusals(address):
  assert (
    httpx.post(f'{address}{COMPLETIONS}', content=b'{')
    .json()['error']['message']
    .startswith('the body is not JSON')
  )
  assert httpx.post(f'{address}{COMPLETIONS}', content=b'[' * 5000).status_code == 400
  assert httpx.post(f'{address}{COMPLETIONS}', content=b' ' * 20_001).status_code == 413
  pieces = (b' ' * 9000 for _ in range(3))  # without a length
  assert httpx.post(f'{address}{COMPLETIONS}', content=pieces).status_code == 413
  assert httpx.get(f'{address}{COMPLETIONS}').status_code == 405
  assert httpx.get(f'{address}/nowhere').json()['error']['message'] == 'Not Found'


JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
  max_leaves=5,
)
FIELDS = [
  'prompt',
  'messages',
  'max_tokens',
  'n',
  'best_of',
  'echo',
  'logprobs',
  'stream',
  'stream_options',
  'stop',
  'stop_token_ids',
  'seed',
  'temperature',
  'top_p',
  'top_k',
  'min_p',
  'logit_bias',
  'presence_penalty',
  'ignore_eos',
  'depths',
  'max_recursions',
  'threshold_shift',
]


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4) | JSON)
def test_whatever_a_body_is_it_is_read_or_refused(body):
  if isinstance(body, dict):
    body = {'model': 'tiny', **body}
  for read in (schemas.completion, schemas.chat):
    found = None
    try:
      for request in read(body, serving.served()).requests:
        request.check()
    except ApiError as error:
      found = error
    if found is not None:
      assert 400 <= found.status < 500
      json.dumps(found.body()).encode()


def test_a_key_is_asked_for():
  with serving.running(api_key=serving.KEY) as (address, _):
    for headers in ({}, {'Authorization': 'Bearer wrong'}, {'Authorization': serving.KEY}):
      answer = httpx.get(f'{address}/v1/models', headers=headers)
      assert (answer.status_code, answer.json()['error']['code']) == (401, 'invalid_api_key')
    right = {'Authorization': f'Bearer {serving.KEY}'}
    assert httpx.get(f'{address}/v1/models', headers=right).status_code == 200
    assert httpx.get(f'{address}/health').status_code == 200


# ---- load ----


def waits_until(holds) -> None:
  end = time.monotonic() + 120
  while not holds():
    assert time.monotonic() < end
    time.sleep(0.01)


def test_a_client_that_leaves_frees_its_slots(server, monkeypatch):
  address, app = server
  scheduler = app.worker.scheduler
  step = scheduler.step
  monkeypatch.setattr(
    scheduler, 'step', lambda **options: time.sleep(0.05) or step(**options)
  )  # long enough to leave
  body = {'model': 'tiny', 'prompt': 'a', 'max_tokens': 60, 'ignore_eos': True, 'n': 2}
  for stream in (True, False):
    before = app.metrics.cancelled._value.get()
    with httpx.Client(timeout=120) as client:
      if stream:
        with client.stream('POST', f'{address}{COMPLETIONS}', json={**body, 'stream': True}) as answer:
          next(answer.iter_lines())
      else:
        slow = {**body, 'n': 4, 'best_of': 4}
        with pytest.raises(httpx.ReadTimeout):
          client.post(f'{address}{COMPLETIONS}', json=slow, timeout=0.02)
    waits_until(lambda: app.worker.is_idle and not scheduler.busy)
    assert app.metrics.cancelled._value.get() == before + 1, stream
  assert complete(address, max_tokens=2)['choices'][0]['text'] is not None


def test_a_full_queue_and_a_draining_server_say_so():
  with serving.running(max_queue=2) as (address, app):
    gate, step = threading.Event(), app.worker.scheduler.step
    app.worker.scheduler.step = lambda **options: gate.wait(120) and step(**options)
    body = {'model': 'tiny', 'prompt': 'a', 'max_tokens': 60, 'ignore_eos': True, 'n': 4, 'stream': True}
    with httpx.stream('POST', f'{address}{COMPLETIONS}', json=body, timeout=120) as answer:
      assert app.worker.waiting == 4
      full = serving.post(address, COMPLETIONS, {'model': 'tiny', 'prompt': 'a'})
      assert (full.status_code, full.headers['retry-after']) == (429, '1')
      app.worker.drain()
      assert httpx.get(f'{address}/health').status_code == 503
      refused = serving.post(address, COMPLETIONS, {'model': 'tiny', 'prompt': 'a'})
      assert (refused.status_code, refused.json()['error']['code']) == (503, 'draining')
      gate.set()
      assert list(answer.iter_lines())[-2] == 'data: [DONE]', 'what runs ends'


def test_a_request_that_the_engine_refuses_harms_nobody(server, monkeypatch):
  address, app = server
  body = {'model': 'tiny', 'prompt': 'a'}
  assert serving.post(address, COMPLETIONS, {**body, 'n': 11}).json()['error']['param'] == 'n'
  with monkeypatch.context() as patch:
    patch.setattr(app.worker.scheduler, 'submit', lambda request: 1 / 0)
    assert serving.post(address, COMPLETIONS, body).status_code == 500
  assert serving.post(address, COMPLETIONS, body).status_code == 200


def test_an_engine_that_fails_answers_with_an_error_and_goes_on(server, monkeypatch):
  address, app = server
  with monkeypatch.context() as patch:
    patch.setattr(app.worker.scheduler.engine, 'generate', lambda *args: 1 / 0)
    answer = serving.post(address, COMPLETIONS, {'model': 'tiny', 'prompt': 'ab'})
  assert (answer.status_code, answer.json()['error']['code']) == (500, 'engine_failed')
  assert (
    complete(address, max_tokens=3, temperature=0)['choices'][0]['text']
    == direct('the boats ', max_new_tokens=3).text
  )


def test_what_is_counted(server):
  address, app = server
  before = app.metrics.completion_tokens._value.get()
  complete(address, max_tokens=5, ignore_eos=True)
  text = httpx.get(f'{address}/metrics').text
  assert f'mor_jax_completion_tokens_total {before + 5}' in text
  assert 'mor_jax_answers_total{route="/v1/completions",status="200"}' in text
  assert 'mor_jax_slots 2.0' in text
