"""Chats as the model saw them in training: the chat template of its tokenizer, in a sandbox."""

import json
from typing import Any

from jinja2 import TemplateError
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mor_jax.config import ConfigError
from mor_jax.data.conventions import Conventions
from mor_jax.files import parse_json
from mor_jax.serving.errors import ApiError

CONFIG, SINGLE = 'tokenizer_config.json', 'chat_template.jinja'
TOKENS = ('bos_token', 'eos_token', 'unk_token', 'pad_token')  # that templates refer to


class Template:
  """A chat template.

  Attributes:
    source: as it came.
  """

  def __init__(self, source: str, tokens: dict[str, str]):
    """Compiles it.

    Args:
      tokens: what templates know of special tokens, by name (TOKENS).

    Raises:
      ConfigError: it is no template.
    """
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals['raise_exception'] = _raise
    environment.filters['tojson'] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    try:
      self._template = environment.from_string(source)
    except TemplateError as error:
      raise ConfigError(f'the chat template cannot be read: {error}') from None
    self.source, self._tokens = source, tokens

  def render(self, messages: list[dict[str, Any]]) -> str:
    """The text of a chat, up to where the assistant begins. Raises ApiError if the template refuses the messages."""
    try:
      return self._template.render(messages=messages, add_generation_prompt=True, **self._tokens)
    except SecurityError as error:
      raise ApiError(400, f'the chat template does what it must not: {error}', 'messages') from None
    except (TemplateError, TypeError, ValueError) as error:
      raise ApiError(400, f'the chat template refuses these messages: {error}', 'messages') from None


def of(conventions: Conventions) -> Template | None:
  """The template that came with a model; None: none did. Raises ConfigError if it cannot be read."""
  config: Any = {}
  if CONFIG in conventions.files:
    try:
      config = parse_json(conventions.files[CONFIG])
    except ValueError as error:
      raise ConfigError(f'{CONFIG} cannot be read ({error})') from None
  config = config if isinstance(config, dict) else {}
  source = conventions.files.get(SINGLE) or config.get('chat_template')
  if isinstance(source, list):  # several, by name
    source = {entry.get('name'): entry.get('template') for entry in source}.get('default')
  if not source:
    return None
  tokens = {name: config.get(name) for name in TOKENS}
  named = {name: token.get('content') if isinstance(token, dict) else token for name, token in tokens.items()}
  return Template(source, {name: token or '' for name, token in named.items()})


def _raise(message: str) -> None:
  raise TemplateError(message)
