"""What clients ask for: bodies of /v1/completions and /v1/chat/completions as requests to the engine.

A known field with a wrong value is an error that names it; unknown fields are ignored, as OpenAI does. Beyond OpenAI's
there are `top_k`, `min_p`, `repetition_penalty`, `stop_token_ids`, `ignore_eos` (as in vLLM), and, of
Mixture-of-Recursions models, `max_recursions`, `threshold_shift`, `speculate` and `depths`.
"""

import dataclasses
import secrets
from typing import Any, NamedTuple

from mor_jax.data.chats import Chats
from mor_jax.data.templates import RefusedError
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.inference.requests import Request
from mor_jax.inference.sampling import MOST_BIASES
from mor_jax.inference.state import STOP_TOKENS
from mor_jax.serving.errors import ApiError
from mor_jax.serving.fields import Fields, is_text

MOST_LOGPROBS = 20
MOST_SAMPLES = 128
MOST_PROMPTS = 1024
MOST_STOPS = 16
FULL = 'full'
COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens


@dataclasses.dataclass(frozen=True)
class Served:
  """The model that is served, as far as requests depend on it.

  Attributes:
    name: in requests and answers.
    max_len: longest text in tokens.
    ends: tokens that end a text.
    chats: makes prompts of conversations; None: the model has no template.
    thresholds: whether `threshold_shift` has a meaning: expert-choice models.
    recursions: most recursions of a token.
    looks: whether there is something to be said of its recursions (`depths='full'`).
    drafts: most tokens of a draft; 0: it never drafts.
  """

  name: str
  tokenizer: Tokenizer
  max_len: int
  ends: tuple[int, ...]
  chats: Chats | None
  thresholds: bool
  recursions: int
  looks: bool = False
  drafts: int = 0


class Wanted(NamedTuple):
  """What a body asks for.

  Attributes:
    requests: to the engine, `best_of` for each prompt, one prompt after another.
    prompts: how many there are.
    n, best_of: samples of each prompt that are returned, and computed.
    max_tokens: that are returned of each; 0 where only the prompt is wanted.
    echo: whether the prompt is part of the text.
    logprobs: how many of the likeliest tokens are told; None: no log-probabilities.
    stream, include_usage: whether the answer comes in pieces, and whether a last one tells the usage.
    depths: whether the recursions of every token are told; FULL: also what was said after each.
  """

  requests: tuple[Request, ...]
  prompts: int
  n: int
  best_of: int
  max_tokens: int
  echo: bool
  logprobs: int | None
  stream: bool
  include_usage: bool
  depths: bool | str


def completion(body: Any, served: Served) -> Wanted:
  """A body of /v1/completions. Raises ApiError."""
  fields = Fields(body)
  _check_model(fields, served)
  prompts = _prompts(fields, served)
  echo = fields.boolean('echo')
  logprobs = fields.integer('logprobs', None, 0, MOST_LOGPROBS)
  max_tokens = fields.integer('max_tokens', COMPLETION_TOKENS, 0 if echo else 1)
  n = fields.integer('n', 1, 1, MOST_SAMPLES)
  best_of = fields.integer('best_of', n, n, MOST_SAMPLES)
  if fields.get('suffix'):
    raise fields.refuse('suffix', 'left out: this model continues texts, it does not fill them in')
  return _wanted(fields, served, prompts, n, best_of, max_tokens, echo, logprobs)


def chat(body: Any, served: Served) -> Wanted:
  """A body of /v1/chat/completions. Raises ApiError."""
  fields = Fields(body)
  _check_model(fields, served)
  if served.chats is None:
    raise ApiError(
      400,
      f'the model {served.name} has no chat template (neither tokenizer_config.json nor chat_template.jinja); use '
      f'/v1/completions',
      'messages',
    )
  try:
    prompt = served.chats.prompt(_messages(fields))
  except RefusedError as error:
    raise ApiError(400, f'the chat template {error}', 'messages') from None
  _check_length([prompt], served, 'messages')
  for name in ('tools', 'functions', 'response_format'):
    if fields.get(name) not in (None, [], {'type': 'text'}):
      raise fields.refuse(name, 'left out: this server does not have them')
  told = fields.boolean('logprobs')
  top = fields.integer('top_logprobs', 0, 0, MOST_LOGPROBS)
  if top and not told:
    raise fields.refuse('top_logprobs', 'given with logprobs=true')
  most = fields.integer('max_tokens', served.max_len, 1)
  most = fields.integer('max_completion_tokens', most, 1)
  n = fields.integer('n', 1, 1, MOST_SAMPLES)
  return _wanted(fields, served, [prompt], n, n, most, False, top if told else None)


def _check_model(fields: Fields, served: Served) -> None:
  model = fields.text('model')
  if model is None:
    raise ApiError(400, f'model is missing; this server has {served.name}', 'model')
  if model != served.name:
    raise ApiError(
      404, f'the model {model} does not exist; this server has {served.name}', 'model', 'model_not_found'
    )


