"""The server over HTTP: the forms of OpenAI's API, the engine's own answers in them, and what it refuses."""

import asyncio
import itertools
import json
import pathlib
import re
import subprocess

import httpx
import numpy as np
import openai
import pytest
import tiny_run

from mor_jax.evaluation.scoring import Scorer
from tests import serving
from tests.serving import CHATS, COMPLETIONS, complete, direct


@pytest.fixture(scope='module')
def server():
  with serving.running() as (address, app):
    yield address, app


@pytest.fixture(scope='module')
def address(server):
  return server[0]


def events(address: str, path: str, **fields) -> list[dict]:
  body = {'model': serving.NAME, 'stream': True, **fields}
  with httpx.stream('POST', f'{address}{path}', json=body, timeout=60) as answer:
    lines = [line for line in answer.iter_lines() if line]
  assert all(line.startswith('data: ') for line in lines)
  assert lines[-1] == 'data: [DONE]'
  return [json.loads(line.removeprefix('data: ')) for line in lines[:-1]]


# ---- what is answered ----


def test_about_the_server(address):
  (card,) = httpx.get(f'{address}/v1/models').json()['data']
  assert (card['id'], card['object'], card['max_model_len'], card['kind']) == ('tiny', 'model', 64, 'mor')
  assert httpx.get(f'{address}/v1/models/tiny').json() == card
  assert httpx.get(f'{address}/v1/models/other').status_code == 404
  assert httpx.get(f'{address}/health').json() == {'status': 'ready'}
  page = httpx.get(address)
  assert page.headers['content-type'].startswith('text/html')
  assert not re.findall(r'(?:src|href)="(?!data:)', page.text), 'it needs nothing from elsewhere'
  tokens = serving.post(address, '/tokenize', {'prompt': 'é!'}).json()
  assert tokens == {'tokens': [0xC3, 0xA9, 33], 'count': 3, 'max_model_len': 64}
  assert serving.post(address, '/detokenize', {'tokens': tokens['tokens']}).json() == {'prompt': 'é!'}


def test_a_completion_is_what_the_engine_says(address):
  found = complete(address, max_tokens=12, temperature=0, depths=True)
  expected = direct('the boats ', max_new_tokens=12)
  (choice,) = found['choices']
  assert choice['text'] == expected.text
  assert choice['depths'] == {'prompt': expected.depths[:10], 'tokens': expected.depths[10:]}
  assert choice['finish_reason'] == ('length' if expected.finish == 'length' else 'stop')
  assert found['usage']['prompt_tokens'] == 10
  assert found['usage']['completion_tokens'] == len(expected.tokens)
  assert found['usage']['block_passes'] == sum(expected.depths)
  drawn = complete(
    address, max_tokens=12, seed=5, n=2, temperature=1.5, top_p=0.9, top_k=-1, max_recursions=1
  )
  texts = [choice['text'] for choice in drawn['choices']]
  options = {'max_new_tokens': 12, 'temperature': 1.5, 'top_p': 0.9, 'max_recursions': 1}
  assert texts == [direct('the boats ', seed=seed, **options).text for seed in (5, 6)]


def test_prompts_of_every_form(address):
  ids = list(b'the boats ')
  texts = [
    [choice['text'] for choice in complete(address, prompt=prompt, max_tokens=4, temperature=0)['choices']]
    for prompt in ('the boats ', ids, ['the boats ', 'a'], [ids, [97]])
  ]
  assert texts[0] == texts[1] == texts[2][:1]
  assert texts[2] == texts[3]
  assert len(complete(address, prompt='', max_tokens=2)['choices']) == 1


def test_log_probabilities_are_those_of_the_evaluation(address):
  """Of the whole text, to 1e-4; the form that lm-evaluation-harness reads."""
  found = complete(address, max_tokens=0, echo=True, logprobs=3, temperature=0)
  (choice,) = found['choices']
  said = choice['logprobs']
  assert choice['text'] == ''.join(said['tokens']) == 'the boats '
  assert said['token_logprobs'][0] is said['top_logprobs'][0] is None
  assert said['text_offset'] == list(range(10))
  assert found['usage']['completion_tokens'] == 0
  run = tiny_run.run()
  scorer = Scorer(run.model, run.initial().variables, max_len=64, batch_size=1)
  text = list(b'the boats ')
  ((total, _),) = scorer.score([(text[:1], text[1:])])
  assert sum(said['token_logprobs'][1:]) == pytest.approx(total, abs=1e-4)
  for place, top in enumerate(said['top_logprobs'][1:], start=1):
    assert len(top) <= 3
    assert max(top.values()) >= said['token_logprobs'][place] - 1e-6
  more = complete(address, max_tokens=3, echo=True, logprobs=0, temperature=0)['choices'][0]
  assert more['logprobs']['tokens'][:10] == said['tokens']
  assert len(more['logprobs']['tokens']) == 13
  assert more['logprobs']['token_logprobs'][1:10] == pytest.approx(said['token_logprobs'][1:], abs=1e-5)


