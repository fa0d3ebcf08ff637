"""Conversations through the chat template of their tokenizer, with what the assistant says marked exactly.

What is learned is what the model has to say itself: all that follows the prompt for the assistant
(`add_generation_prompt`) up to the special token that ends the turn. A template that marks it by {% generation %} is
taken at its word. Of any other the conversation is rendered three ways: as a whole, with marks around what the
assistant says, which must not change it otherwise, and up to each of its turns, which must be beginnings of the whole.

Messages are text: where one spells a special token of the tokenizer, the spelling is cut in two (`rendered.APART`) and
never becomes that token, whoever wrote it.
"""

import re
from collections.abc import Sequence
from typing import Any

from mor_jax.data import rendered, sandbox, templates
from mor_jax.data.conventions import Conventions
from mor_jax.data.document import Document, Unreadable
from mor_jax.data.messages import Conversation, Message
from mor_jax.data.rendered import APART, Rendered
from mor_jax.data.templates import RefusedError, Template
from mor_jax.data.tokenizer import Tokenizer

SAID = ('\ufdd2', '\ufdd3')  # around what the assistant says, while its place is looked for
_RESERVED = re.compile('[\ufdd0-\ufdef]')

ADVICE = 'mark what the assistant says in the template with {% generation %} ... {% endgeneration %}'


