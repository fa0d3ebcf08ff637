"""Kinds of damage to the newest checkpoint in a folder, as disks, networks and people cause it."""

import shutil
from collections.abc import Callable
from pathlib import Path

from mor_jax.checkpoints import integrity


def newest(folder: Path, rank: int = 1) -> Path:
  """The `rank`-th newest checkpoint in a folder of checkpoints."""
  return folder / str(sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())[-rank])


def payload(checkpoint: Path) -> Path:
  """The largest file, which holds most of the arrays."""
  return max((path for path in checkpoint.rglob('*') if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path: Path) -> None:
  """Flips one bit in the middle of a file."""
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def truncate(path: Path) -> None:
  """Removes the last byte of a file."""
  path.write_bytes(path.read_bytes()[:-1])


def _append(path: Path) -> None:
  path.write_bytes(path.read_bytes() + b'x')


def _foreign(folder: Path) -> None:
  """Overwrites the largest file with content of an older checkpoint, keeping its length."""
  target = payload(newest(folder))
  older = payload(newest(folder, rank=2)).read_bytes()
  size = target.stat().st_size
  target.write_bytes((older[::-1] * (size // len(older) + 1))[:size])


DAMAGE: dict[str, Callable[[Path], object]] = {
  'a flipped bit': lambda folder: flip(payload(newest(folder))),
  'a truncated file': lambda folder: truncate(payload(newest(folder))),
  'an empty file': lambda folder: payload(newest(folder)).write_bytes(b''),
  'a missing shard': lambda folder: payload(newest(folder)).unlink(),
  'a longer file': lambda folder: _append(payload(newest(folder))),
  'content of another step': _foreign,
  'other metadata': lambda folder: flip(newest(folder) / '_CHECKPOINT_METADATA'),
  'a missing index': lambda folder: (newest(folder) / 'state' / 'manifest.ocdbt').unlink(),
  'a missing folder': lambda folder: shutil.rmtree(newest(folder) / 'state'),
  'no manifest': lambda folder: (newest(folder) / integrity.MANIFEST).unlink(),
  'half a manifest': lambda folder: truncate(newest(folder) / integrity.MANIFEST),
  'a changed manifest': lambda folder: flip(newest(folder) / integrity.MANIFEST),
  'a changed position': lambda folder: (newest(folder) / 'process_0.json').write_text('{}'),
}