def _prompts(fields: Fields, served: Served) -> list[list[int]]:
  """The tokens of every prompt: texts, or token ids."""
  given = fields.get('prompt', '')
  if isinstance(given, str) or (isinstance(given, list) and given and all(type(one) is int for one in given)):
    given = [given]
  if not isinstance(given, list) or not 1 <= len(given) <= MOST_PROMPTS:
    raise fields.refuse('prompt', f'a text, token ids, or a list of at most {MOST_PROMPTS} of them')
  prompts = []
  for one in given:
    if is_text(one):
      prompts.append(served.tokenizer.encode_text(one) or [served.tokenizer.end_of_text])
    elif isinstance(one, list) and one and all(type(token) is int for token in one):
      prompts.append(one)
    else:
      raise fields.refuse('prompt', f'a text, token ids, or a list of at most {MOST_PROMPTS} of them')
  _check_length(prompts, served, 'prompt')
  return prompts


def _check_length(prompts: list[list[int]], served: Served, name: str) -> None:
  longest = max(map(len, prompts))
  if longest >= served.max_len:
    raise ApiError(
      400,
      f'{name} has {longest} tokens, and the longest text of this server is {served.max_len} tokens, of which one must '
      f'be left; shorten it',
      name,
      'context_length_exceeded',
    )


def _messages(fields: Fields) -> list[dict[str, Any]]:
  messages = fields.get('messages')
  if not isinstance(messages, list) or not messages:
    raise fields.refuse('messages', 'a list of {"role": ..., "content": ...}')
  told = []
  for message in messages:
    content = message.get('content') if isinstance(message, dict) else None
    if isinstance(content, list):  # parts, all of which must be text
      parts = [part.get('text') if isinstance(part, dict) else None for part in content]
      content = ''.join(parts) if all(is_text(part) for part in parts) else None
    if not is_text(content) or not is_text(message.get('role')):
      raise fields.refuse('messages', 'a list of {"role": ..., "content": ...}, texts both')
    told.append({**message, 'content': content})
  return told


def _wanted(
  fields: Fields,
  served: Served,
  prompts: list[list[int]],
  n: int,
  best_of: int,
  max_tokens: int,
  echo: bool,
  logprobs: int | None,
) -> Wanted:
  """What completions and chats have in common."""
  stream = fields.boolean('stream')
  options = Fields(fields.get('stream_options', {}))
  if stream and best_of > n:
    raise fields.refuse('best_of', f'n={n} in a stream, which shows every sample')
  stops = fields.several(
    'stop', lambda one: is_text(one) and bool(one), 'a text that is not empty', MOST_STOPS
  )
  ends = () if fields.boolean('ignore_eos') else served.ends
  room = STOP_TOKENS - len(ends)
  ends += tuple(fields.several('stop_token_ids', lambda one: type(one) is int, 'a token id', room))
  seed = fields.integer('seed', None, -(2**63), 2**63 - 1)
  first = Request(
    (0,),
    max_new_tokens=max(max_tokens, 1),
    temperature=fields.number('temperature', 1.0, 0.0, 2.0),
    top_k=max(fields.integer('top_k', 0, -1), 0),
    top_p=fields.number('top_p', 1.0, 1e-9, 1.0),
    min_p=fields.number('min_p', 0.0, 0.0, 1.0),
    repetition_penalty=fields.number('repetition_penalty', 1.0, 0.01, 100.0),
    presence_penalty=fields.number('presence_penalty', 0.0, -2.0, 2.0),
    frequency_penalty=fields.number('frequency_penalty', 0.0, -2.0, 2.0),
    logit_bias=_biases(fields),
    stop_tokens=ends,
    stop_strings=tuple(stops),
    max_recursions=fields.integer('max_recursions', None, 1, served.recursions),
    threshold_shift=_shift(fields, served),
    speculate=fields.integer('speculate', None, 0, served.drafts),
    logprobs=logprobs is not None or best_of > n,
    prompt_logprobs=echo and logprobs is not None,
  )
  seed = secrets.randbelow(2**32) if seed is None else seed
  requests = tuple(
    dataclasses.replace(first, prompt=tuple(prompt), seed=(seed + sample) % 2**32)
    for prompt in prompts
    for sample in range(best_of)
  )
  include_usage = options.boolean('include_usage')
  depths = FULL if fields.get('depths') == FULL else fields.boolean('depths')
  if depths == FULL and not served.looks:
    raise fields.refuse('depths', 'true or false: this model has no recursions that it could stop after')
  return Wanted(requests, len(prompts), n, best_of, max_tokens, echo, logprobs, stream, include_usage, depths)


def _shift(fields: Fields, served: Served) -> float:
  shift = fields.number('threshold_shift', 0.0, -1e6, 1e6)
  if shift and not served.thresholds:
    raise fields.refuse('threshold_shift', '0: this model has no thresholds; use max_recursions')
  return shift


def _biases(fields: Fields) -> tuple[tuple[int, float], ...]:
  given = fields.get('logit_bias', {})
  if not isinstance(given, dict) or len(given) > MOST_BIASES:
    raise fields.refuse('logit_bias', f'an object of at most {MOST_BIASES} token ids')
  biases = []
  for token, bias in given.items():
    if not (token.isascii() and token.isdecimal() and len(token) < 10):
      raise fields.refuse('logit_bias', 'an object by token id')
    if type(bias) not in (int, float) or not -100 <= bias <= 100:
      raise fields.refuse('logit_bias', 'an object of numbers from -100 to 100')
    biases.append((int(token), float(bias)))
  return tuple(biases)
