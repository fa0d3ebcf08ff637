"""Records of conversations: three ways to write them, one that is kept."""

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

from mor_jax.data.document import Document, Unreadable

FORMS = {
  'messages': ('messages',),
  'prompt and completion': ('prompt', 'completion'),
  'conversations': ('conversations',),
}
"""Keys of a record by the way it is written."""
COLUMNS = tuple(key for keys in FORMS.values() for key in keys)
MEANT = ('system', 'tools', 'functions')
"""Keys beside a conversation that change it, so that passing over them would not do."""

ROLES = ('system', 'user', 'assistant', 'tool')
SHARED = {'human': 'user', 'gpt': 'assistant', **{role: role for role in ROLES}}
"""Roles by their names in ShareGPT's form."""
BEFORE = {
  'system': (None,),
  'user': (None, 'system', 'assistant'),
  'assistant': ('user', 'tool'),
  'tool': ('assistant', 'tool'),
}
"""Which roles may come before a role; None: it begins."""

ROLE_AND_CONTENT, FROM_AND_VALUE = ('role', 'content'), ('from', 'value')

Message = dict[str, str]
"""'role', one of ROLES, and 'content'."""


class _BadError(Exception):
  """Why a record is no conversation."""


@dataclasses.dataclass(frozen=True)
class Conversation:
  """Messages, and from which of them on the assistant's are learned."""

  messages: list[Message]
  first: int = 0

  def to_text(self) -> str:
    """The text of its document: equal conversations have equal texts."""
    return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

  @classmethod
  def from_text(cls, text: str) -> 'Conversation':
    """As `to_text` wrote it."""
    return cls(**json.loads(text))

  @property
  def contents(self) -> Iterable[str]:
    """What all messages say."""
    return (message['content'] for message in self.messages)


def of_record(where: str, record: Any) -> Document | Unreadable:
  """The conversation of an object, as a document of its `to_text`."""
  try:
    text = _conversation(record).to_text()
    text.encode()
    return Document(where, text)
  except _BadError as bad:
    return Unreadable(where, str(bad))
  except UnicodeEncodeError:  # half a surrogate pair
    return Unreadable(where, 'not UTF-8')


def _conversation(record: Any) -> Conversation:
  if not isinstance(record, dict):
    raise _BadError('not an object with a conversation')
  given = {key for key, value in record.items() if value is not None}
  forms = [name for name, keys in FORMS.items() if given.issuperset(keys)]
  if not forms:
    raise _BadError(
      f'none of {", or ".join(FORMS)} (it has {", ".join(sorted(map(str, given))) or "nothing"})'
    )
  if len(forms) > 1:
    raise _BadError(f'{" beside ".join(forms)}, of which only one may be there')
  for key in MEANT:
    if record.get(key):
      raise _BadError(f'{key!r} beside {forms[0]}, which is not understood; write it as a message')
  if forms == ['prompt and completion']:
    prompt, completion = record['prompt'], record['completion']
    if isinstance(prompt, str) and isinstance(completion, str):
      prompt, completion = [_message('user', prompt, 1)], [_message('assistant', completion, 2)]
    elif isinstance(prompt, list) and isinstance(completion, list):
      prompt, completion = _messages(prompt, ROLE_AND_CONTENT), _messages(completion, ROLE_AND_CONTENT)
    else:
      raise _BadError('prompt and completion are neither two texts nor two lists of messages')
    found = Conversation([*prompt, *completion], len(prompt))
  elif forms == ['messages']:
    found = Conversation(_messages(record['messages'], ROLE_AND_CONTENT))
  else:
    found = Conversation(_messages(record['conversations'], FROM_AND_VALUE))
  _check(found)
  return found


def _messages(given: Any, keys: tuple[str, str]) -> list[Message]:
  if not isinstance(given, list):
    raise _BadError('not a list of messages')
  found = []
  for number, one in enumerate(given, start=1):
    if not isinstance(one, dict):
      raise _BadError(f'message {number} is no object')
    told = {key: value for key, value in one.items() if value is not None}
    if unknown := sorted(map(str, told.keys() - set(keys))):
      raise _BadError(f'message {number} has the unknown key {unknown[0]!r} beside {keys[0]} and {keys[1]}')
    role, content = (told.get(key) for key in keys)
    known = SHARED if keys == FROM_AND_VALUE else {name: name for name in ROLES}
    if not isinstance(role, str) or role not in known:
      raise _BadError(f'message {number} has {keys[0]}={role!r}, which is not one of {", ".join(known)}')
    found.append(_message(known[role], content, number))
  return found


def _message(role: str, content: Any, number: int) -> Message:
  if not isinstance(content, str) or not content.strip():
    raise _BadError(f'message {number} ({role}) has no content')
  return {'role': role, 'content': content}


def _check(conversation: Conversation) -> None:
  before = None
  for number, message in enumerate(conversation.messages, start=1):
    role = message['role']
    if before not in BEFORE[role]:
      after = f'after {before}' if before else 'at the beginning'
      raise _BadError(f'roles out of order: message {number} is of {role} {after}')
    before = role
  if not any(message['role'] == 'assistant' for message in conversation.messages[conversation.first :]):
    raise _BadError('the assistant says nothing')
