"""Documents from dataset libraries: TFDS (without TensorFlow) and streamed Hugging Face `datasets`."""

import functools
import importlib.util
import os
import pathlib
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

from mor_jax.config import ConfigError
from mor_jax.data import foreign, identity, readers, revisions
from mor_jax.data.document import Document, Unreadable

PATIENCE = 15  # seconds after which the network counts as missing
RETRY_SECONDS = (1, 5, 15, 30)  # to wait before the next try when a stream breaks off
OFFLINE_REMEDY = (
  'connect, or read local files with data.source=files:PATTERN, or use data.source=embedded, which needs no '
  'network'
)

_TFDS_SERVER = 'https://storage.googleapis.com'
_TFDS_TEXT_GROUPS = ('text', 'question_answering', 'summarization', 'text_simplification', 'translate')
_TFDS_REMEDY = (
  'prepare it once where TensorFlow is installed, with tfds.builder(NAME, file_format="array_record")'
  '.download_and_prepare(), and give that folder as data.source=tfds:FOLDER/SPLIT/KEY'
)


class TfdsSource:
  """A split of a TFDS dataset: `NAME/SPLIT/KEY`, or `FOLDER/SPLIT/KEY` for a prepared one."""

  total_bytes: int | None = None
  bytes_read = 0

  def __init__(self, spec: str):
    """Raises ConfigError if `spec` isn't of that form."""
    self._name, _, rest = spec.rpartition('/')
    self._name, _, self._split = self._name.rpartition('/')
    self._key, self._spec = rest, spec
    if not (self._name and self._split and self._key):
      raise ConfigError(
        f'data.source=tfds:{spec} must have the form tfds:NAME/SPLIT/KEY, such as tfds:ag_news_subset/train/'
        f'description, or tfds:FOLDER/SPLIT/KEY'
      )

  def fingerprint(self) -> str:
    """The spec and, for a folder, its files."""
    folder = os.path.expanduser(self._name)
    if os.path.isdir(folder):
      return f'tfds-{identity.digest_of_folder(folder, self._split, self._key)}'
    return f'tfds-{identity.digest_of((), self._spec)}'

  def records(self) -> Iterator[Document | Unreadable]:
    """Yields the documents of the split. Prepares the dataset first if that needs no TensorFlow."""
    records = self._open()
    for index in range(len(records)):
      where = f'tfds:{self._name}/{self._split}, record {index}'
      yield readers.of_record(where, records[index], self._key)

  def _open(self) -> Any:
    import tensorflow_datasets as tfds

    builder = self._builder()
    splits = builder.info.splits
    if self._split not in splits:
      raise self._refused(f'has no split {self._split!r}; its splits are {", ".join(splits)}')
    if self._key not in (builder.info.features or {}):
      raise self._refused(
        f'has no feature {self._key!r}; its features are {", ".join(sorted(builder.info.features))}'
      )
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
      raise self._refused(
        f'is stored as {builder.info.file_format.value}, not as ArrayRecord; {_TFDS_REMEDY}'
      )
    return builder.as_data_source(self._split)

  def _builder(self) -> Any:
    import tensorflow_datasets as tfds

    folder = os.path.expanduser(self._name)
    if os.path.isdir(folder):
      try:
        foreign.check_features(folder)
        return tfds.builder_from_directory(folder)
      except Exception as error:  # TFDS raises its own kinds and those of its metadata readers
        raise self._refused(f'cannot be opened ({error})') from error
    try:
      builder = _registered_builder(self._name)
    except tfds.core.DatasetNotFoundError as error:
      raise self._refused(
        'is neither a folder nor a dataset that TFDS knows; see https://www.tensorflow.org/datasets/catalog '
        'for the names, or give the folder of a prepared dataset'
      ) from error
    except ImportError as error:
      raise self._refused(f'needs {error.name} to be built; {_TFDS_REMEDY}') from error
    if not builder.is_prepared():
      if isinstance(builder, tfds.core.BeamBasedBuilder) and not importlib.util.find_spec('apache_beam'):
        raise self._refused(f'needs apache_beam to be built; {_TFDS_REMEDY}')  # before it downloads for hours
      require_network(_TFDS_SERVER, f'data.source=tfds:{self._spec}')
      try:
        builder.download_and_prepare()
      except ImportError as error:
        raise self._refused(f'needs {error.name} to be built; {_TFDS_REMEDY}') from error
      except Exception as error:  # downloads, generators, Beam: anything may come
        raise self._refused(
          f'cannot be prepared here ({type(error).__name__}: {error}); {_TFDS_REMEDY}'
        ) from error
    return builder

  def _refused(self, why: str) -> ConfigError:
    return ConfigError(f'data.source=tfds:{self._spec}: {self._name} {why}')


def _registered_builder(name: str) -> Any:
  """The TFDS builder of that name. Raises DatasetNotFoundError or ImportError."""
  import tensorflow_datasets as tfds

  options = {'file_format': tfds.core.FileFormat.ARRAY_RECORD, 'try_gcs': False}
  try:
    return tfds.builder(name, **options)
  except tfds.core.DatasetNotFoundError:
    for group in _TFDS_TEXT_GROUPS:  # older builders, c4 and wiki40b among them, are known once imported
      importlib.import_module(f'tensorflow_datasets.{group}')
    return tfds.builder(name, **options)


