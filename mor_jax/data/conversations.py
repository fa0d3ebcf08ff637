"""Whether documents are conversations, and what they go through then: modules that need jinja2, which texts do not."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from mor_jax.config import ConfigError, DataConfig
from mor_jax.data.document import Document, Unreadable
from mor_jax.data.tokenizer import Tokenizer

if TYPE_CHECKING:
  from mor_jax.data.chats import Chats
  from mor_jax.data.templates import Template


def find_template(data: DataConfig) -> 'Template':
  """The chat template of these settings. Raises ConfigError: there is none, or jinja2 is missing."""
  try:
    from mor_jax.data import templates
  except ImportError as error:
    raise ConfigError(
      f"data.format=chat needs the package {error.name}; run: pip install 'mor_jax[chat]'"
    ) from error
  return templates.find(data)


def open_chats(data: DataConfig, tokenizer: Tokenizer) -> 'Chats | None':
  """What conversations go through once they are read; None: documents are texts. Raises as `find_template`."""
  if data.format != 'chat':
    return None
  template = find_template(data)
  from mor_jax.data.chats import Chats

  return Chats(template, tokenizer)


def converter(chats: 'Chats | None') -> Callable[[Document], Document | Unreadable] | None:
  """What `corpus.Reading` makes of documents; None: nothing."""
  return None if chats is None else chats.document
