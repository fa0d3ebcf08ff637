"""The text of single tokens, where a character may be spread over several."""

import numpy as np

from mor_jax.data.tokenizer import Tokenizer


def token_texts(tokenizer: Tokenizer, tokens_T: np.ndarray) -> list[str]:
  """The text that each token adds to the one before; together they are the decoded text.

  A character spread over several tokens goes to the last of them, the others have ''.
  """
  texts, pending = [], []
  for token in tokens_T.tolist():
    pending.append(token)
    text = tokenizer.decode(pending)
    # U+FFFD may be the beginning of a character: at most 4 bytes, hence 4 tokens, long.
    if text.endswith('�') and len(pending) < 4:
      texts.append('')
      continue
    texts.append(text)
    pending = []
  if pending:
    texts[-1] = tokenizer.decode(pending)
  return texts
