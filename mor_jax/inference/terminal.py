"""Generated text on a terminal as it grows, coloured by depth if wanted, and its speed."""

import numpy as np
from rich.console import Console
from rich.text import Text

from mor_jax.config import ModelConfig
from mor_jax.console import has_colours
from mor_jax.data.token_texts import token_texts
from mor_jax.data.tokenizer import CONTEXT, REPLACEMENT, Tokenizer
from mor_jax.inference.requests import Result
from mor_jax.inference.statistics import Statistics

# From few recursions to many; tokens that took none come first.
COLOURS = ('bright_black', 'cyan', 'green', 'yellow', 'red', 'magenta', 'bright_blue', 'white')


class Writer:
  """Prints results as they grow. Without colours, the depth follows each token in brackets."""

  def __init__(self, console: Console, tokenizer: Tokenizer, steps: int, show_depth: bool):
    """Prints nothing yet. `steps` is the largest depth."""
    self._console, self._tokenizer = console, tokenizer
    self._steps, self._show_depth = steps, show_depth
    self._printed = 0  # characters, or with depths tokens
    self._first = 0  # token with whose text that of the others begins

  def begin(self, result: Result, number: int | None) -> None:
    """Prints the prompt, preceded by the legend of colours (once) and a title if there are several samples."""
    if not number:
      self.explain()
    if number is not None:
      self._print(Text(f'--- sample {number + 1} (seed {result.request.seed})\n', style='bold'))
    self._printed = self._first = 0
    if not self._show_depth:
      self._print(Text(self._tokenizer.decode(result.request.prompt)))
    self.update(result)

  def begin_answer(self, result: Result) -> None:
    """Prints nothing of the prompt."""
    prompt = len(result.request.prompt)
    self._first = max(prompt - CONTEXT, 0)
    self._printed = prompt if self._show_depth else 0

  def explain(self) -> None:
    """Prints the legend of colours, if there are any."""
    if self._show_depth:
      self._print(self._legend())

  def update(self, result: Result) -> None:
    """Prints the new text; holds back incomplete characters and what may become a stop string."""
    if self._show_depth:
      self._update_with_depths(result, len(result.depths))
      return
    text = result.text
    if not result.finish:
      text = text.rstrip(REPLACEMENT)
      held = max(map(len, result.request.stop_strings), default=1) - 1
      text = text[: max(len(text) - held, 0)]
    self._print(Text(text[self._printed :]))
    self._printed = max(self._printed, len(text))

  def end(self, result: Result) -> None:
    """Prints the rest of the text. The last token has no depth, as the model never processes it."""
    if self._show_depth:
      self._update_with_depths(result, len(result.request.prompt) + len(result.tokens))
    self._print(Text('\n'))

  def _update_with_depths(self, result: Result, count: int) -> None:
    tokens = (*result.request.prompt, *result.tokens)
    pieces = token_texts(self._tokenizer, np.array(tokens[self._first :]))
    line = Text()
    for index in range(self._printed, min(count, len(tokens))):
      depth = result.depths[index] if index < len(result.depths) else None
      line.append(pieces[index - self._first], style='' if depth is None else self._style(depth))
      if depth is not None and not has_colours(self._console):
        line.append(f'[{depth}]')
    self._printed = max(self._printed, min(count, len(tokens)))
    self._print(line)

  def _style(self, depth: int) -> str:
    return COLOURS[depth % len(COLOURS)]

  def _legend(self) -> Text:
    legend = Text('recursions:')
    for depth in range(self._steps + 1):
      legend.append(f' {depth}', style=self._style(depth))
    return legend.append('\n')

  def _print(self, text: Text) -> None:
    self._console.print(text, end='', soft_wrap=True, highlight=False)


def describe_statistics(statistics: Statistics, config: ModelConfig) -> str:
  """One line with throughput, latency, slot occupancy, what drafts gave and, for MoR, depth and overflow."""
  found = statistics.summary()
  parts = [
    f'{found["tokens"]} tokens in {found["seconds"]:.1f} s (compilation included): '
    f'{found["tokens_per_second"]:,.1f} tokens/s',
    f'first token after {found["time_to_first_token"]:.2f} s, then {found["time_per_token"] * 1e3:.1f} ms each',
  ]
  if statistics.ticks:
    parts.append(f'slots {found["slot_occupancy"]:.0%} in use')
  if statistics.checks:
    parts.append(f'{found["tokens_per_check"]:.2f} tokens a draft')
  if config.kind == 'mor':
    parts += [
      f'mean depth {found["mean_depth"]:.2f} of {config.recursions}',
      f'{found["overflow"]} tokens without a place',
    ]
  return '; '.join(parts)
