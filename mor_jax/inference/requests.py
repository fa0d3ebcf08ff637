"""What a user asks of the engine, and what it answers."""

import dataclasses

from mor_jax.inference.sampling import NO_LIMIT
from mor_jax.inference.state import STOP_TOKENS


class RequestError(ValueError):
  """A request that cannot be answered. The message names what is wrong and what is allowed."""


@dataclasses.dataclass(frozen=True)
class Request:
  """One text to continue.

  Attributes:
    prompt: token ids, at least one.
    max_new_tokens: most tokens to generate; fewer if the cache is full before.
    temperature: divides the logits; 0 takes the most likely token.
    top_k: sample from so many of the most likely tokens; 0: from all.
    top_p: sample from the most likely tokens that together have this probability.
    repetition_penalty: above 1, tokens that occurred become less likely (divides positive logits).
    seed: equal seeds give equal texts.
    stop_tokens: ids that end the text; they are not part of it.
    stop_strings: texts that end the text; they are not part of it.
    max_recursions: recursions that a token may take; None: those of the engine.
    threshold_shift: added to the routers' thresholds: above 0 tokens take fewer recursions, below more.
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

  def check(self) -> None:
    """Raises RequestError for values that no engine accepts."""
    if not self.prompt:
      raise RequestError('the prompt is empty; give at least one token')
    rules = {
      'max_new_tokens': (self.max_new_tokens >= 1, '>= 1'),
      'temperature': (0 <= self.temperature < float('inf'), '>= 0; 0 takes the most likely token'),
      'top_k': (self.top_k >= 0, '>= 0; 0 means no limit'),
      'top_p': (0 < self.top_p <= 1, 'above 0 and at most 1'),
      'repetition_penalty': (0 < self.repetition_penalty < float('inf'), '> 0; 1 means none'),
      'seed': (0 <= self.seed < 2**32, 'from 0 to 2**32 - 1'),
      'threshold_shift': (abs(self.threshold_shift) < float('inf'), 'a finite number'),
      'stop_tokens': (len(self.stop_tokens) <= STOP_TOKENS, f'at most {STOP_TOKENS} ids'),
      'stop_strings': (all(self.stop_strings), 'non-empty texts'),
    }
    for name, (holds, allowed) in rules.items():
      if not holds:
        raise RequestError(f'{name}={getattr(self, name)} is not allowed: must be {allowed}')


@dataclasses.dataclass(eq=False)
class Result:
  """The answer to a request, which grows while it is generated.

  Attributes:
    request: what was asked.
    tokens: ids generated so far, without the stop token.
    text: their text, without the stop string; '' where there is no tokenizer.
    depths: recursions that each of the prompt's and the generated tokens took; of the last token it is
      not known, since it was never computed.
    finish: why it ended: 'stop_token', 'stop_string', 'length', 'cancelled'; '' until then.
    submitted, first_token, finished: seconds on the clock of `time.perf_counter`; 0 until then.
  """

  request: Request
  tokens: list[int] = dataclasses.field(default_factory=list)
  text: str = ''
  depths: list[int] = dataclasses.field(default_factory=list)
  finish: str = ''
  submitted: float = 0.0
  first_token: float = 0.0
  finished: float = 0.0
