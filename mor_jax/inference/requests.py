"""Requests to the engine and their results."""

import dataclasses
from typing import Any

from mor_jax.inference.sampling import MOST_BIASES, NO_LIMIT
from mor_jax.inference.state import STOP_TOKENS

HUGE = 1e30  # what floats of the device can hold, and their inverses
LEAST_TEMPERATURE = 1e-6


class RequestError(ValueError):
  """An invalid request. The message names the value and what is allowed."""


@dataclasses.dataclass(frozen=True)
class Request:
  """A prompt to continue, and how to sample the continuation.

  Attributes:
    prompt: token ids, at least one.
    max_new_tokens: maximum number of tokens to generate; fewer if the cache fills up first.
    temperature: divides the logits; 0, or less than LEAST_TEMPERATURE, takes the most likely token.
    top_k: sample from this many of the most likely tokens; 0: from all.
    top_p: sample from the smallest set of most likely tokens with at least this total probability.
    repetition_penalty: a value above 1 makes tokens that already occurred less likely (divides positive logits).
    seed: random seed; equal seeds give equal texts.
    stop_tokens: ids that end the text; they are not part of it.
    stop_strings: strings that end the text; they are not part of it.
    max_recursions: maximum number of recursions per token; None: the engine's.
    threshold_shift: added to the routers' thresholds; a positive value means fewer recursions, a negative more.
    min_p: drop tokens whose probability is below this share of that of the likeliest.
    presence_penalty: taken from the logit of every token that was generated before; frequency_penalty: as often as it
      was.
    logit_bias: (token, what is added to its logit), at most MOST_BIASES.
    logprobs: take the scores of the text, if the engine keeps them (`top_logprobs`).
    prompt_logprobs: also those of the prompt.
    speculate: most tokens of a draft, 0: none; None: as the engine has it. The text is the same.
  """

  prompt: tuple[int, ...]
  max_new_tokens: int = 64
  temperature: float = 0.0
  top_k: int = NO_LIMIT
  top_p: float = 1.0
  repetition_penalty: float = 1.0
  seed: int = 0
  stop_tokens: tuple[int, ...] = ()
  stop_strings: tuple[str, ...] = ()
  max_recursions: int | None = None
  threshold_shift: float = 0.0
  min_p: float = 0.0
  presence_penalty: float = 0.0
  frequency_penalty: float = 0.0
  logit_bias: tuple[tuple[int, float], ...] = ()
  logprobs: bool = True
  prompt_logprobs: bool = False
  speculate: int | None = None

  def check(self) -> None:
    """Raises RequestError if a value is invalid for any engine."""
    if not self.prompt:
      raise RequestError('the prompt is empty; give at least one token')
    rules = {
      'max_new_tokens': (1 <= self.max_new_tokens < 2**31, 'from 1 to 2**31 - 1'),
      'temperature': (0 <= self.temperature < HUGE, '>= 0 and finite; 0 takes the most likely token'),
      'top_k': (0 <= self.top_k < 2**31, 'from 0 to 2**31 - 1; 0 means no limit'),
      'top_p': (0 < self.top_p <= 1, 'above 0 and at most 1'),
      'repetition_penalty': (1 / HUGE < self.repetition_penalty < HUGE, '> 0 and finite; 1 means none'),
      'seed': (0 <= self.seed < 2**32, 'from 0 to 2**32 - 1'),
      'threshold_shift': (abs(self.threshold_shift) < HUGE, 'a finite number'),
      'min_p': (0 <= self.min_p <= 1, 'from 0 to 1'),
      'presence_penalty': (abs(self.presence_penalty) < HUGE, 'a finite number'),
      'frequency_penalty': (abs(self.frequency_penalty) < HUGE, 'a finite number'),
      'logit_bias': (
        len(self.logit_bias) <= MOST_BIASES and all(abs(bias) < HUGE for _, bias in self.logit_bias),
        f'finite numbers for at most {MOST_BIASES} tokens',
      ),
      'stop_tokens': (len(self.stop_tokens) <= STOP_TOKENS, f'at most {STOP_TOKENS} ids'),
      'stop_strings': (all(self.stop_strings), 'non-empty texts'),
    }
    for name, (holds, allowed) in rules.items():
      if not holds:
        raise RequestError(f'{name}={short(getattr(self, name))} is not allowed: must be {allowed}')


@dataclasses.dataclass(eq=False)
class Result:
  """The result of a request, which grows during generation.

  Attributes:
    request: the request.
    tokens: ids generated so far, without the stop token.
    text: the decoded tokens, without the stop string; '' if there is no tokenizer.
    depths: number of recursions of each prompt token and generated token, except the last: the model never
      processes that one.
    end_token: the stop token that ended the text; None: it did not end by one.
    logprobs: of prompt, generated tokens and end token: the natural logarithm of each one's probability after those before it,
      None for the first, and for all of a prompt without `prompt_logprobs`; [] unless the engine keeps scores, and
      the request takes them.
    top_logprobs: the likeliest tokens in the place of each and their logprobs, [] where logprobs are None.
    finish: reason for the end: 'stop_token', 'stop_string', 'length' or 'cancelled'; '' while it is running.
    submitted, first_token, finished: times in seconds on the clock of `time.perf_counter`; 0 until they occur.
  """

  request: Request
  tokens: list[int] = dataclasses.field(default_factory=list)
  text: str = ''
  depths: list[int] = dataclasses.field(default_factory=list)
  end_token: int | None = None
  logprobs: list[float | None] = dataclasses.field(default_factory=list)
  top_logprobs: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
  finish: str = ''
  submitted: float = 0.0
  first_token: float = 0.0
  finished: float = 0.0


def short(value: Any, most: int = 60) -> str:
  """A value of any size as text for a message."""
  try:
    text = repr(value)
  except (RecursionError, ValueError):
    text = f'a {type(value).__name__}'
  return text if len(text) <= most else f'{text[:most]}...'
