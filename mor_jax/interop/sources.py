"""Opens a model: the newest checkpoint of a run, a published folder, or a checkpoint of Hugging Face."""

from pathlib import Path

from mor_jax.config import ConfigError
from mor_jax.data.conventions import Conventions
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.interop import folders, huggingface, official, published
from mor_jax.interop.weights import Weights
from mor_jax.runs import stored


def is_run(path: Path) -> bool:
  """Whether a folder is a run folder of this package."""
  return has_settings(path, 'model', 'train')


def has_settings(folder: Path, *keys: str) -> bool:
  """Whether a folder has a config.json with all of these keys."""
  return (folder / 'config.json').is_file() and set(keys) <= set(folders.read_config(folder))


def open_model(path: str | Path, flag: str) -> tuple[Weights, Tokenizer | None, Conventions]:
  """Opens a run, a published folder or a checkpoint of Hugging Face: weights, leaf by leaf, tokenizer and conventions.

  Args:
    flag: flag to name in errors.

  Raises:
    ConfigError: the folder is none of them, or is unreadable.
  """
  path = Path(path)
  try:
    if is_run(path):
      run = stored.open_run(path)
      return run, run.tokenizer(), run.conventions()
    if published.is_published(path):
      opened = published.open_folder(path)
      return opened.weights, opened.texts.tokenizer, opened.texts.conventions
    if has_settings(path, official.OURS):
      raise ConfigError(f'{path} holds no vanilla model')
    return huggingface.open_folder(path)
  except ConfigError as error:
    raise ConfigError(f'{flag}={path}: {error}') from None
