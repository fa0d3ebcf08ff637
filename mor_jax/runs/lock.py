"""One live process for a folder."""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from mor_jax.errors import ConfigError
from mor_jax.files import made_for_now

NAME = 'in_use.lock'
_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


@contextlib.contextmanager
def exclusive(folder: Path, flag: str) -> Iterator[None]:
  """Keeps other processes out of a folder; the system lets go of it when the process ends, however it does.

  File systems without locks keep nobody out. A folder in which nothing but the lock was written is removed.

  Args:
    folder: made if there is none.
    flag: the setting that names it, for the message.

  Raises:
    ConfigError: another process uses the folder.
  """
  path = folder / NAME
  with made_for_now(folder):
    file = _locked(path, flag)
    try:
      file.truncate(0)
      file.write(f'process {os.getpid()} on {socket.gethostname()}')
      file.flush()
      yield
    finally:
      path.unlink(missing_ok=True)
      file.close()


def _locked(path: Path, flag: str) -> IO[str]:
  while True:
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      file = path.open('a+')
    except (FileNotFoundError, FileExistsError):
      if path.parent.is_file():
        raise
      continue  # its owner has just removed the folder
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      owner = file.read().strip() or 'another process'
      file.close()
      raise ConfigError(
        f'{flag}={path.parent} is in use by {owner}; wait for it to end, or choose another folder'
      ) from None
    except OSError as error:
      if error.errno not in _UNSUPPORTED:
        file.close()
        raise
    if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
      return file
    file.close()  # of a file that its owner has just removed
