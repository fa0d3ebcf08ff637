"""Embedded conversations: questions about the standard library, with the answers that its docstrings give.

Like the embedded corpus they need no network and differ between Python versions. A system message, which questions are
asked and how many in one conversation are decided by hashes of the names, so they are always the same.
"""

import platform
import re
from collections.abc import Iterator
from typing import NamedTuple

from mor_jax.data import embedded
from mor_jax.data.document import Document, uniform_hash
from mor_jax.data.messages import Conversation, Message

SYSTEM = "You answer questions about Python's standard library in one sentence."
WITH_SYSTEM = 0.25  # share of the conversations
MOST_SUBJECTS = 3  # in a conversation
_SHORTEST, _LONGEST = 3, 60  # words of an answer

_WHAT = (
  'What does {name} do?',
  'What is {name} for?',
  'Explain {name} in one sentence.',
  'Tell me what {name} does.',
)
_AND = ('And {name}?', 'What about {name}?', 'And what does {name} do?')
_WHERE = ('Which module is it in?', 'Where is it defined?', 'What do I import for it?')
_HOW = ('How is {name} called?', 'Which arguments does {name} take?', 'Show me the signature of {name}.')


class Subject(NamedTuple):
  """What is asked about."""

  name: str  # as one writes it: textwrap.dedent
  module: str
  signature: str  # dedent(text); of classes their bases; of modules ''
  answer: str


class EmbeddedQuestions:
  """Conversations of one to three subjects each, in an order of which any prefix is representative."""

  total_bytes: int | None = None
  bytes_read = 0

  def fingerprint(self) -> str:
    """The version of Python, which determines the content."""
    return f'questions-python{platform.python_version()}'

  def records(self) -> Iterator[Document]:
    """Yields all conversations. Those about one module share it as their origin.

    Raises:
      ConfigError: this Python installation does not contain the texts.
    """
    folder, files = embedded.library()
    for file in sorted(files, key=lambda file: uniform_hash('order', file)):
      subjects = list(_subjects(embedded.library_source(folder, file), embedded.module_name(file)))
      while subjects:
        key = f'{file} {subjects[0].name}'
        count = 1 + int(uniform_hash('subjects', key) * MOST_SUBJECTS)
        chosen, subjects = subjects[:count], subjects[count:]
        yield Document(f'questions/{key}', _conversation(chosen, key).to_text(), origin=file)


def _subjects(source: str, module: str) -> Iterator[Subject]:
  for heading, text in embedded.documented(source, module):
    kind, _, rest = heading.partition(' ')
    signature = '' if kind == 'Module' else heading
    name = re.split(r'[(:]', rest if kind in ('Module', 'class') else heading)[0]
    if any(part.startswith('_') for part in name.split('.')):
      continue
    answer = _first_sentence(text)
    if answer:
      yield Subject(name if kind == 'Module' else f'{module}.{name}', module, signature, answer)


def _first_sentence(text: str) -> str:
  """The first sentence of a docstring; '' where it has none, such as a signature or an example."""
  paragraph = ' '.join(text.strip().partition('\n\n')[0].split())
  sentence = re.split(r'(?<=[.!?])\s', paragraph)[0]
  is_prose = sentence[:1].isupper() and not any(sign in sentence for sign in ('->', '>>>', '::', '--'))
  return sentence if is_prose and _SHORTEST <= len(sentence.split()) <= _LONGEST else ''


def _conversation(subjects: list[Subject], key: str) -> Conversation:
  messages: list[Message] = []
  if uniform_hash('system', key) < WITH_SYSTEM:
    messages.append({'role': 'system', 'content': SYSTEM})
  for number, subject in enumerate(subjects):
    name = subject.name
    _ask(messages, _AND if number else _WHAT, f'{key} {name}', name, subject.answer)
    more = uniform_hash('more', f'{key} {name}')
    if more < 0.2 and subject.signature:
      _ask(messages, _WHERE, name, name, f'It is in the module {subject.module}.')
    elif more < 0.4 and '(' in subject.signature:
      _ask(messages, _HOW, name, name, subject.signature)
  return Conversation(messages)


def _ask(messages: list[Message], ways: tuple[str, ...], key: str, name: str, answer: str) -> None:
  way = ways[int(uniform_hash('way', key) * len(ways))]
  messages.append({'role': 'user', 'content': way.format(name=name)})
  messages.append({'role': 'assistant', 'content': answer})
