"""Prepared conversations, for tests."""

import json
from pathlib import Path

from mor_jax.config import DataConfig

BYTES = {'tokenizer': 'bytes', 'separator': '<|endoftext|>'}
ROLES = (
  "{% for m in messages %}{{ m.role + '\n' + m.content + (eos_token if m.role == 'assistant' else '') + '\n' }}"
  "{% endfor %}{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
)


def write(folder: Path, conversations) -> str:
  lines = (json.dumps({'messages': conversation}) for conversation in conversations)
  (folder / 'chats.jsonl').write_text('\n'.join(lines) + '\n')
  (folder / 'template.jinja').write_text(ROLES)
  return f'files:{folder}/chats.jsonl'


def turn(number: int, length: int) -> list[dict]:
  """A conversation of one turn: 16 tokens of bytes, and what is asked and answered."""
  asked, answer = f'{number:03}' + 'q' * length, f'{number:03}' + 'a' * length
  return [{'role': 'user', 'content': asked}, {'role': 'assistant', 'content': answer}]


def settings(folder: Path) -> DataConfig:
  """Two hundred conversations in a folder."""
  source = write(folder, [turn(number, number % 17) for number in range(200)])
  return DataConfig(
    source=source,
    format='chat',
    chat_template=f'{folder}/template.jinja',
    seq_len=64,
    validation_fraction=0.2,
    cache_dir=str(folder / 'cache'),
    **BYTES,
  )
