"""The text of single tokens, where a character may be spread over several."""

import numpy as np

from mor_jax.data.tokenizer import REPLACEMENT, Tokenizer


def token_texts(tokenizer: Tokenizer, tokens_T: np.ndarray) -> list[str]:
  """The text that each token adds to the one before; together they are the decoded text.

  A character spread over several tokens goes to the last of them, the others have ''.
  """
  tokens, texts, told = tokens_T.tolist(), [], 0
  for end in range(1, len(tokens) + 1):
    text = tokenizer.continuation(tokens[told:end], before=tokens[:told])
    # U+FFFD may be the beginning of a character: at most 4 bytes, hence 4 tokens, long.
    if text.endswith(REPLACEMENT) and end - told < 4 and end < len(tokens):
      texts.append('')
      continue
    texts.append(text)
    told = end
  return texts
