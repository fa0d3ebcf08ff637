"""The text of a sequence that grows, decoded as it grows: an update costs what is new, not what there is."""

from collections.abc import Sequence

from mor_jax.data.tokenizer import REPLACEMENT, Tokenizer

WINDOW = 32  # tokens that are decoded again, at least, before those behind them


class Continuation:
  """What tokens add to the text of a prompt; `Tokenizer.continuation` of ever more of them.

  Attributes:
    text: of the tokens so far.
  """

  def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]):
    self._tokenizer = tokenizer
    self._before = list(prompt)
    self._settled, self._count = '', 0  # text, and how many tokens, that nothing can change any more
    self.text = ''

  def update(self, ids: Sequence[int]) -> str:
    """The text of these tokens, of which those of the last update are the beginning."""
    new = ids[self._count :]
    self.text = self._settled + self._tokenizer.continuation(new, self._before)
    # What is not complete may still become another character.
    is_complete = not (self.text.endswith(REPLACEMENT) or (new and self._tokenizer.is_byte(new[-1])))
    if len(new) >= WINDOW and is_complete:
      self._settled, self._count = self.text, len(ids)
      self._before += new
    return self.text
