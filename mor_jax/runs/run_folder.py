"""The folder of a run: its files, and whether it belongs to the run that wants to use it."""

import contextlib
import dataclasses
import json
import secrets
import subprocess
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from etils import epath

from mor_jax.checkpoints.checkpoint import Checkpoints, ever_finished
from mor_jax.checkpoints.mirror import DIRECT, Mirror, check_folder, scheme
from mor_jax.config import Config, ConfigError, resolve, with_changes
from mor_jax.data import tokenizer as tokenizers
from mor_jax.data.conventions import CONVENTIONS, Conventions
from mor_jax.data.loader import Dataset
from mor_jax.files import parse_json, require_writable, write_atomically
from mor_jax.runs import changes

OLDEST_FORMAT = 1
FORMAT = 2
"""Format of run folders and checkpoints. 1, without a number, had all unique layers in one stack."""


_IDENTITY = 'run'  # in config.json and in the manifests of checkpoints


class RunFolder:
  """Paths, config and result of a run. `create` makes the folder."""

  def __init__(self, path: Path):
    self.path = path
    self._checkpoints = path / 'checkpoints'
    self.metrics = path / 'metrics.jsonl'
    self.tensorboard = path / 'tensorboard'
    self.tokenizer = path / 'tokenizer.json'
    self.goodput = path / 'goodput.json'
    self.profile = path / 'profile'
    self._config = path / 'config.json'
    self._data = path / 'data.json'
    self._summary = path / 'summary.json'
    self.calibrations = path / 'calibrations.json'
    self._conventions = path / CONVENTIONS

  def check(self, config: Config, allowed: Sequence[str] = (), writes: bool = True) -> None:
    """Checks that the folder is writable and is either empty or belongs to this run.

    Args:
      allowed: settings that may differ from the run's, in addition to MAY_CHANGE.
      writes: whether this process writes files.

    Raises:
      ConfigError: the folder is not writable, or holds another run.
      RunError: a remote checkpoint folder does not respond.
    """
    changes.require_known(allowed)
    if writes:
      require_writable(self.path, 'workdir')
    check_folder(config.checkpoint.folder, writes)
    if not self._config.exists():
      if self._checkpoints.exists():
        raise ConfigError(
          f'workdir={self.path} holds checkpoints but no config.json; choose another workdir or remove it'
        )
      return
    if self.is_converted:
      raise ConfigError(
        f'workdir={self.path} holds a converted model, not a training; choose another workdir, and train from the '
        f'model with --init_from={self.path}'
      )
    changed = changes.changed(self.read_config(), self._with_its_tokenizer(config), allowed)
    if changed:
      raise ConfigError(
        f'workdir={self.path} holds a run with other settings: {"; ".join(changed.values())}; restore them to '
        f'resume it, choose another workdir, or go on with the new ones: --allow_change={",".join(changed)}'
      )

  def check_checkpoint(self, manifest: dict[str, Any], config: Config, allowed: Sequence[str] = ()) -> None:
    """Checks that a checkpoint is this run's, wherever `checkpoint.folder` says that it lies.

    A run whose folder was lost, so that its identity is, may go on from checkpoints of the same settings.

    Raises:
      ConfigError: it is that of another run, or of another format.
    """
    found = manifest.get('format', OLDEST_FORMAT)
    where = f'checkpoint.folder={config.checkpoint.folder or self._checkpoints}'
    if found != FORMAT:
      raise ConfigError(
        f'{where} holds a checkpoint of format {found}, and this mor_jax reads format {FORMAT}; convert the run that '
        f'it belongs to with python -m mor_jax.convert, or name another checkpoint.folder'
      )
    if manifest.get('run') and manifest['run'] == self._identity():
      return
    try:
      theirs = _resolve_stored(manifest['config'])
    except (KeyError, ConfigError) as error:
      raise ConfigError(
        f'{where} holds a checkpoint of unknown settings ({error}); name another checkpoint.folder'
      ) from None
    changed = changes.changed(theirs, self._with_its_tokenizer(config), allowed)
    if changed:
      raise ConfigError(
        f'{where} holds a checkpoint of another run, {theirs.name}: {"; ".join(changed.values())}; name another '
        f'checkpoint.folder, or go on from it all the same: --allow_change={",".join(changed)}'
      )

  def _with_its_tokenizer(self, config: Config) -> Config:
    """The config with the run's own name for the tokenizer, if both names are of equal ones."""
    if not self._config.exists():
      return config
    theirs = self.read_config().data.tokenizer
    if config.data.tokenizer == theirs or config.data.tokenizer in (*tokenizers.MADE_HERE, 'source'):
      return config
    try:
      same = tokenizers.build(config.data).digest == self.read_data()['tokenizer_digest']
    except ConfigError:
      return config
    return with_changes(config, data={'tokenizer': theirs}) if same else config

  @property
  def is_converted(self) -> bool:
    """Whether it holds a converted model, so that nothing was trained here."""
    return self._config.exists() and not self._data.exists()

  def with_vocabulary(self, config: Config) -> Config:
    """The config with the stored run's vocabulary size and first token of a text, where it leaves them open."""
    if not self._config.exists():
      return config
    stored = self.read_config()
    if config.model.vocab_size is None:
      config = with_changes(config, model={'vocab_size': stored.model.vocab_size})
    if config.data.begin == tokenizers.AUTO:
      config = with_changes(config, data={'begin': stored.data.begin})
    return config

  def read_config(self, of_format: int = FORMAT) -> Config:
    """The config of the run. Raises ConfigError if there is none, it cannot be read, or is of another format."""
    found, settings = self._read_config()
    if found > FORMAT:
      raise ConfigError(
        f'{self.path} holds a run of format {found}, made by a newer mor_jax than this, which reads format {FORMAT}; '
        f'install that version or a later one'
      )
    if found != of_format:
      raise ConfigError(
        f'{self.path} holds a run of format {found}, made by an earlier mor_jax; this one reads format {FORMAT}: '
        f'convert it with python -m mor_jax.convert --checkpoint={self.path} --output=NEW_FOLDER'
      )
    try:
      return _resolve_stored(settings)
    except ConfigError as error:
      raise self._unreadable(error) from None

  def read_format(self) -> int:
    """The number of the format that the run has. Raises ConfigError as `read_config` does."""
    return self._read_config()[0]

  def _read_config(self) -> tuple[int, dict[str, Any]]:
    try:
      settings = parse_json(self._config.read_text())
    except FileNotFoundError:
      raise ConfigError(f'{self.path} is not the folder of a run: it holds no {self._config.name}') from None
    except ValueError as error:
      raise self._unreadable(error) from None
    if not isinstance(settings, dict):
      raise self._unreadable('it holds no JSON object')
    is_run = {'model', 'train'} <= settings.keys()  # else a file of something else, which `resolve` refuses
    settings.pop(_IDENTITY, None)
    return settings.pop('format', OLDEST_FORMAT if is_run else FORMAT), settings

  def _unreadable(self, reason: object) -> ConfigError:
    return ConfigError(f'{self._config} cannot be read ({reason}); choose another workdir or remove it')

  def checkpoint_folder(self, config: Config) -> epath.Path:
    """The folder to which Orbax writes the checkpoints of this run."""
    folder = config.checkpoint.folder
    return epath.Path(self._checkpoints if self.mirror(config) else folder or self._checkpoints)

  def mirror(self, config: Config) -> Mirror | None:
    """The mirror of finished checkpoints, if Orbax cannot write to `checkpoint.folder` directly."""
    folder = config.checkpoint.folder
    if scheme(folder) in (None, DIRECT):
      return None
    return Mirror(folder, self._checkpoints)

  def has_checkpoint(self, config: Config) -> bool:
    """Whether a checkpoint of the run was ever finished."""
    return ever_finished(self.checkpoint_folder(config), self.mirror(config))

  def checkpoints(self, config: Config, dataset: Dataset, report: Callable[[str], None]) -> Checkpoints:
    """The checkpoints of the run, to go on from and to add to; a context.

    Each records the run's settings, tokenizer and code.
    """
    about = {'run': self._identity(), **describe_checkpoints(config, dataset.manifest.tokenizer_digest)}
    where, mirror = self.checkpoint_folder(config), self.mirror(config)
    return Checkpoints(where, config.checkpoint, about, [self.tokenizer], report, mirror=mirror)

  def read_checkpoints(self, config: Config) -> Checkpoints:
    """The checkpoints of the run, to read them; a context. Raises ConfigError if there was never one."""
    if not self.has_checkpoint(config):
      raise ConfigError(f'the run {self.path} has no checkpoint yet')
    where, mirror = self.checkpoint_folder(config), self.mirror(config)
    return Checkpoints(where, config.checkpoint, read_only=True, mirror=mirror)

  def read_data(self) -> dict[str, Any]:
    """Counts, tokenizer and source of the training data, as in the dataset's manifest. Raises ConfigError."""
    return self._read_object(self._data, 'restore it from a copy, or begin a new run')

  def _read_object(self, path: Path, remedy: str) -> dict[str, Any]:
    try:
      found = parse_json(path.read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
      raise ConfigError(f'{path} cannot be read ({error}); {remedy}') from None
    if not isinstance(found, dict):
      raise ConfigError(f'{path} holds no JSON object; {remedy}')
    return found

  def conventions(self, config: Config, tokenizer: tokenizers.Tokenizer) -> Conventions:
    """What is known of the texts of this model. Raises ConfigError if it cannot be read."""
    if not self._conventions.exists():
      return Conventions((tokenizer.end_of_text,), config.data.seq_len)
    try:
      return Conventions.from_json(parse_json(self._conventions.read_text(encoding='utf-8')))
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise ConfigError(f'{self._conventions} cannot be read ({error})') from None

  def write_conventions(self, conventions: Conventions) -> None:
    """Keeps what a model that was brought here from elsewhere says about texts."""
    write_atomically(self._conventions, _to_json(conventions.to_json()))

  def create(self, config: Config, dataset: Dataset, conventions: Conventions | None = None) -> None:
    """Writes the tokenizer, the data description and the config, unless they exist already.

    Args:
      config: resolved, with the vocabulary size set.
      dataset: the training data.
      conventions: of the model that the run begins from.

    Raises:
      ConfigError: the run in the folder used other data.
    """
    manifest = dataclasses.replace(dataset.manifest, files={})  # sizes of files may differ for equal rows
    data = _to_json(dataclasses.asdict(manifest))
    if self._config.exists():
      stored = self.read_data()
      if stored['tokenizer_digest'] != manifest.tokenizer_digest:
        raise ConfigError(
          f'workdir={self.path} holds a run with another vocabulary: its tokenizer had {stored["vocab_size"]} '
          f'entries, that of data.tokenizer={manifest.tokenizer} has {manifest.vocab_size} and differs; '
          f'restore data.tokenizer ({self.tokenizer} is the one it had), or choose another workdir'
        )
      if _content(stored) != _content(parse_json(data)):
        raise ConfigError(
          f'workdir={self.path} holds a run on other data ({self._data.name} differs: the corpus has changed; '
          f"the embedded one is the running Python's); choose another workdir"
        )
    else:
      self.path.mkdir(parents=True, exist_ok=True)
      dataset.tokenizer.save(self.tokenizer)
      write_atomically(self._data, data)
      if conventions is not None:
        self.write_conventions(conventions)
      self.write_config(config)  # last: it says that the folder is a run's

  def write_config(self, config: Config) -> None:
    """Writes config.json: how the run goes on from here."""
    identity = self._identity() or secrets.token_hex(8)
    write_atomically(self._config, _to_json({'format': FORMAT, _IDENTITY: identity, **config.to_dict()}))

  def go_on(self, config: Config) -> None:
    """Notes how a run goes on after its newest checkpoint; what it had come to before is no result any more."""
    self._summary.unlink(missing_ok=True)
    self.write_config(config)

  def _identity(self) -> str | None:
    """What tells this run from another of the same settings; None where there is none yet."""
    return self._read_object(self._config, 'remove it').get(_IDENTITY) if self._config.exists() else None

  def read_summary(self) -> dict[str, Any] | None:
    """The result of the run, or None if it has not finished."""
    if not self._summary.exists():
      return None
    return self._read_object(self._summary, 'remove it, and the run makes it again from its last checkpoint')

  def is_finished(self, config: Config) -> bool:
    """Whether the run has a result, and of as many steps as the config asks for."""
    summary = self.read_summary()
    if summary is None:
      return False
    steps = summary.get('steps')
    return steps >= config.train.steps if type(steps) is int else True

  def write_summary(self, summary: dict[str, Any]) -> None:
    """Stores the result, which marks the run as finished."""
    write_atomically(self._summary, _to_json(summary))


def describe_checkpoints(config: Config, tokenizer_digest: str) -> dict[str, Any]:
  """What every checkpoint records about its run."""
  about = {'tokenizer_digest': tokenizer_digest, 'code': code_version()}
  return {'format': FORMAT, 'config': config.to_dict(), **about}


def code_version() -> str:
  """The git commit of the code, with '+' if files have changed; without git, the installed version."""
  here = Path(__file__).parent
  git = ['git', '-C', str(here), 'describe', '--always', '--abbrev=40', '--dirty=+', '--exclude=*']
  try:
    return subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
  except (OSError, subprocess.SubprocessError):
    with contextlib.suppress(metadata.PackageNotFoundError):
      return metadata.version('mor_jax')
  return 'unknown'


def _resolve_stored(settings: dict[str, Any]) -> Config:
  """The config of a run, which may be of an earlier version. Raises ConfigError."""
  if isinstance(settings.get('data'), dict):
    settings = {
      **settings,
      'data': {'begin': None, **settings['data']},
    }  # nothing was put before documents then
  return resolve(settings)


def _content(data: dict[str, Any]) -> dict[str, Any]:
  """Of a description of data what says which rows they are.

  The rest says what files are called. Fields that an earlier version did not have are empty where it could be read.
  """
  named = ('format_version', 'source', 'tokenizer')
  return {name: value for name, value in data.items() if name not in named and value not in (None, 0)}


def _to_json(value: Any) -> str:
  return json.dumps(value, indent=2) + '\n'
