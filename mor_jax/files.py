"""Files and folders that are as they were or complete, whenever the process is killed; JSON that may be anything."""

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mor_jax.errors import ConfigError

ATTEMPTS = 20


def write_atomically(path: Path, text: str) -> None:
  """Writes a file, which has its old content or the new one. `path` may be an `etils.epath.Path`."""
  partial = path.with_name(f'{path.name}.partial')
  partial.write_text(text, encoding='utf-8')
  partial.replace(path)


def parse_json(text: str | bytes) -> Any:
  """`json.loads`, which raises ValueError for whatever is wrong, nesting without end included."""
  try:
    return json.loads(text)
  except RecursionError:
    raise ValueError('it is nested too deep') from None


@contextlib.contextmanager
def made_for_now(folder: Path) -> Iterator[None]:
  """The folder exists inside; afterwards it and the parents made for it are gone again if nothing is in them."""
  missing = [path for path in (folder, *folder.parents) if not path.exists()]
  for attempt in range(ATTEMPTS):
    try:
      folder.mkdir(parents=True, exist_ok=True)
      break
    except (FileExistsError, FileNotFoundError):  # another process removes what it has made in this way
      if folder.is_file() or attempt == ATTEMPTS - 1:
        raise
  try:
    yield
  finally:
    for path in missing:
      with contextlib.suppress(OSError):
        path.rmdir()


def require_writable(folder: Path, flag: str) -> None:
  """Creates a file in a folder and leaves all as it was. Permissions alone are not reliable (root, read-only disks).

  Raises:
    ConfigError: that is not possible; names the flag.
  """
  for attempt in range(ATTEMPTS):
    try:
      with made_for_now(folder), tempfile.TemporaryFile(dir=folder):
        return
    except OSError as error:
      problem = error.strerror
      if not isinstance(error, (FileNotFoundError, FileExistsError)) or folder.is_file():
        break
      time.sleep(0.01 * attempt)  # another process has just removed the folder that it had made in this way
  raise ConfigError(f'{flag}={folder} cannot be written ({problem}); choose another folder')


def require_new(folder: Path) -> None:
  """Raises ConfigError if there is something at the path of a folder to be written."""
  if folder.exists():
    raise ConfigError(f'{folder} exists; name a new folder, or remove it')


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
  """The folder to write to, which gets the name `folder` at the end; nothing stays of an unfinished one.

  Raises:
    ConfigError: the folder exists.
  """
  require_new(folder)
  partial = folder.with_name(f'{folder.name}.partial')
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  try:
    yield partial
    partial.rename(folder)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise
