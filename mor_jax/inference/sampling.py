"""Text from a model by full forward passes: simple, causal (threshold routing), without caches."""

from functools import partial

import jax
import jax.numpy as jnp

from mor_jax.data.tokenizer import Tokenizer
from mor_jax.model.transformer import Transformer


def sample_text(
  model: Transformer,
  variables: dict,
  tokenizer: Tokenizer,
  prompt: str,
  num_tokens: int,
  temperature: float,
  seed: int = 0,
) -> str:
  """A continuation of `prompt`, at most `num_tokens` tokens, ended early by end of text.

  Args:
    temperature: divides the logits; 0 takes the most likely token.

  Raises:
    ValueError: the prompt has no tokens, or temperature is negative.
  """
  if temperature < 0:
    raise ValueError(f'temperature={temperature} must be >= 0')
  prompt_ids = tokenizer.encode(prompt)
  if not prompt_ids:
    raise ValueError('the prompt is empty; give at least one character')
  padding = [tokenizer.end_of_text] * num_tokens
  tokens_1T = jnp.array([prompt_ids + padding], jnp.int32)
  key = jax.random.key(seed)
  tokens_1T = _continue(model, variables, tokens_1T, jnp.int32(len(prompt_ids)), temperature, key)
  continuation = tokens_1T[0, len(prompt_ids) :].tolist()
  if tokenizer.end_of_text in continuation:
    continuation = continuation[: continuation.index(tokenizer.end_of_text)]
  return tokenizer.decode(continuation)


@partial(jax.jit, static_argnums=(0, 4))
def _continue(model, variables, tokens_1T, prompt_len, temperature, key):
  """Fills tokens_1T from prompt_len on, one forward pass over the row a token."""

  def step(position, tokens_1T):
    written_1T = (jnp.arange(tokens_1T.shape[1]) < position)[None].astype(jnp.int32)
    logits_1TV = model.apply(variables, tokens_1T, routing='threshold', segment_ids=written_1T).logits
    logits_V = logits_1TV[0, position - 1]
    if temperature == 0:
      token = logits_V.argmax()
    else:
      token = jax.random.categorical(jax.random.fold_in(key, position), logits_V / temperature)
    return tokens_1T.at[0, position].set(token.astype(jnp.int32))

  return jax.lax.fori_loop(prompt_len, tokens_1T.shape[1], step, tokens_1T)
