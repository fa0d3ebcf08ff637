"""Integrity of checkpoints: digests of all files, checked before a checkpoint is used.

Orbax does not verify payloads, so a flipped bit would load silently. When a checkpoint is complete on disk,
every process writes the digests of its files to `process_N.json`. The first process collects these and
publishes `manifest.json`, last and by rename. A checkpoint without a manifest was never finished.
"""

import hashlib
import json
import re
import time
from typing import Any

from etils import epath

from mor_jax.files import parse_json, write_atomically

MANIFEST = 'manifest.json'
PATIENCE = 600.0  # seconds for other processes to leave their digests
_SHARE = re.compile(r'process_(\d+)\.json')
_OWNER = re.compile(r'(?:^|[./])process_(\d+)(?:/|$)')

Digests = dict[str, list]  # path within the checkpoint -> [size in bytes, digest]


def write_share(folder: epath.Path, process: int, about: dict[str, Any]) -> None:
  """Writes the digests of this process's files, and `about`.

  Args:
    folder: folder of a checkpoint that is complete on disk.
    about: JSON of this process, such as its position in a data stream.
  """
  names = [name for name in _files(folder) if _owner(name) == process]
  share = {'files': _digests(folder, names), 'about': about}
  write_atomically(folder / f'process_{process}.json', json.dumps(share))


def publish(folder: epath.Path, num_processes: int, about: dict[str, Any]) -> None:
  """Waits for the digests of all processes, then marks the checkpoint as finished.

  Raises:
    TimeoutError: the digests of a process are missing.
  """
  begin = time.monotonic()
  shares = [folder / f'process_{process}.json' for process in range(num_processes)]
  while missing := [share.name for share in shares if not share.exists()]:
    if time.monotonic() - begin > PATIENCE:
      raise TimeoutError(f'{", ".join(missing)} did not appear in {folder} within {PATIENCE:.0f} s')
    time.sleep(0.05)
  files: Digests = {}
  for share in shares:
    text = share.read_text()
    files |= parse_json(text)['files']
    files[share.name] = [len(text.encode()), _digest(text.encode())]
  manifest = {'processes': num_processes, **about, 'files': dict(sorted(files.items()))}
  body = json.dumps(manifest, indent=1)
  write_atomically(folder / MANIFEST, json.dumps({'digest': _digest(body.encode()), 'manifest': body}))


def read_manifest(folder: epath.Path) -> dict[str, Any]:
  """Reads the manifest that `publish` wrote.

  Raises:
    ValueError: the manifest is missing or damaged; the message says which.
  """
  try:
    envelope = parse_json((folder / MANIFEST).read_text())
    body = envelope['manifest']
    if _digest(body.encode()) != envelope['digest']:
      raise ValueError('its digest differs')
    return parse_json(body)
  except FileNotFoundError:
    raise ValueError(f'it has no {MANIFEST}: its save was never finished') from None
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise ValueError(f'its {MANIFEST} is damaged ({error})') from None


def read_share(folder: epath.Path, process: int) -> dict[str, Any]:
  """Reads the `about` that a process passed to `write_share`."""
  return parse_json((folder / f'process_{process}.json').read_text())['about']


def problems(folder: epath.Path, part: int = 0, parts: int = 1) -> list[str]:
  """Lists the problems of a checkpoint; [] if it is intact.

  Several processes share the work: each checks every `parts`-th file, beginning with the `part`-th.
  """
  try:
    files: Digests = read_manifest(folder)['files']
  except ValueError as error:
    return [str(error)]
  found = []
  for name in list(files)[part::parts]:
    size, digest = files[name]
    path = folder / name
    try:
      if (actual := path.stat().length) != size:
        found.append(f'{name} has {actual:,} bytes instead of {size:,}')
      elif _file_digest(path) != digest:
        found.append(f'{name} has other content than was written')
    except FileNotFoundError:
      found.append(f'{name} is missing')
    except OSError as error:
      found.append(f'{name} cannot be read ({error.strerror})')
  return found


def _files(folder: epath.Path, prefix: str = '') -> list[str]:
  """Paths of all files of the checkpoint, without the manifest and `process_N.json`."""
  names = []
  for path in sorted(folder.iterdir()):
    if path.is_dir():
      names += _files(path, f'{prefix}{path.name}/')
    elif prefix or not (path.name.startswith(MANIFEST) or _SHARE.match(path.name)):
      names.append(f'{prefix}{path.name}')
  return names


def _owner(name: str) -> int:
  """The process that wrote a file. Orbax puts its number in the path; the first process writes shared files."""
  match = _OWNER.search(name)
  return int(match[1]) if match else 0


def _digests(folder: epath.Path, names: list[str]) -> Digests:
  return {name: [(folder / name).stat().length, _file_digest(folder / name)] for name in names}


def _file_digest(path: epath.Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _digest(content: bytes) -> str:
  return hashlib.blake2b(content, digest_size=16).hexdigest()
