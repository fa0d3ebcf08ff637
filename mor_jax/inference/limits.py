"""What an engine can do for a request, and the request as its device state holds it."""

import dataclasses

import numpy as np

from mor_jax.config import ModelConfig
from mor_jax.inference.requests import LEAST_TEMPERATURE, Request, RequestError, short
from mor_jax.inference.sampling import MOST_BIASES, NO_BIAS, SamplingRules
from mor_jax.inference.state import NO_TOKEN, STOP_TOKENS, Rules


@dataclasses.dataclass(frozen=True)
class Limits:
  """What an engine is made for.

  Attributes:
    config: its model.
    max_len: longest sequence, prompt included.
    steps: most recursions of a token.
    speculate: most tokens of a draft.
  """

  config: ModelConfig
  max_len: int
  steps: int
  speculate: int

  def check(self, request: Request) -> None:
    """Raises RequestError for a request that cannot be answered."""
    request.check()
    size, vocabulary = len(request.prompt), self.config.vocab_size
    if size >= self.max_len:
      raise RequestError(
        f'the prompt has {size} tokens, which leaves no room in a cache of max_len={self.max_len}; shorten it '
        f'or raise max_len above {size}'
      )
    biased = (token for token, _ in request.logit_bias)
    bad = [token for token in (*request.prompt, *request.stop_tokens, *biased) if not 0 <= token < vocabulary]
    if bad:
      raise RequestError(
        f'token {str(bad[0])[:20]} is outside the vocabulary, whose ids go from 0 to {vocabulary - 1}'
      )
    config = self.config
    if request.threshold_shift and (config.kind != 'mor' or config.router != 'expert_choice'):
      raise RequestError(
        f'threshold_shift={request.threshold_shift} needs an expert-choice model, whose recursions have '
        f'thresholds; use max_recursions'
      )
    most = request.max_recursions
    if most is not None and not 1 <= most <= self.steps:
      raise RequestError(f'max_recursions={most} is not allowed: must be from 1 to {self.steps}')
    if request.speculate is not None and not 0 <= request.speculate <= self.speculate:
      raise RequestError(
        f'speculate={short(request.speculate)} is not allowed: must be from 0 to {self.speculate}, for which the '
        f'engine is made'
      )

  def rules(self, request: Request) -> Rules:
    """What a request asks for, as the state holds it."""
    stops = np.full((STOP_TOKENS,), NO_TOKEN, np.int32)
    stops[: len(request.stop_tokens)] = request.stop_tokens
    limit = min(self.max_len, len(request.prompt) + request.max_new_tokens)
    biases = np.full((MOST_BIASES,), NO_BIAS, np.int32), np.zeros((MOST_BIASES,), np.float32)
    for place, (token, bias) in enumerate(request.logit_bias):
      biases[0][place], biases[1][place] = token, bias
    chosen_by = SamplingRules(
      np.float32(request.temperature if request.temperature >= LEAST_TEMPERATURE else 0.0),
      np.int32(request.top_k),
      np.float32(request.top_p),
      np.float32(request.repetition_penalty),
      np.uint32(request.seed),
      np.float32(request.min_p),
      np.float32(request.presence_penalty),
      np.float32(request.frequency_penalty),
      np.int32(len(request.prompt)),
      *biases,
    )
    most = self.steps if request.max_recursions is None else request.max_recursions
    drafts = self.speculate if request.speculate is None else request.speculate
    return Rules(
      chosen_by, stops, np.int32(limit), np.int32(most), np.float32(request.threshold_shift), np.int32(drafts)
    )
