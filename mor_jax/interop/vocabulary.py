"""The tokenizer of a checkpoint folder of Hugging Face and what the folder says about texts, in and out."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mor_jax.config import ConfigError, ModelConfig
from mor_jax.data.conventions import SIDE_FILES, Conventions
from mor_jax.data.tokenizer import END_OF_TEXT, Tokenizer, read_backend
from mor_jax.files import parse_json
from mor_jax.interop import sentencepiece_model

LARGEST_SIDE_FILE = 2**20  # bytes
DEFAULT_POSITIONS = 2048


class Vocabulary(NamedTuple):
  """A tokenizer, None where the folder has none, and the conventions of its texts."""

  tokenizer: Tokenizer | None
  conventions: Conventions


def read(
  folder: Path,
  config: Mapping[str, Any],
  settings: ModelConfig,
  separator: str | None = None,
  path: Path | None = None,
) -> Vocabulary:
  """Reads the vocabulary of a checkpoint folder.

  Args:
    folder: with tokenizer.json or tokenizer.model, and any of SIDE_FILES.
    config: its config.json.
    settings: of the model, which must have an embedding for every id.
    separator: token that ends a document; None: <|endoftext|> where there is one, else the first that the folder
      names as the end of a text.
    path: a tokenizer elsewhere.

  Raises:
    ConfigError: the tokenizer cannot be used, names no end of a text, or has ids that the model has no embedding for.
  """
  files = dict(_side_files(folder))
  longest = config.get('max_position_embeddings')
  longest = longest if type(longest) is int and longest > 0 else None
  ends = list(dict.fromkeys(_end_ids(config, files)))
  path = path or tokenizer_file(folder)
  if path is None:
    return Vocabulary(None, Conventions(tuple(ends), longest, files))
  try:
    is_sentencepiece = path.suffix == '.model'
    backend = sentencepiece_model.read_backend(path) if is_sentencepiece else read_backend(path)
    named = _token_name(_json(files, 'tokenizer_config.json').get('eos_token'))
    if named and (index := backend.token_to_id(named)) is not None:
      ends.append(index)
    known = [name for index in ends if (name := backend.id_to_token(index)) is not None]
    if separator is None:
      separator = END_OF_TEXT if backend.token_to_id(END_OF_TEXT) is not None else next(iter(known), None)
    if separator is None:
      raise ValueError(
        f'it has no token for the end of a text: config.json names eos_token_id={config.get("eos_token_id")}; name '
        f'one with --separator'
      )
    tokenizer = Tokenizer(backend, separator)
  except ValueError as error:
    raise ConfigError(f'{path} cannot be used ({error})') from None
  check(tokenizer, settings, path)
  ends = [index for index in ends if index < tokenizer.vocab_size]
  return Vocabulary(
    tokenizer, Conventions(tuple(dict.fromkeys([tokenizer.end_of_text, *ends])), longest, files)
  )


def tokenizer_file(folder: Path) -> Path | None:
  """The tokenizer of a folder: its tokenizer.json, else its tokenizer.model; None: it has neither."""
  paths = (folder / 'tokenizer.json', folder / sentencepiece_model.NAME)
  return next((path for path in paths if path.exists()), None)


def check(tokenizer: Tokenizer, settings: ModelConfig, path: Path) -> None:
  """Raises ConfigError if the tokenizer has ids that the model has no embedding for."""
  if tokenizer.vocab_size > settings.vocab_size:
    raise ConfigError(
      f'{path} has {tokenizer.entries} entries with ids up to {tokenizer.vocab_size - 1}, the model only '
      f'{settings.vocab_size} embeddings: they do not belong together'
    )


def described(tokenizer: Tokenizer | None, conventions: Conventions | None) -> dict[str, Any]:
  """What config.json says about texts."""
  ends = conventions.ends if conventions else (tokenizer.end_of_text,) if tokenizer else ()
  return {
    'bos_token_id': tokenizer.begin_of_text if tokenizer else None,
    'eos_token_id': list(ends) if len(ends) > 1 else next(iter(ends), None),
    'max_position_embeddings': (conventions and conventions.max_positions) or DEFAULT_POSITIONS,
  }


def write(folder: Path, tokenizer: Tokenizer, conventions: Conventions | None) -> None:
  """Writes tokenizer.json and the files beside it: those that were there, else what `transformers` needs."""
  tokenizer.save(folder / 'tokenizer.json')
  tokens = {'eos_token': tokenizer.separator, 'bos_token': tokenizer.begin}
  about = {'tokenizer_class': 'PreTrainedTokenizerFast', **{name: t for name, t in tokens.items() if t}}
  files = {'tokenizer_config.json': json.dumps(about, indent=2) + '\n'}
  for name, text in (files | (conventions.files if conventions else {})).items():
    (folder / name).write_text(text, encoding='utf-8')


def _side_files(folder: Path) -> Iterator[tuple[str, str]]:
  for name in SIDE_FILES:
    path = folder / name
    try:
      if path.is_file() and path.stat().st_size <= LARGEST_SIDE_FILE:
        yield name, path.read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as error:
      raise ConfigError(f'{path} cannot be read ({error})') from None


def _json(files: Mapping[str, str], name: str) -> dict[str, Any]:
  """One of the files; {} where it is missing or no JSON object."""
  try:
    found = parse_json(files.get(name, '{}'))
  except ValueError:
    return {}
  return found if isinstance(found, dict) else {}


def _end_ids(config: Mapping[str, Any], files: Mapping[str, str]) -> Iterator[int]:
  for source in (config, _json(files, 'generation_config.json')):
    found = source.get('eos_token_id')
    for index in found if isinstance(found, list) else [found]:
      if type(index) is int and 0 <= index < 2**31:
        yield index


def _token_name(entry: Any) -> str | None:
  """The text of a token as tokenizer_config.json names it: as text, or as an object with its content."""
  name = entry.get('content') if isinstance(entry, dict) else entry
  return name if isinstance(name, str) else None