class Chats:
  """A template and the tokenizer that it is for."""

  def __init__(self, template: Template, tokenizer: Tokenizer):
    self.template, self._tokenizer = template, tokenizer
    self._special = re.compile('|'.join(map(re.escape, tokenizer.specials)))
    long = [re.escape(name) for name in tokenizer.specials if len(name) > 1]
    self._spelled = re.compile(f'(?={"|".join(long)})') if long else None  # also within one another
    self._firsts = {name[0] for name in tokenizer.specials}

  @classmethod
  def of(cls, conventions: Conventions, tokenizer: Tokenizer) -> 'Chats | None':
    """The template that came with a model; None: none did. Raises ConfigError if it cannot be read."""
    template = templates.of(conventions)
    return None if template is None else cls(template, tokenizer)

  def prompt(self, messages: Sequence[Message]) -> list[int]:
    """Tokens of a conversation, up to where the assistant begins. Raises RefusedError."""
    text = self.template.render([self._apart(message) for message in messages])
    return rendered.encode(self._tokenizer, [Rendered(text, [])])[0].ids_N.tolist()

  def render(self, conversation: Conversation) -> Rendered:
    """A conversation as text, and what of it is learned.

    Raises:
      RefusedError: the template refuses it, or does not say what the assistant says.
    """
    messages = [self._apart(message) for message in conversation.messages]
    turns = [index for index, message in enumerate(messages) if message['role'] == 'assistant']
    learns = [index >= conversation.first for index in turns]
    if self.template.marks_generation:
      whole, spans = _unmarked(self.template.marked(messages), sandbox.GENERATED)
      if spans is None or len(spans) != len(turns):
        raise RefusedError(
          f'has {len(spans or ())} parts {{% generation %}}, apart from one another, for {len(turns)} messages of the assistant'
        )
    else:
      whole = self.template.render(messages, add_generation_prompt=False)
      spans = self._spans(messages, turns, whole)
    return Rendered(whole, [span for span, learn in zip(spans, learns, strict=True) if learn])

  def document(self, document: Document) -> Document | Unreadable:
    """A conversation's document as its template writes it; the conversation alone decides its split."""
    try:
      found = self.render(Conversation.from_text(document.text))
    except RefusedError as error:
      return Unreadable(document.name, f'the chat template {error}')
    origin = document.text if document.origin is None else document.origin
    return Document(document.name, found.to_text(), origin, document.split)

  def ends(self) -> tuple[int, ...]:
    """Ids of the special token that ends what the assistant says; none if the template does not use one."""
    try:
      found = self.render(
        Conversation([{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}])
      )
    except RefusedError:  # it wants other roles; they are not known here
      return ()
    said = [found.text[begin:end] for begin, end in found.learned]
    names = [match.group() for match in self._special.finditer(said[-1])] if said else []
    index = self._tokenizer.token_to_id(names[-1]) if names else None
    return () if index is None else (index,)

  def describe(self) -> dict[str, Any]:
    """What a dataset says of its conversations."""
    return {'template': self.template.source, 'tokens': self.template.tokens, 'ends': list(self.ends())}

  def _apart(self, message: Message) -> Message:
    """The message with every special token that it spells cut in two."""
    return {key: self._cut(text) if isinstance(text, str) else text for key, text in message.items()}

  def _cut(self, text: str) -> str:
    if _RESERVED.search(text):
      raise RefusedError('has no way to write U+FDD0 to U+FDEF, which are reserved for programs')
    if self._spelled is None or self._firsts.isdisjoint(text):
      return text
    places = [match.start() + 1 for match in self._spelled.finditer(text)]
    parts = [text[begin:end] for begin, end in zip([0, *places], [*places, None], strict=True)]
    return APART.join(parts)

  def _spans(self, messages: list[Message], turns: list[int], whole: str) -> list[tuple[int, int]]:
    """(begin, end) of what the assistant says in the whole text, turn by turn."""
    marked = [
      {**message, 'content': _around(message['content'])} if message['role'] == 'assistant' else message
      for message in messages
    ]
    text, said = _unmarked(self.template.render(marked, add_generation_prompt=False), SAID)
    if text != whole or said is None or len(said) != len(turns):
      raise RefusedError(f'changes what the assistant says, so that its place is not known; {ADVICE}')
    spans = []
    for number, (turn, (begin, end)) in enumerate(zip(turns, said, strict=True)):
      before = self.template.render(messages[:turn])
      if not whole.startswith(before) or len(before) > begin:
        raise RefusedError(
          f'writes the messages before message {turn + 1} in another way once that is there; {ADVICE}'
        )
      if number == 0:  # all turns are alike in this
        has_prompt = before != self.template.render(messages[:turn], add_generation_prompt=False)
        alone = self._alone(messages[: turn + 1], whole, end)
        has_end = self._special.search(whole, end, len(whole) if alone is None else alone) is not None
      elif not has_end:
        alone = self._alone(messages[: turn + 1], whole, end)
      limit = said[number + 1][0] if number + 1 < len(said) else len(whole)
      if has_end:
        found = self._special.search(whole, end, limit)
        end = found.end() if found else end
      elif alone is None:
        raise RefusedError(f'ends message {turn + 1} in no way that can be told; {ADVICE}')
      else:
        end = alone
      spans.append((len(before) if has_prompt else begin, end))
    return spans

  def _alone(self, messages: list[Message], whole: str, said: int) -> int | None:
    """Where the text of the messages ends if nothing follows them; None if that is no beginning of the whole."""
    text = self.template.render(messages, add_generation_prompt=False)
    return len(text) if whole.startswith(text) and len(text) >= said else None


def _around(content: str) -> str:
  """The content with SAID around it, within the spaces at its ends, which templates may strip."""
  stripped = content.strip()
  begin = content.index(stripped)
  return content[:begin] + SAID[0] + stripped + SAID[1] + content[begin + len(stripped) :]


def _unmarked(text: str, marks: tuple[str, str]) -> tuple[str, list[tuple[int, int]] | None]:
  """The text without a pair of marks, and (begin, end) of what stood between them; None if they are no pairs."""
  found: list[tuple[str, int]] = []
  parts: list[str] = []
  last = 0
  for match in re.finditer('|'.join(marks), text):
    parts.append(text[last : match.start()])
    found.append((match.group(), match.start() - len(found)))
    last = match.end()
  pairs = list(zip(found[::2], found[1::2], strict=False))
  text = ''.join([*parts, text[last:]])
  if len(found) % 2 or any((begin, end) != marks for (begin, _), (end, _) in pairs):
    return text, None
  return text, [(begin, end) for (_, begin), (_, end) in pairs]