def test_the_best_of_some(address):
  options = {'max_tokens': 6, 'seed': 3, 'temperature': 1.0, 'logprobs': 0}
  every = complete(address, n=4, **options)['choices']
  best = complete(address, best_of=4, n=1, **options)['choices']
  means = [np.mean(choice['logprobs']['token_logprobs']) for choice in every]
  assert [choice['text'] for choice in best] == [every[int(np.argmax(means))]['text']]


@pytest.mark.parametrize('stop', [None, 'given'])
def test_a_stream_says_what_a_whole_answer_does(address, stop):
  fields = {
    'prompt': ['the boats ', 'in'],
    'max_tokens': 20,
    'seed': 2,
    'logprobs': 1,
    'depths': True,
    'n': 2,
  }
  fields |= {'temperature': 1.0}
  if stop:
    text = complete(address, **fields)['choices'][0]['text']
    fields['stop'] = [text[9:12]]
  whole = complete(address, **fields)
  pieces = events(address, COMPLETIONS, **fields, stream_options={'include_usage': True})
  *pieces, last = pieces
  assert (last['choices'], last['usage']) == ([], whole['usage'])
  assert len({piece['id'] for piece in pieces}) == 1
  for index, choice in enumerate(whole['choices']):
    parts = [piece['choices'][0] for piece in pieces if piece['choices'][0]['index'] == index]
    assert ''.join(part['text'] for part in parts) == choice['text']
    assert [part['finish_reason'] for part in parts[:-1]] == [None] * (len(parts) - 1)
    assert parts[-1]['finish_reason'] == choice['finish_reason']
    for name in ('tokens', 'token_logprobs', 'text_offset'):
      assert [one for part in parts for one in part['logprobs'][name]] == choice['logprobs'][name], name
    assert [depth for part in parts for depth in part['depths']['tokens']] == choice['depths']['tokens']
    assert parts[0]['depths']['prompt'] == choice['depths']['prompt']
    if stop and index == 0:
      assert choice['finish_reason'] == 'stop'
      assert fields['stop'][0] not in choice['text']
  assert len(pieces) > 4, 'it came in pieces'


def test_chats_go_through_the_template(address):
  fields = {'messages': [{'role': 'user', 'content': 'boats?'}], 'max_tokens': 6, 'temperature': 0}
  answer = serving.post(
    address, CHATS, {'model': 'tiny', 'logprobs': True, 'top_logprobs': 2, **fields}
  ).json()
  expected = direct('[user] boats?\n[assistant] ', max_new_tokens=6)
  (choice,) = answer['choices']
  assert choice['message'] == {'role': 'assistant', 'content': expected.text, 'refusal': None}
  content = choice['logprobs']['content']
  assert ''.join(entry['token'] for entry in content) == expected.text
  assert all(len(entry['top_logprobs']) == 2 for entry in content)
  deltas = [piece['choices'][0]['delta'] for piece in events(address, CHATS, **fields)]
  assert deltas[0]['role'] == 'assistant'
  assert ''.join(delta['content'] for delta in deltas) == expected.text


def test_openai_s_client(address):
  client = openai.OpenAI(base_url=f'{address}/v1', api_key='none')
  expected = direct('the boats ', max_new_tokens=8).text
  wanted = {'model': 'tiny', 'prompt': 'the boats ', 'max_tokens': 8, 'temperature': 0}
  assert client.models.list().data[0].id == 'tiny'
  assert client.completions.create(**wanted, extra_body={'depths': True}).choices[0].text == expected
  assert (
    ''.join(piece.choices[0].text for piece in client.completions.create(**wanted, stream=True)) == expected
  )
  with pytest.raises(openai.BadRequestError, match='temperature=9 is not allowed') as refused:
    client.completions.create(**{**wanted, 'temperature': 9})
  assert refused.value.param == 'temperature'

  async def chat():
    async with openai.AsyncOpenAI(base_url=f'{address}/v1', api_key='none') as client:
      messages = [{'role': 'user', 'content': 'boats?'}]
      answer = await client.chat.completions.create(model='tiny', messages=messages, max_tokens=4)
      return answer.choices[0].message.content

  assert isinstance(asyncio.run(chat()), str)


