"""A convenience function that continues one text."""

from typing import Any

from mor_jax.data.tokenizer import Tokenizer
from mor_jax.inference.engine import Engine
from mor_jax.inference.requests import Request
from mor_jax.inference.scheduler import Scheduler
from mor_jax.model.transformer import Transformer


def complete(
  model: Transformer,
  variables: dict[str, Any],
  tokenizer: Tokenizer,
  prompt: str,
  num_tokens: int,
  temperature: float,
  seed: int = 0,
) -> str:
  """Returns a continuation of `prompt`: at most `num_tokens` tokens, fewer if the model ends the text.

  Raises:
    RequestError: the prompt has no tokens, or temperature is negative.
  """
  prompt_ids = tokenizer.encode_text(prompt)
  # A scan over layers compiles fast, and a few tokens are not worth more.
  length = len(prompt_ids) + num_tokens
  engine = Engine(model, variables, slots=1, max_len=max(length, 2), chunks=(64,), unroll=False)
  request = Request(
    tuple(prompt_ids),
    max_new_tokens=num_tokens,
    temperature=temperature,
    seed=seed,
    stop_tokens=(tokenizer.end_of_text,),
  )
  return Scheduler(engine, tokenizer, ticks_per_call=length * engine.steps).run([request])[0].text
