"""Checkpoint folders of other libraries: config.json, weights and tokenizer, written completely or not at all."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mor_jax.config import ConfigError
from mor_jax.data.conventions import Conventions
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.files import new_folder, parse_json
from mor_jax.interop import tensors, vocabulary
from mor_jax.interop.names import Table
from mor_jax.interop.weights import Weights


def read_config(folder: Path) -> dict[str, Any]:
  """Reads the config.json of a folder. Raises ConfigError if it is missing or unreadable."""
  try:
    found = parse_json((folder / 'config.json').read_text(encoding='utf-8'))
  except (FileNotFoundError, NotADirectoryError):
    raise ConfigError(f'{folder} is not a checkpoint folder: it has no config.json') from None
  except (OSError, ValueError) as error:
    raise ConfigError(f'{folder}/config.json cannot be read ({error})') from None
  if not isinstance(found, dict):
    raise ConfigError(f'{folder}/config.json holds no JSON object')
  return found


def write(
  folder: str | Path,
  table: Table,
  weights: Weights,
  config: dict[str, Any],
  tokenizer: Tokenizer | None,
  conventions: Conventions | None = None,
  files: Mapping[str, str] | None = None,
) -> None:
  """Writes a folder. It is renamed when complete and deleted on failure.

  Args:
    files: texts of more files, by name.

  Raises:
    ConfigError: the folder exists, or the weights are invalid.
  """
  with new_folder(Path(folder)) as partial:
    tensors.write_safetensors(partial, table, weights.shapes, weights.dtypes, weights.leaves())
    (partial / 'config.json').write_text(json.dumps(config, indent=2) + '\n')
    if tokenizer is not None:
      vocabulary.write(partial, tokenizer, conventions)
    for name, text in (files or {}).items():
      (partial / name).write_text(text, encoding='utf-8')
