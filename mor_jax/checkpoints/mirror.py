"""Copies of a run's finished checkpoints on a file system that Orbax cannot write to, such as s3://.

Orbax writes to the run folder. Finished checkpoints are copied file by file with etils' epath, the manifest
last, so that a copy with a manifest is complete. A machine that has lost its disk fetches the missing
checkpoints from the mirror.
"""

import shutil
import uuid
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

from etils import epath

from mor_jax.checkpoints import integrity
from mor_jax.config import ConfigError
from mor_jax.errors import RunError
from mor_jax.files import require_writable

AT_ONCE = 16  # files copied; object stores answer slowly, and many at a time
PIECE = 2**24  # bytes in memory for each of them
DIRECT = 'gs'  # the scheme that Orbax writes to itself
_PACKAGES = {'gs': "'mor_jax[cloud]'", 's3': 's3fs', 'az': 'adlfs', 'hf': 'huggingface_hub'}
_SET_ASIDE = f'{integrity.MANIFEST}.damaged'  # name of the manifest of a damaged copy


class Mirror:
  """Copies of the checkpoints in another folder, under the same names.

  Args:
    folder: folder of the copies; any path that epath supports.
    original: folder that Orbax writes to.
  """

  def __init__(self, folder: epath.PathLike, original: epath.PathLike):
    self._folder, self._original = epath.Path(folder), epath.Path(original)

  @property
  def steps(self) -> list[int]:
    """Steps of the complete copies in ascending order."""
    if not self._folder.is_dir():
      return []
    found = [path for path in self._folder.iterdir() if path.name.isdigit()]
    return sorted(int(path.name) for path in found if (path / integrity.MANIFEST).exists())

  def path(self, step: int) -> epath.Path:
    """Folder of the copy of a step."""
    return self._folder / str(step)

  def ever_finished(self) -> bool:
    """Whether there was ever a complete copy, even if it is damaged now."""
    if not self._folder.is_dir():
      return False
    manifests = (integrity.MANIFEST, _SET_ASIDE)
    folders = [path for path in self._folder.iterdir() if path.name.isdigit()]
    return any((folder / name).exists() for folder in folders for name in manifests)

  def upload(self, step: int) -> None:
    """Copies a finished checkpoint. On a file system error the copy is incomplete and the error is raised."""
    source, target = self._original / str(step), self.path(step)
    self.remove(step)  # what an earlier attempt left
    files = [path for path in _files(source) if path.name != integrity.MANIFEST]
    _copy(source, target, files)
    _copy(source, target, [source / integrity.MANIFEST])

  def fetch(self, step: int) -> None:
    """Copies a checkpoint back to the original folder and renames it when complete. Raises RunError on failure."""
    source, target = self.path(step), self._original / str(step)
    partial = target.with_name(f'{step}.fetched')
    try:
      if partial.exists():
        partial.rmtree()
      _copy(source, partial, list(_files(source)))
      partial.rename(target)
    except Exception as error:  # of whatever library stands behind
      raise RunError(
        f'{source} cannot be copied to {target} ({type(error).__name__}: {error}); make room, or check the '
        f'credentials and the network'
      ) from error

  def set_aside(self, step: int) -> None:
    """Marks a copy as damaged by renaming its manifest only: object stores rename by copying."""
    manifest = self.path(step) / integrity.MANIFEST
    manifest.with_name(_SET_ASIDE).write_bytes(manifest.read_bytes())
    manifest.unlink()

  def remove(self, step: int) -> None:
    """Deletes a copy if it exists, its manifest first, so that a partly deleted copy is not complete."""
    folder = self.path(step)
    if (manifest := folder / integrity.MANIFEST).exists():
      manifest.unlink()
    if folder.is_dir():
      folder.rmtree()


def _files(folder: epath.Path) -> Iterator[epath.Path]:
  for path in folder.iterdir():
    if path.is_dir():
      yield from _files(path)
    else:
      yield path


def _copy(source: epath.Path, target: epath.Path, files: list[epath.Path]) -> None:
  """Copies files of a folder to the same relative paths in another folder."""
  pairs = [(path, target.joinpath(*path.relative_to(source).parts)) for path in files]
  for parent in {copy.parent for _, copy in pairs}:
    parent.mkdir(parents=True, exist_ok=True)
  with futures.ThreadPoolExecutor(AT_ONCE) as pool:
    for _ in pool.map(_copy_file, *zip(*pairs, strict=True)):
      pass


def _copy_file(path: epath.Path, copy: epath.Path) -> None:
  with path.open('rb') as read, copy.open('wb') as written:
    shutil.copyfileobj(read, written, PIECE)


# ---- folders with a scheme ----


def scheme(folder: str | None) -> str | None:
  """The URL scheme of a folder, such as 'gs' for gs://BUCKET/FOLDER; None for a local folder."""
  return folder.partition('://')[0] if folder and '://' in folder else None


def check_folder(folder: str | None, writes: bool) -> None:
  """Checks that a folder can be used.

  Args:
    folder: `checkpoint.folder`.
    writes: whether to test writing too.

  Raises:
    ConfigError: a local folder is not writable, etils does not support the scheme, or a package for it is missing.
    RunError: remote storage does not respond, or its folder is not writable.
  """
  name = scheme(folder)
  if name is None:
    if folder is not None and writes:
      require_writable(Path(folder), 'checkpoint.folder')
    return
  flag = f'checkpoint.folder={folder}'
  try:
    path = epath.Path(folder)
  except KeyError:
    raise ConfigError(
      f'{flag}: no file system is known by {name}://; use gs://, s3:// or az://, or mount this one and name the '
      f'folder where it is mounted'
    ) from None
  try:
    path.exists()
    if writes and name != DIRECT:
      _try_writing(path)
  except ImportError as error:
    package = _PACKAGES.get(name)
    raise ConfigError(
      f'{flag} cannot be reached: {error}' + (f'; pip install {package}' if package else '')
    ) from None
  except Exception as error:  # of whatever library stands behind: no such bucket, no credentials, no network
    raise RunError(
      f'{flag} cannot be reached ({type(error).__name__}: {error}); check the bucket, the credentials '
      f'and the network'
    ) from None


def _try_writing(folder: epath.Path) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  probe = folder / f'probe-{uuid.uuid4().hex}'
  probe.write_text('can this be written?')
  probe.unlink()
