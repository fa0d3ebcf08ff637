"""Answers in OpenAI's form: whole ones, and the pieces of a stream."""

import dataclasses
import time
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np

from mor_jax.data.token_texts import token_texts
from mor_jax.data.tokenizer import CONTEXT, REPLACEMENT, Tokenizer
from mor_jax.inference.requests import Request
from mor_jax.serving.schemas import Served, Wanted
from mor_jax.serving.worker import NOTHING, Told


@dataclasses.dataclass
class Shown:
  """How much of a sample a stream has sent.

  Attributes:
    characters, tokens, depths: of the generated ones. A depth is known when its token was processed, which is after
      the token itself.
  """

  characters: int = 0
  tokens: int = 0
  depths: int = 0


class Answers:
  """The answers to one body."""

  def __init__(self, served: Served, wanted: Wanted, is_chat: bool):
    self._served, self._wanted, self._is_chat = served, wanted, is_chat
    self._id = f'{"chatcmpl" if is_chat else "cmpl"}-{uuid.uuid4().hex}'
    self._created = int(time.time())
    self._shown = [Shown() for _ in wanted.requests]

  # ---- whole ----

  def whole(self, told: Sequence[Told], looks: Sequence[Any] | None = None) -> dict[str, Any]:
    """The answer when everything has ended.

    Args:
      looks: of every request, what was said after each recursion (`recursions.py`); None: it was not asked for.
    """
    wanted = self._wanted
    choices = []
    for prompt in range(wanted.prompts):
      samples: Sequence[int] = range(prompt * wanted.best_of, (prompt + 1) * wanted.best_of)
      if wanted.best_of > wanted.n:
        best = sorted(samples, key=lambda index: -_mean_logprob(wanted.requests[index], told[index]))
        samples = sorted(best[: wanted.n])
      for index in samples:
        entry = self._choice(len(choices), index, told[index])
        choices.append(entry if looks is None else {**entry, 'recursions': looks[index]})
    return {**self._head(), 'choices': choices, 'usage': self.usage(told)}

  def _choice(self, number: int, index: int, told: Told) -> dict[str, Any]:
    wanted, request = self._wanted, self._wanted.requests[index]
    told = told if wanted.max_tokens else told._replace(text='', tokens=(), end_token=None)
    entry: dict[str, Any] = {'index': number, 'finish_reason': _reason(told, wanted)}
    if self._is_chat:
      entry['message'] = {'role': 'assistant', 'content': told.text, 'refusal': None}
      entry['logprobs'] = self._chat_logprobs(request, told, 0, len(told.tokens))
    else:
      prompt = self._served.tokenizer.decode(request.prompt) if wanted.echo else ''
      entry['text'] = prompt + told.text
      entry['logprobs'] = self._legacy_logprobs(request, told, 0, len(told.tokens), wanted.echo, 0)
    if wanted.depths:
      entry['depths'] = _depths(request, told, 0, len(told.tokens), True)
    return entry

  def usage(self, told: Sequence[Told]) -> dict[str, Any]:
    """Tokens and passes of everything that was computed, each prompt counted once."""
    wanted = self._wanted
    prompts = sum(len(request.prompt) for request in wanted.requests[:: wanted.best_of])
    generated = sum(len(one.tokens) for one in told) if wanted.max_tokens else 0
    depths = [depth for one in told for depth in one.depths]
    return {
      'prompt_tokens': prompts,
      'completion_tokens': generated,
      'total_tokens': prompts + generated,
      'block_passes': sum(depths),
      'mean_depth': round(sum(depths) / max(len(depths), 1), 4),
    }

  # ---- in pieces ----

  def pieces(self, told: Sequence[Told]) -> list[dict[str, Any]]:
    """What is new of every sample since the last call."""
    made = []
    for index, one in enumerate(told):
      made += self._pieces_of(index, one)
    return made

  def _pieces_of(self, index: int, told: Told) -> list[dict[str, Any]]:
    wanted, request, shown = self._wanted, self._wanted.requests[index], self._shown[index]
    is_first = shown == Shown()
    if told is NOTHING or shown.characters < 0:  # its end was sent
      return []
    told = told if wanted.max_tokens else told._replace(text='', tokens=(), end_token=None)
    safe = told.text if told.finish else _safe(told.text, request)
    count = (
      _tokens_in(self._served.tokenizer, request, told, len(safe)) if not told.finish else len(told.tokens)
    )
    text = safe[shown.characters :]
    if not text and not told.finish and count == shown.tokens:
      return []
    reason = _reason(told, wanted) if told.finish else None
    entry: dict[str, Any] = {'index': self._number(index), 'finish_reason': reason}
    echo = wanted.echo and is_first
    if self._is_chat:
      entry['delta'] = ({'role': 'assistant'} if is_first else {}) | {'content': text}
      entry['logprobs'] = self._chat_logprobs(request, told, shown.tokens, count)
    else:
      entry['text'] = (self._served.tokenizer.decode(request.prompt) if echo else '') + text
      before = len(self._served.tokenizer.decode(request.prompt)) if wanted.echo and not is_first else 0
      entry['logprobs'] = self._legacy_logprobs(
        request, told, shown.tokens, count, echo, before + shown.characters
      )
    if wanted.depths:
      entry['depths'] = _depths(request, told, shown.depths, count, is_first)
    known = min(max(len(told.depths) - len(request.prompt), 0), count)
    self._shown[index] = Shown(-1 if told.finish else len(safe), count, known)
    return [{**self._head(True), 'choices': [entry]}]

  def looked(self, looks: Sequence[Any]) -> list[dict[str, Any]]:
    """Pieces with what was said after each recursion of new tokens, one for each sample that has any."""
    content: dict[str, Any] = {'delta': {}} if self._is_chat else {'text': ''}
    made = []
    for index, look in enumerate(looks):
      if not look:
        continue
      entry = {'index': self._number(index), **content, 'finish_reason': None, 'recursions': look}
      made.append({**self._head(True), 'choices': [entry]})
    return made

  def _number(self, index: int) -> int:
    """The number of the choice that a request of a stream is."""
    return index % self._wanted.best_of + index // self._wanted.best_of * self._wanted.n

  def last(self, told: Sequence[Told]) -> dict[str, Any]:
    """The piece with the usage alone."""
    return {**self._head(True), 'choices': [], 'usage': self.usage(told)}

  # ---- parts ----

  def _head(self, is_piece: bool = False) -> dict[str, Any]:
    kind = 'text_completion'
    if self._is_chat:
      kind = 'chat.completion.chunk' if is_piece else 'chat.completion'
    return {'id': self._id, 'object': kind, 'created': self._created, 'model': self._served.name}

  def _legacy_logprobs(
    self, request: Request, told: Told, first: int, end: int, echo: bool, offset: int
  ) -> dict[str, Any] | None:
    """Log-probabilities of tokens `first` to `end`, and of the prompt (`echo`), as completions have them.

    A token that ended the text comes last, as in vLLM: lm-evaluation-harness leaves out the last one unseen.
    """
    if self._wanted.logprobs is None:
      return None
    start = 0 if echo else len(request.prompt) + first
    is_end = told.end_token is not None and bool(told.finish)
    places = range(start, len(request.prompt) + end + is_end)
    texts = self._texts(request, told, start, len(request.prompt) + end)
    texts += [self._name(told.end_token)] if is_end else []
    offsets = np.cumsum([offset, *map(len, texts)])[:-1].tolist()
    logprobs, tops = [], []
    for place in places:
      known = place < len(told.logprobs)
      logprobs.append(told.logprobs[place] if known else None)
      top = told.top_logprobs[place][: self._wanted.logprobs] if known else []
      named: dict[str, float] = {}
      for token, value in top:
        named.setdefault(self._name(token), value)  # of tokens that look alike the likeliest
      tops.append(named if known and told.logprobs[place] is not None else None)
    return {'tokens': texts, 'token_logprobs': logprobs, 'top_logprobs': tops, 'text_offset': offsets}

  def _chat_logprobs(self, request: Request, told: Told, first: int, end: int) -> dict[str, Any] | None:
    if self._wanted.logprobs is None:
      return None
    start = len(request.prompt)
    places = range(start + first, start + end)
    content = []
    for place, text in zip(places, self._texts(request, told, places.start, places.stop), strict=True):
      top = told.top_logprobs[place][: self._wanted.logprobs]
      others = [_named(self._name(token), value) for token, value in top]
      content.append({**_named(text, told.logprobs[place]), 'top_logprobs': others})
    return {'content': content, 'refusal': None}

  def _texts(self, request: Request, told: Told, start: int, end: int) -> list[str]:
    """Of the tokens from place `start` to `end`; those before them say how the first is spelled."""
    begin = max(start - CONTEXT, 0)
    tokens = np.array([*request.prompt, *told.tokens][begin:end], np.int64)
    return token_texts(self._served.tokenizer, tokens)[start - begin :]

  def _name(self, token: int | None) -> str:
    return '' if token is None else self._served.tokenizer.spelled(token)


