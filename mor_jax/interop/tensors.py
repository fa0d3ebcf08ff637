"""Reads and writes files of named tensors, one tensor at a time: safetensors, and PyTorch if it is installed.

A checkpoint is a file, or a folder with one file or with several files and an index.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import safetensors

from mor_jax.config import ConfigError
from mor_jax.files import parse_json
from mor_jax.interop.names import Table

SAFETENSORS, TORCH = 'model.safetensors', 'pytorch_model.bin'
SHARD_BYTES = 5 * 10**9
DTYPES = {
  'F32': np.dtype(np.float32),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'F16': np.dtype(np.float16),
  'F64': np.dtype(np.float64),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class Tensors(Protocol):
  """Named tensors that are loaded only when read.

  Attributes:
    where: name of the source, for messages.
    specs: shape and dtype name (as in safetensors) of every tensor.
  """

  where: str
  specs: Mapping[str, tuple[tuple[int, ...], str]]

  def read(self, name: str) -> np.ndarray:
    """One tensor."""


class Held:
  """Tensors that are already in memory."""

  def __init__(self, tensors: Mapping[str, np.ndarray], where: str):
    self.where = where
    self._tensors = tensors
    self.specs = {
      name: (tensor.shape, _CODES.get(tensor.dtype, str(tensor.dtype))) for name, tensor in tensors.items()
    }

  def read(self, name: str) -> np.ndarray:
    """One tensor."""
    return self._tensors[name]


def open_tensors(path: str | Path) -> Tensors:
  """Opens the tensors of a file or a folder.

  Raises:
    ConfigError: there are no tensors; a file is missing, damaged or truncated; or index and files disagree.
  """
  path = Path(path)
  if path.is_file():
    return _open([path], str(path))
  for name in (SAFETENSORS, TORCH):
    index = path / f'{name}.index.json'
    if (path / name).is_file():  # an index beside it is of something else
      return _open([path / name], str(path))
    if index.is_file():
      return _open_indexed(path, index)
  raise ConfigError(
    f'{path} has no weights: neither {SAFETENSORS} nor {TORCH}, nor an index of several files'
  )


def _open_indexed(folder: Path, index: Path) -> Tensors:
  try:
    weight_map = parse_json(index.read_text(encoding='utf-8'))['weight_map']
    files = sorted(set(weight_map.values()))
    strange = [name for name in files if name != Path(name).name or name in ('', '.', '..') or '\0' in name]
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise ConfigError(f'{index} cannot be read ({error})') from None
  if strange or not files:
    raise ConfigError(
      f'{index} cannot be read ({f"{strange[0]!r} is no file of this folder" if strange else "it lists no files"})'
    )
  if missing := [name for name in files if not (folder / name).is_file()]:
    raise ConfigError(f'{folder} lacks the files {", ".join(missing)}, which {index.name} lists')
  tensors = _open([folder / name for name in files], str(folder))
  wrong = [f'{name} is not in {file}' for name, file in weight_map.items() if name not in tensors.specs]
  wrong += [f'{name} is not in {index.name}' for name in tensors.specs if name not in weight_map]
  if wrong:
    raise ConfigError(f'{folder}: {index.name} and the files disagree: {"; ".join(wrong)}')
  return tensors


def _open(files: list[Path], where: str) -> Tensors:
  is_torch = files[0].suffix in ('.bin', '.pt', '.pth')
  return _open_torch(files, where) if is_torch else _SafetensorsFiles(files, where)


class _SafetensorsFiles:
  """Reopens the file for every tensor, because pages of a mapped file count as memory until it is closed."""

  def __init__(self, files: list[Path], where: str):
    self.where = where
    self.specs: dict[str, tuple[tuple[int, ...], str]] = {}
    self._file_of: dict[str, Path] = {}
    for path in files:
      try:
        with safetensors.safe_open(path, framework='numpy') as file:
          for name in file.keys():  # noqa: SIM118 (no dict)
            part = file.get_slice(name)
            self.specs[name] = tuple(part.get_shape()), part.get_dtype()
            self._file_of[name] = path
      except (safetensors.SafetensorError, OSError) as error:
        raise ConfigError(f'{path} cannot be read ({error}); it may be truncated: fetch it again') from None

  def read(self, name: str) -> np.ndarray:
    with safetensors.safe_open(self._file_of[name], framework='numpy') as file:
      return file.get_tensor(name)


def _open_torch(files: list[Path], where: str) -> Tensors:
  """Opens state dicts written by torch.save, at the top level or under a key commonly used by trainers."""
  try:
    import torch
  except ImportError:
    raise ConfigError(
      f'{files[0]} is a PyTorch file, which only torch can read: pip install torch, or use safetensors'
    ) from None
  tensors: dict[str, Any] = {}
  for path in files:
    try:
      content = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except Exception as error:  # pickle, zip and runtime errors, each with its own class
      reason = str(error).strip().splitlines()[0]
      raise ConfigError(f'{path} cannot be read as a PyTorch state dict ({reason})') from None
    for key in ('state_dict', 'model_state_dict', 'model', 'module'):
      if isinstance(content, dict) and isinstance(content.get(key), dict):
        content = content[key]
    strange = not isinstance(content, dict) or [k for k, v in content.items() if not torch.is_tensor(v)]
    if strange:
      raise ConfigError(
        f'{path} holds no state dict: {strange if isinstance(strange, list) else type(content)}'
      )
    tensors |= content
  return _TorchTensors(tensors, where)


class _TorchTensors:
  """Tensors of memory-mapped PyTorch files."""

  def __init__(self, tensors: Mapping[str, Any], where: str):
    names = {'float32': 'F32', 'bfloat16': 'BF16', 'float16': 'F16', 'float64': 'F64'}
    self.where = where
    self._tensors = tensors
    self.specs = {}
    for name, tensor in tensors.items():
      dtype = str(tensor.dtype).removeprefix('torch.')
      self.specs[name] = tuple(tensor.shape), names.get(dtype, dtype)

  def read(self, name: str) -> np.ndarray:
    tensor = self._tensors[name].detach().contiguous()
    if self.specs[name][1] != 'BF16':  # NumPy lacks bfloat16
      return tensor.numpy()
    import torch

    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


# ---- writing ----


def write_safetensors(
  folder: Path,
  table: Table,
  shapes: Mapping[str, tuple[int, ...]],
  dtypes: Mapping[str, np.dtype],
  leaves: Iterable[tuple[str, np.ndarray]],
  shard_bytes: int | None = None,
) -> None:
  """Writes our leaves under the table's names, one at a time. Several files get an index.

  The `safetensors` library needs all tensors of a file in memory. This function writes the file headers
  first, and then each tensor at its offset.

  Args:
    folder: an existing folder without weights.
    shapes, dtypes: shape and dtype of each leaf by path.
    leaves: (path, array) of all leaves in the table, in any order.
    shard_bytes: maximum size of a file; default SHARD_BYTES.
  """
  sizes = {
    name: int(np.prod(shapes[place.leaf] if place.index is None else shapes[place.leaf][1:]))
    * dtypes[place.leaf].itemsize
    for name, place in table.items()
  }
  shards = _split(sizes, shard_bytes or SHARD_BYTES)
  where: dict[str, tuple[Path, int]] = {}
  for number, names in enumerate(shards, start=1):
    name = SAFETENSORS if len(shards) == 1 else f'model-{number:05d}-of-{len(shards):05d}.safetensors'
    where |= _write_head(
      folder / name,
      {n: (table[n].shape(shapes[table[n].leaf]), dtypes[table[n].leaf], sizes[n]) for n in names},
    )
  places: dict[str, list[str]] = {}
  for name, place in table.items():
    places.setdefault(place.leaf, []).append(name)
  for path, leaf in leaves:
    for name in places.pop(path):
      file, offset = where[name]
      with file.open('r+b') as stream:
        stream.seek(offset)
        stream.write(np.ascontiguousarray(table[name].cut(leaf)).view(np.uint8).data)
  if places:
    raise ValueError(f'leaves that did not come: {", ".join(places)}')
  if len(shards) > 1:
    weight_map = {name: file.name for name, (file, _) in where.items()}
    index = {'metadata': {'total_size': sum(sizes.values())}, 'weight_map': weight_map}
    (folder / f'{SAFETENSORS}.index.json').write_text(json.dumps(index, indent=2) + '\n')


def _split(sizes: Mapping[str, int], most: int) -> list[list[str]]:
  shards: list[list[str]] = [[]]
  filled = 0
  for name, size in sizes.items():
    if filled and filled + size > most:
      shards.append([])
      filled = 0
    shards[-1].append(name)
    filled += size
  return shards


def _write_head(
  path: Path, tensors: Mapping[str, tuple[tuple[int, ...], np.dtype, int]]
) -> dict[str, tuple[Path, int]]:
  """Creates a file of its final size and returns the offset of each tensor."""
  head: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  end, begins = 0, {}
  for name, (shape, dtype, size) in tensors.items():
    begins[name] = end
    head[name] = {'dtype': _CODES[dtype], 'shape': list(shape), 'data_offsets': [end, end := end + size]}
  text = json.dumps(head, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)  # data begins aligned
  with path.open('wb') as stream:
    stream.write(len(text).to_bytes(8, 'little') + text)
    stream.truncate(8 + len(text) + end)
  return {name: (path, 8 + len(text) + begin) for name, begin in begins.items()}
