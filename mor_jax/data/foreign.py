"""Guards against code in dataset folders: TFDS imports any module that features.json names."""

from collections.abc import Iterator
from typing import Any

from etils import epath

from mor_jax.errors import ConfigError
from mor_jax.files import parse_json

_FEATURES = 'features.json'
_CLASS_KEYS = ('pythonClassName', 'python_class_name', 'type')  # by age of the format
_OWN = 'tensorflow_datasets.core.features.'


def check_features(folder: epath.PathLike) -> None:
  """Checks a folder before `tfds.builder_from_directory` opens it.

  Raises:
    ConfigError: the folder is unreadable or names a class from outside TFDS.
  """
  path = epath.Path(folder) / _FEATURES
  if not path.exists():
    return  # TFDS has its own words for that
  try:
    named = list(_classes(parse_json(path.read_text())))
  except (OSError, ValueError) as error:
    raise ConfigError(f'{path} cannot be read ({error})') from None
  for name in named:
    if not name.startswith(_OWN):
      raise ConfigError(
        f'{path} names the class {name}, and importing it could run any code; only the features of TFDS itself '
        f'are read: prepare the dataset again with those'
      )


def _classes(node: Any) -> Iterator[str]:
  """Yields the class names anywhere in the JSON."""
  if isinstance(node, list):
    for item in node:
      yield from _classes(item)
  if isinstance(node, dict):
    for key, value in node.items():
      if key in _CLASS_KEYS and isinstance(value, str):
        yield value
      else:
        yield from _classes(value)