def _named(text: str, logprob: float | None) -> dict[str, Any]:
  return {'token': text, 'logprob': logprob, 'bytes': list(text.encode('utf-8', 'replace'))}


def _reason(told: Told, wanted: Wanted) -> str:
  return 'stop' if told.finish.startswith('stop') and wanted.max_tokens else 'length'


def _depths(request: Request, told: Told, first: int, end: int, with_prompt: bool) -> dict[str, list[int]]:
  """Recursions of the tokens; the last one of a text is never processed and has none."""
  start = len(request.prompt)
  made = {'tokens': list(told.depths[start + first : start + end])}
  return {'prompt': list(told.depths[:start]), **made} if with_prompt else made


def _mean_logprob(request: Request, told: Told) -> float:
  """By which samples are compared (`best_of`)."""
  own = [value for value in told.logprobs[len(request.prompt) :] if value is not None]
  return sum(own) / len(own) if own else 0.0


def _safe(text: str, request: Request) -> str:
  """The part of an unfinished text that stays: no incomplete character, nothing that may begin a stop string."""
  text = text.rstrip(REPLACEMENT)
  for held in range(max(map(len, request.stop_strings), default=1) - 1, 0, -1):
    ending = text[-held:]
    if any(len(stop) > held and stop.startswith(ending) for stop in request.stop_strings):
      return text[:-held]
  return text


def _tokens_in(tokenizer: Tokenizer, request: Request, told: Told, characters: int) -> int:
  """How many of the generated tokens are within the first characters of the text."""
  count = len(told.tokens)
  if characters >= len(told.text):
    return count
  while count and len(tokenizer.continuation(told.tokens[:count], request.prompt)) > characters:
    count -= 1
  return count
