"""A conversation with a model on the command line: lines in, answers out, the history through the chat template."""

import dataclasses
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from mor_jax.data.chats import Chats
from mor_jax.data.messages import Message
from mor_jax.data.templates import RefusedError
from mor_jax.inference.requests import Request, RequestError, Result
from mor_jax.inference.scheduler import Scheduler
from mor_jax.inference.terminal import Writer

RESET, EXIT = '/reset', '/exit'
LEAST_ROOM = 4  # of max_len an answer gets at least the share 1 / LEAST_ROOM, unless it needs less
SEEDS = 2**32

Say = Callable[[str], None]
"""Tells the user a sentence that is not the model's."""


class Dialogue:
  """What was said so far, and the engine that goes on with it.

  Attributes:
    messages: so far; the model sees all of them in each turn, unless they are longer than its longest text.
  """

  def __init__(self, scheduler: Scheduler, chats: Chats, template: Request, system: str | None = None):
    """Begins with nothing but a system message, if there is one. `template` is a request without its prompt."""
    self._scheduler, self._chats, self._template = scheduler, chats, template
    self._system: list[Message] = [{'role': 'system', 'content': system}] if system else []
    self._turns = 0
    self.reset()

  def reset(self) -> None:
    """Forgets what was said."""
    self.messages: list[Message] = list(self._system)

  def ask(self, text: str, say: Say) -> Result | None:
    """Queues the answer to a message, and forgets the oldest turns if all of them are too long; None: it has no answer.

    Says why a message cannot be answered, which is then forgotten, and what was left out.
    """
    asked: list[Message] = [*self.messages, {'role': 'user', 'content': text}]
    try:
      kept, prompt = self._fitting(asked)
      seed = (self._template.seed + self._turns) % SEEDS
      result = self._scheduler.submit(dataclasses.replace(self._template, prompt=tuple(prompt), seed=seed))
    except (RefusedError, RequestError) as error:
      say(f'the chat template {error}' if isinstance(error, RefusedError) else str(error))
      return None
    if left_out := len(asked) - len(kept):
      say(
        f'the conversation has become longer than max_len={self._scheduler.engine.max_len} tokens: its oldest {left_out} '
        f'messages are left out from here on'
      )
    self.messages = kept
    self._turns += 1
    return result

  def step(self) -> None:
    """Lets the engine go on with the answer."""
    self._scheduler.step()

  def end(self, result: Result, stopped: bool) -> None:
    """Keeps an answer as it is; if the user stopped it, what there is of it."""
    if stopped:
      self._scheduler.cancel(result)
    self.messages.append({'role': 'assistant', 'content': result.text})

  def _fitting(self, messages: list[Message]) -> tuple[list[Message], list[int]]:
    """The messages, less as many of the oldest turns as it takes for an answer to have room, and their prompt."""
    most, first = self._scheduler.engine.max_len, len(self._system)
    room = min(self._template.max_new_tokens, most // LEAST_ROOM)
    prompt = self._chats.prompt(messages)
    while len(prompt) + room > most and len(messages) > first + 1:
      messages = [*messages[:first], *messages[first + 2 :]]
      prompt = self._chats.prompt(messages)
    return messages, prompt


def talk(dialogue: Dialogue, writer: Writer, lines: Iterable[str], say: Say) -> None:
  """Answers lines until they end or one is /exit. Ctrl-C stops an answer; a second time, it is a KeyboardInterrupt."""
  for line in lines:
    text = line.strip()
    if text == EXIT:
      return
    if text == RESET:
      dialogue.reset()
      say('what was said is forgotten')
    elif text.startswith('/') and text[1:].isalpha():
      say(f'{text} is not one of {RESET} and {EXIT}')
    elif text and (result := dialogue.ask(text, say)) is not None:
      _answer(dialogue, writer, result, say)


def _answer(dialogue: Dialogue, writer: Writer, result: Result, say: Say) -> None:
  with Interrupts() as interrupts:
    writer.begin_answer(result)
    while not result.finish and not interrupts.seen:
      dialogue.step()
      writer.update(result)
    dialogue.end(result, stopped=not result.finish)
    writer.end(result)
  if interrupts.seen:
    say('stopped')


def typed_lines(prompt: str, say: Say) -> Iterator[str]:
  """Lines that a user types at a terminal, until the end of input; Ctrl-C begins a new one."""
  import readline  # noqa: F401  # lines can be edited, and earlier ones be found again

  while True:
    try:
      yield input(prompt)
    except EOFError:
      print()
      return
    except KeyboardInterrupt:
      print()
      say(f'{EXIT} or the end of input (Ctrl-D) ends the conversation')


def piped_lines() -> Iterator[str]:
  """Lines of standard input."""
  yield from sys.stdin


class Interrupts:
  """A context in which the first Ctrl-C is only noted: one within a call of the engine would lose its state.

  Attributes:
    seen: whether there was one.
  """

  def __init__(self) -> None:
    self.seen = False

  def __enter__(self) -> 'Interrupts':
    if threading.current_thread() is threading.main_thread():
      self._before: Any = signal.signal(signal.SIGINT, self._note)
    return self

  def __exit__(self, *exception: object) -> None:
    if threading.current_thread() is threading.main_thread():
      signal.signal(signal.SIGINT, self._before)

  def _note(self, number: int, frame: Any) -> None:
    if self.seen:
      raise KeyboardInterrupt
    self.seen = True
