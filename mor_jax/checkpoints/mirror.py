"""Copies of a run's finished checkpoints on a file system that Orbax cannot write to, such as s3://.

Orbax writes in the run folder, and what is finished there is copied file by file through etils' epath, the
manifest last. So what has a manifest in the mirror is complete, as on disk. A machine that has lost its disk
takes from the mirror what its run folder lacks.
"""

import shutil
import uuid
from collections.abc import Iterator
from concurrent import futures

from etils import epath

from mor_jax.checkpoints import integrity
from mor_jax.config import ConfigError
from mor_jax.errors import RunError

AT_ONCE = 16  # files copied; object stores answer slowly, and many at a time
PIECE = 2**24  # bytes in memory for each of them
DIRECT = 'gs'  # the scheme that Orbax writes to itself
_PACKAGES = {'gs': "'mor_jax[cloud]'", 's3': 's3fs', 'az': 'adlfs', 'hf': 'huggingface_hub'}
_SET_ASIDE = f'{integrity.MANIFEST}.damaged'  # name of the manifest of a damaged copy


class Mirror:
  """The checkpoints under a folder, which are copies of those with the same names under another.

  Args:
    folder: of the copies; anything that epath takes.
    original: where Orbax writes.
  """

  def __init__(self, folder: epath.PathLike, original: epath.PathLike):
    self._folder, self._original = epath.Path(folder), epath.Path(original)

  @property
  def steps(self) -> list[int]:
    """Steps of the complete copies, ascending."""
    if not self._folder.is_dir():
      return []
    found = [path for path in self._folder.iterdir() if path.name.isdigit()]
    return sorted(int(path.name) for path in found if (path / integrity.MANIFEST).exists())

  def path(self, step: int) -> epath.Path:
    """Folder of the copy of a step."""
    return self._folder / str(step)

  def ever_finished(self) -> bool:
    """Whether a copy was ever complete, even one that turned out to be damaged."""
    if not self._folder.is_dir():
      return False
    manifests = (integrity.MANIFEST, _SET_ASIDE)
    folders = [path for path in self._folder.iterdir() if path.name.isdigit()]
    return any((folder / name).exists() for folder in folders for name in manifests)

  def upload(self, step: int) -> None:
    """Copies a finished checkpoint. Raises what the file system raises; the copy is then incomplete."""
    source, target = self._original / str(step), self.path(step)
    self.remove(step)  # what an earlier attempt left
    files = [path for path in _files(source) if path.name != integrity.MANIFEST]
    _copy(source, target, files)
    _copy(source, target, [source / integrity.MANIFEST])

  def fetch(self, step: int) -> None:
    """Copies one back, which has its name there once it is complete. Raises RunError if that fails."""
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
    """A damaged copy counts as complete no more, and none is renamed: object stores copy for that."""
    manifest = self.path(step) / integrity.MANIFEST
    manifest.with_name(_SET_ASIDE).write_bytes(manifest.read_bytes())
    manifest.unlink()

  def remove(self, step: int) -> None:
    """Removes a copy, if there is one; its manifest first, so that nothing half-removed counts."""
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
  """Copies files of a folder into another one, at the same places."""
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
  """'gs' of gs://BUCKET/FOLDER; None of a folder that the operating system knows."""
  return folder.partition('://')[0] if folder and '://' in folder else None


def check_folder(folder: str | None, writes: bool) -> None:
  """Finds out whether a folder with a scheme can be used.

  Args:
    folder: `checkpoint.folder`.
    writes: whether to write to it.

  Raises:
    ConfigError: etils does not know the scheme, or lacks a package for it.
    RunError: it does not answer, or cannot be written.
  """
  name = scheme(folder)
  if name is None:
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