def test_the_lines_of_curl_in_the_documents():
  """Run as they are written, but for the port."""
  root, found = pathlib.Path(__file__).parent.parent, set()
  for name in ('README.md', 'docs/serving.md', 'mor_jax/serve.py'):
    found |= set(
      re.findall(
        r'^ *(curl (?:.*\\\n)*.*)$', (root / name).read_text().replace('\\\\\n', '\\\n'), re.MULTILINE
      )
    )
  assert found
  with serving.running(name='tiny-mor') as (address, _):
    for line in found:
      line = line.replace('http://127.0.0.1:8000', address)
      said = subprocess.run(
        ['bash', '-c', f'{line} --silent --fail-with-body'], capture_output=True, text=True
      )
      assert said.returncode == 0, f'{line}: {said.stdout} {said.stderr}'
      assert json.loads(said.stdout)['choices'][0]['depths']['prompt'], line


def test_what_is_said_after_each_recursion(address):
  """The routers' logits say which depths were taken, and the last recursion says what the model says."""
  fields = {'max_tokens': 6, 'temperature': 0, 'depths': 'full', 'logprobs': 1, 'echo': True}
  (choice,) = complete(address, **fields)['choices']
  looks = choice['recursions']
  assert [look['depth'] for look in looks] == choice['depths']['prompt'] + choice['depths']['tokens']
  for place, look in enumerate(looks):
    assert [len(best) for best in look['best']] == [5, 5]
    assert all(first[1] >= second[1] for best in look['best'] for first, second in itertools.pairwise(best))
    # The first recursion takes every token; the second those whose logit exceeds the threshold, while there is room.
    assert look['depth'] == 1 or look['logits'][1] > look['thresholds'][1]
    if place > 9:  # greedy: the likeliest token after the text so far came next
      assert (
        place + 1 == len(choice['logprobs']['tokens'])
        or look['best'][1][0][0] == choice['logprobs']['tokens'][place + 1]
      )
  shifted = complete(address, **{**fields, 'threshold_shift': 2.5})['choices'][0]['recursions']
  assert shifted[0]['thresholds'] == [value + 2.5 for value in looks[0]['thresholds']]
  pieces = events(address, COMPLETIONS, prompt='the boats ', **{**fields, 'max_tokens': 44})
  parts = [one['choices'][0]['recursions'] for one in pieces if 'recursions' in one['choices'][0]]
  assert len(parts) > 1, 'they come while the text does'
  longer = complete(address, **{**fields, 'max_tokens': 44})['choices'][0]['recursions']
  assert list(itertools.chain(*parts)) == longer
  with serving.running(looks=False) as (other, _):
    refused = serving.post(other, COMPLETIONS, {'model': 'tiny', 'prompt': 'a', 'depths': 'full'})
    assert refused.json()['error']['param'] == 'depths'


def test_lm_evaluation_harness_gets_the_scores_of_the_process(address):
  """Its local-completions class, which knows nothing but the address; likelihoods to 1e-3, and whether they are greedy."""
  from lm_eval.api.instance import Instance
  from lm_eval.models.openai_completions import LocalCompletionsAPI

  from mor_jax.evaluation.harness import HarnessModel

  asked = [('the boats', ' came in'), ('a harbour ', 'wall'), ('', 'the'), ('the b', 'oats'), ('x' * 10, 'y')]
  instances = [Instance('loglikelihood', {}, pair, index) for index, pair in enumerate(asked)]
  client = LocalCompletionsAPI(
    model='tiny', base_url=f'{address}/v1/completions', max_length=64, batch_size=2, num_concurrent=1
  )
  assert client.tokenizer_backend == 'remote'
  assert client.prefix_token_id == 256
  run = tiny_run.run()
  inner = HarnessModel.__new__(HarnessModel)
  inner._tokenizer, inner._prefix = serving.tokenizer(), 256
  inner._scorer = Scorer(run.model, run.initial().variables, max_len=64, batch_size=2)
  super(HarnessModel, inner).__init__()
  expected = inner.loglikelihood(instances, disable_tqdm=True)
  for (score, greedy), (value, is_greedy) in zip(
    client.loglikelihood(instances, disable_tqdm=True), expected, strict=True
  ):
    assert score == pytest.approx(value, abs=1e-3)
    assert greedy == is_greedy


def test_the_token_that_ends_a_text_is_among_the_log_probabilities(address):
  """Forced here: scores of a prompt would else lose their last token in lm-evaluation-harness."""
  bias = {'256': 100}
  for stream in (False, True):
    fields = {
      'prompt': 'ab',
      'max_tokens': 1,
      'echo': True,
      'logprobs': 1,
      'temperature': 0,
      'logit_bias': bias,
    }
    if stream:
      choice = events(address, COMPLETIONS, **fields)[-1]['choices'][0]
    else:
      choice = complete(address, **fields)['choices'][0]
    assert choice['finish_reason'] == 'stop'
    assert choice['text'] == 'ab'
    assert choice['logprobs']['tokens'] == ['a', 'b', '<|endoftext|>']
    assert len(choice['logprobs']['token_logprobs']) == len(choice['logprobs']['top_logprobs']) == 3
    assert choice['logprobs']['text_offset'] == [0, 1, 2]
