"""Chats as the model sees them in training: the chat template of its tokenizer, in a sandbox."""

import hashlib
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from jinja2.exceptions import SecurityError

from mor_jax.config import ConfigError, DataConfig
from mor_jax.data import sandbox
from mor_jax.data import tokenizer as tokenizers
from mor_jax.data.conventions import CONFIG, CONVENTIONS, SIDE_FILES, SINGLE, Conventions
from mor_jax.files import parse_json

TOKENS = ('bos_token', 'eos_token', 'unk_token', 'pad_token')  # that templates refer to
LARGEST = 2**20  # characters of a template

_GENERATION = re.compile(r'{%[-+]?\s*generation\b')

Messages = Sequence[Mapping[str, Any]]


class RefusedError(Exception):
  """A template does not take these messages, or does what it must not. The text goes on from 'the chat template'."""


class Template:
  """A chat template.

  Attributes:
    source: as it came.
    tokens: what it knows of special tokens, by name (TOKENS).
    marks_generation: whether it says itself, by {% generation %}, what the assistant says.
  """

  def __init__(self, source: str, tokens: Mapping[str, str]):
    """Compiles it. Raises ConfigError: it is no template."""
    if len(source) > LARGEST:
      raise ConfigError(f'the chat template has {len(source):,} characters, more than {LARGEST:,}')
    self._environment = sandbox.Environment()
    try:
      self._template = self._environment.from_string(source)
    except (TemplateError, RecursionError, SyntaxError, ValueError) as error:
      raise ConfigError(f'the chat template cannot be read: {error}') from None
    self.source, self.tokens = source, dict(tokens)
    self.marks_generation = _GENERATION.search(source) is not None

  @property
  def digest(self) -> str:
    """SHA-256 of all that decides what it renders."""
    return hashlib.sha256(json.dumps([self.source, sorted(self.tokens.items())]).encode()).hexdigest()

  def render(self, messages: Messages, add_generation_prompt: bool = True) -> str:
    """The text of a chat, by default up to where the assistant begins. Raises RefusedError."""
    text = self.marked(messages, add_generation_prompt)
    for mark in sandbox.GENERATED:
      text = text.replace(mark, '')
    return text

  def marked(self, messages: Messages, add_generation_prompt: bool = False) -> str:
    """As `render`, with `sandbox.GENERATED` around what stands in {% generation %}. Raises RefusedError."""
    try:
      return self._environment.render(
        self._template,
        messages=[dict(message) for message in messages],
        add_generation_prompt=add_generation_prompt,
        **self.tokens,
      )
    except SecurityError as error:
      raise RefusedError(f'does what it must not: {error}') from None
    except (
      Exception
    ) as error:  # foreign code: a filter of a wrong type, a division by zero, too deep a recursion
      raise RefusedError(f'refuses these messages: {error}') from None


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
    entries = [entry for entry in source if isinstance(entry, dict)]
    source = {entry.get('name'): entry.get('template') for entry in entries}.get('default')
  if not source:
    return None
  if not isinstance(source, str):
    raise ConfigError(f'the chat_template of {CONFIG} is no text')
  return Template(source, _tokens(config))


def _tokens(config: Mapping[str, Any]) -> dict[str, str]:
  tokens = {name: config.get(name) for name in TOKENS}
  named = {name: token.get('content') if isinstance(token, dict) else token for name, token in tokens.items()}
  return {name: token if isinstance(token, str) else '' for name, token in named.items()}


def find(data: DataConfig) -> Template:
  """The template of `data.chat_template`, or else the one that came with `data.tokenizer`.

  Raises:
    ConfigError: there is none, or it cannot be read.
  """
  files = {} if data.tokenizer in tokenizers.MADE_HERE else _side_files(tokenizers.existing_file(data), data)
  if CONFIG not in files:  # a tokenizer made here, or a bare tokenizer.json
    named = {'eos_token': data.separator, 'bos_token': tokenizers.begin_of(data)}
    files[CONFIG] = json.dumps({name: token for name, token in named.items() if token})
  try:
    if data.chat_template:
      files[SINGLE] = _read(pathlib.Path(data.chat_template).expanduser())
    template = of(Conventions((), None, files))
  except (ConfigError, OSError, UnicodeDecodeError) as error:
    flag = (
      f'data.chat_template={data.chat_template}' if data.chat_template else f'data.tokenizer={data.tokenizer}'
    )
    raise ConfigError(f'{flag} cannot be used: {error}') from None
  if template is None:
    raise ConfigError(
      f'data.format=chat needs a chat template, and data.tokenizer={data.tokenizer} came with none (neither '
      f'{SINGLE} nor chat_template in {CONFIG}): name a file of jinja with data.chat_template, such as '
      f'configs/chat_template.jinja'
    )
  return template


def _read(path: pathlib.Path) -> str:
  """The template in a file, or in the folder of a run or a model. Raises ConfigError, OSError, UnicodeDecodeError."""
  if not path.is_dir():
    return path.read_text(encoding='utf-8')
  template = of(Conventions((), None, _side_files(path / 'tokenizer.json')))
  if template is None:
    raise ConfigError('the folder has no template')
  return template.source


def _side_files(tokenizer: pathlib.Path, data: DataConfig | None = None) -> dict[str, str]:
  """What lies beside a tokenizer.json, by name: as Hugging Face's files, or in a run folder. Raises ConfigError.

  Args:
    data: where the tokenizer may have come from the Hub.
  """
  try:
    beside = tokenizer.with_name(CONVENTIONS)
    if beside.is_file():
      return dict(Conventions.from_json(parse_json(beside.read_text(encoding='utf-8'))).files)
    found = {}
    for name in SIDE_FILES:
      file = _file_beside(tokenizer, name, data)
      if file is not None and file.stat().st_size <= LARGEST:
        found[name] = file.read_text(encoding='utf-8')
    return found
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise ConfigError(f'what lies beside {tokenizer} cannot be read ({error})') from None


def _file_beside(path: pathlib.Path, name: str, data: DataConfig | None = None) -> pathlib.Path | None:
  """A file beside a tokenizer.json, in its folder or, of the `tokenizer.existing_file` of `data`, on the Hub; None: there is none.

  Raises ConfigError if the Hub cannot be asked.
  """
  beside = path.with_name(name)
  if beside.is_file():
    return beside
  if data is None or pathlib.Path(data.tokenizer).expanduser().exists():
    return None
  import huggingface_hub  # the tokenizer came through it

  try:
    return pathlib.Path(huggingface_hub.hf_hub_download(data.tokenizer, name))
  except huggingface_hub.errors.EntryNotFoundError:
    return None
  except Exception as error:  # gated, cut off: the library's text says which
    raise ConfigError(
      f'data.tokenizer={data.tokenizer}: {name} cannot be downloaded ({type(error).__name__}: {error})'
    ) from error