class HuggingFaceSource:
  """A streamed dataset of the Hugging Face Hub or of a local folder: `DATASET[@REVISION][:CONFIG[:SPLIT]]`."""

  total_bytes: int | None = None
  bytes_read = 0

  def __init__(self, spec: str, form: readers.Form, notes: pathlib.Path):
    """Raises ConfigError if `spec` isn't of that form; see `revisions.current` for `notes`."""
    self._spec, self._form, self._notes = spec, form, notes
    self._read = form.key if isinstance(form, readers.Texts) else 'chat'
    name, config, split, *more = [*spec.split(':'), '', ''][: max(3, spec.count(':') + 1)]
    if not name or more:
      raise ConfigError(f'data.source=hf:{spec} must have the form hf:DATASET[@REVISION][:CONFIG[:SPLIT]]')
    self._name, self._config, self._split = os.path.expanduser(name), config or None, split or 'train'
    self._pinned = None
    if not os.path.isdir(self._name):
      self._name, _, self._pinned = self._name.partition('@')

  @functools.cached_property
  def _revision(self) -> str | None:
    """The commit that is read: the one that the spec names, or today's newest."""
    return self._pinned or revisions.current(self._name, self._notes)

  def fingerprint(self) -> str:
    """The spec and what is read; of a local folder its files, of a dataset of the Hub its revision."""
    if os.path.isdir(self._name):
      return f'hf-{identity.digest_of_folder(self._name, self._config, self._split, self._read)}'
    return f'hf-{identity.digest_of((), self._spec, self._read, self._revision)}'

  def records(self) -> Iterator[Document | Unreadable]:
    """Yields the documents of the stream."""
    read = failures = 0
    while True:
      try:
        for record in self._open().skip(read):
          yield self._form.of_record(f'hf:{self._spec}, record {read}', record)
          read, failures = read + 1, 0
        return
      except Exception as error:  # of the network, the file system, or the format: libraries raise their own
        if isinstance(error, ConfigError) and not read:
          raise
        if not read or os.path.isdir(self._name) or failures == len(RETRY_SECONDS):
          raise self._broken_off(error, read, failures) from error
        time.sleep(RETRY_SECONDS[failures])
        failures += 1

  def _broken_off(self, error: Exception, read: int, failures: int) -> ConfigError:
    """The error to raise after `read` records and `failures` failed retries."""
    remedy = 'run the same command again when the connection is back: it continues where it stopped'
    if os.path.isdir(self._name):
      remedy = 'fetch the folder again, or leave the damaged files out'
    where = f'cannot be read on after {read:,} records, {failures + 1} attempts' if read else 'cannot be read'
    return ConfigError(f'data.source=hf:{self._spec} {where} ({type(error).__name__}: {error}); {remedy}')

  def _saved(self, datasets: Any) -> Any:
    """What `save_to_disk` wrote: one split, or several."""
    found = datasets.load_from_disk(self._name)
    if isinstance(found, datasets.DatasetDict):
      if self._split not in found:
        raise ValueError(f'it has no split {self._split!r}; its splits are {", ".join(found)}')
      found = found[self._split]
    return found.to_iterable_dataset()

  def _open(self) -> Any:
    flag = f'data.source=hf:{self._spec}'
    try:
      import datasets
      import huggingface_hub
    except ImportError as error:
      raise ConfigError(f'{flag} needs the package {error.name}; run: pip install datasets') from error
    if not os.path.isdir(self._name):
      if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise ConfigError(f'{flag} needs the network, and HF_HUB_OFFLINE is set; {OFFLINE_REMEDY}')
      require_network(huggingface_hub.constants.ENDPOINT, flag)
    try:
      if _was_saved(self._name):
        return self._saved(datasets)
      revision = None if os.path.isdir(self._name) else self._revision
      settings = {'split': self._split, 'streaming': True, 'revision': revision}
      return datasets.load_dataset(self._name, self._config, **settings)
    except Exception as error:  # not found, gated, wrong config or split: the library's text says which
      raise ConfigError(f'{flag} cannot be opened ({type(error).__name__}: {error})') from error


def _was_saved(folder: str) -> bool:
  """Whether `save_to_disk` of `datasets` wrote the folder."""
  return any(os.path.isfile(os.path.join(folder, name)) for name in ('dataset_dict.json', 'state.json'))


def require_network(url: str, flag: str, remedy: str = OFFLINE_REMEDY, patience: float = PATIENCE) -> None:
  """Raises ConfigError, naming `flag`, unless a server answers at `url` within `patience` seconds.

  Any answer counts. Without this check, libraries retry for minutes. Proxies come from the environment.
  """
  answers: list[str | None] = []

  def ask() -> None:
    request = urllib.request.Request(url, method='HEAD')
    try:
      urllib.request.urlopen(request, timeout=patience).close()
    except urllib.error.HTTPError:
      pass  # an answer
    except OSError as error:
      answers.append(str(getattr(error, 'reason', error)))
      return
    answers.append(None)

  thread = threading.Thread(target=ask, daemon=True)  # looking up a name has no time limit of its own
  thread.start()
  thread.join(patience)
  problem = answers[0] if answers else f'no answer in {patience:g} s'
  if problem is not None:
    raise ConfigError(f'{flag} needs the network, and {url} cannot be reached ({problem}); {remedy}')
