"""Checkpoints of a run: written in the background, verified before use, deleted after newer ones are complete.

A checkpoint is a folder named after its step. Orbax writes it; integrity.py adds digests of all its files
and a manifest. The manifest also records config, tokenizer, code version and validation loss.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from mor_jax.checkpoints import integrity, retention
from mor_jax.checkpoints.mirror import Mirror
from mor_jax.config import CheckpointConfig, ConfigError
from mor_jax.errors import RunError
from mor_jax.parallel import runtime

RETRY_SECONDS = 60.0  # after a save that failed
_REMOVED, _DAMAGED = '.removed', '.damaged'
_HALF_WRITTEN = '.orbax-checkpoint-tmp'  # in the names of Orbax's folders until they are complete
_FINISHED = 'finished'  # file in the folder: it says that there once was a finished checkpoint


def _is_no_stack_of_orbax(record: logging.LogRecord) -> bool:
  """Orbax logs the stack of a save that failed at a dozen places and raises it, too; the user gets one line."""
  return not ('orbax' in record.pathname and record.exc_info)


def ever_finished(folder: epath.Path, mirror: Mirror | None = None) -> bool:
  """Whether a checkpoint folder or its mirror ever had a finished checkpoint, even if none is usable now."""
  if mirror is not None and mirror.ever_finished():
    return True
  if not folder.is_dir():
    return False
  checkpoints = [path for path in folder.iterdir() if path.name.partition(_DAMAGED)[0].isdigit()]
  return (folder / _FINISHED).exists() or any((path / integrity.MANIFEST).exists() for path in checkpoints)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  """Shape of every leaf by its path, 'opt_state/1/0/mu/embed/embedding', whatever the containers are."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): tuple(leaf.shape) for path, leaf in leaves}


class Checkpoints:
  """The checkpoints under one folder. Use as a context, which waits for a save that is still running.

  With several processes all must call `newest_good`, `save` and `restore`, with the same steps.

  Args:
    folder: made at the first save, or when absent; local or gs://.
    settings: when to save and what to keep.
    about: JSON that goes with every checkpoint: what its state belongs to.
    attachments: files copied into every checkpoint, such as the tokenizer.
    report: shows a line to the user.
    read_only: of a run that may be going on: nothing is renamed, removed or saved.
    mirror: where finished checkpoints are copied, and taken from if they are missing here.
  """

  def __init__(
    self,
    folder: epath.PathLike,
    settings: CheckpointConfig,
    about: dict[str, Any] | None = None,
    attachments: Sequence[epath.PathLike] = (),
    report: Callable[[str], None] = print,
    read_only: bool = False,
    mirror: Mirror | None = None,
  ):
    path = epath.Path(folder)
    self._folder = path if '://' in str(folder) else path.absolute()
    self._settings, self._about, self._report = settings, about or {}, report
    self._attachments = [epath.Path(path) for path in attachments]
    self._read_only, self._mirror = read_only, mirror
    self._finishing: threading.Thread | None = None
    self._failure: str | None = None  # of the last save
    self._holds_failure = False  # the checkpointer does, and would raise it at its next call
    self._finished: int | None = None
    self._saved_at = self._failed_at = time.monotonic()
    logging.getLogger('absl').addFilter(_is_no_stack_of_orbax)
    self._open()

  def _open(self) -> None:
    if not self._read_only:
      self._clear_away()
    self._checkpointer = ocp.training.Checkpointer(self._folder)

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *_: object) -> None:
    self._join()
    self._checkpointer.close()

  # ---- what there is ----

  @property
  def steps(self) -> list[int]:
    """Steps of all checkpoints on disk in ascending order, finished or not."""
    if not self._folder.is_dir():
      return []
    return sorted(int(path.name) for path in self._folder.iterdir() if path.name.isdigit())

  @property
  def latest_step(self) -> int | None:
    """Step of the newest finished checkpoint; None if there is none."""
    return max((step for step in self.steps if (self.path(step) / integrity.MANIFEST).exists()), default=None)

  def path(self, step: int) -> epath.Path:
    """Folder of the checkpoint of a step."""
    return self._folder / str(step)

  def newest_good(self) -> int | None:
    """Step of the newest checkpoint whose files are all intact; None if none was ever finished.

    Reports newer checkpoints that are damaged or unfinished, and renames them unless `read_only`.

    Raises:
      RunError: there were checkpoints, but none is intact. Further calls raise it again.
    """
    here, copies = self.steps, self._mirror.steps if self._mirror else []
    for step in sorted({*here, *copies}, reverse=True):
      if step in here:
        if self._is_good(step):
          return step
        if not self._read_only:
          self._set_aside(self.path(step))
      if step in copies and not self.path(step).exists():
        self._fetch(step)
        if self._is_good(step):
          return step
        if not self._read_only:
          self._set_aside(self.path(step))
          if self._mirror and runtime.is_main():
            self._mirror.set_aside(step)
    if ever_finished(self._folder, self._mirror):
      raise RunError(
        f'none of the checkpoints in {self._folder} can be used, so there is nothing to resume from; restore one '
        f'of them, or start over in another --workdir'
      )
    return None

  def good(self, step: int) -> int:
    """Returns the step if its checkpoint exists, here or in the mirror, and its files are intact.

    Raises:
      ConfigError: there is no checkpoint of this step.
      RunError: the checkpoint is damaged or unfinished.
    """
    copies = self._mirror.steps if self._mirror else []
    if step not in self.steps:
      if step not in copies:
        there = ', '.join(map(str, sorted({*self.steps, *copies}))) or 'none'
        raise ConfigError(f'--step={step}: {self._folder} has no checkpoint of this step; there are {there}')
      self._fetch(step)
    if not self._is_good(step):
      raise RunError(f'the checkpoint of --step={step} cannot be used; choose another')
    return step

  def _is_good(self, step: int) -> bool:
    found = integrity.problems(self.path(step), jax.process_index(), jax.process_count())
    for problem in found:
      self._report(f'checkpoint {self.path(step)} cannot be used: {problem}')
    return not runtime.anywhere(bool(found))

  def _fetch(self, step: int) -> None:
    if self._mirror and runtime.is_main():
      self._report(f'taking the checkpoint of step {step} from the mirror')
      self._mirror.fetch(step)
    runtime.barrier('fetched')
    if runtime.anywhere(not self.path(step).exists()):
      raise RunError(
        f'{self._folder} is not the same folder for all processes, which a mirror of checkpoints needs; put '
        f'--workdir on a disk that all hosts share'
      )
    self._checkpointer.reload()

  def _set_aside(self, folder: epath.Path) -> None:
    if runtime.is_main():
      number = 0
      while (target := folder.with_name(f'{folder.name}{_DAMAGED}{number or ""}')).exists():
        number += 1
      folder.rename(target)
      self._report(f'set it aside as {target.name}')
    runtime.barrier('set aside')
    self._checkpointer.reload()

  # ---- saving ----

  def wants_save(self) -> bool:
    """Whether this process should save by the clock: the interval has passed, or a failed save is due for a retry.

    The processes must agree before they save.
    """
    now = time.monotonic()
    if self._failure is not None:
      return now - self._failed_at > RETRY_SECONDS
    minutes = self._settings.every_minutes
    return minutes is not None and now - self._saved_at > 60 * minutes

  def save(
    self,
    step: int,
    state: Any,
    validation_loss: float | None = None,
    position: dict[str, Any] | None = None,
    rows_read: int | None = None,
  ) -> None:
    """Begins to save; returns once the state is copied, so that it may be donated.

    A save that fails, now or later, is reported, and nothing is removed for it; `wants_save` asks for
    another.

    Args:
      validation_loss: of this state, to keep the best.
      position: JSON: this process's position in its stream of data, if it reads one.
      rows_read: rows of training data that the state has seen.
    """
    self._join()
    self._saved_at = time.monotonic()
    try:
      if (self.path(step)).exists():  # left by a save that failed half-way
        self._remove(step)
      response = self._checkpointer.save_async(step, state, force=True)
    except Exception as error:  # the file system, Orbax, TensorStore: each has its own
      self._note_failure(step, error)
      return
    about = {'step': step, 'validation_loss': validation_loss, 'rows_read': rows_read, **self._about}
    self._finishing = threading.Thread(
      target=self._finish, args=(step, response, about, position), name=f'checkpoint {step}'
    )
    self._finishing.start()

  def _finish(self, step: int, response: Any, about: dict[str, Any], position: dict[str, Any] | None) -> None:
    """Marks a save as finished once it is on disk, then applies retention. Runs on a thread."""
    try:
      response.result()
      if runtime.is_main():
        for path in self._attachments:
          path.copy(self.path(step) / path.name, overwrite=True)
      integrity.write_share(self.path(step), jax.process_index(), {'position': position})
      if runtime.is_main():
        integrity.publish(self.path(step), jax.process_count(), about)
        if self._mirror is not None:
          self._mirror.upload(step)
        (self._folder / _FINISHED).write_text(f'{step}\n')
        self._retain()
      self._failure, self._finished = None, step
    except Exception as error:
      self._note_failure(step, error)

  def await_finished(self, step: int) -> None:
    """Waits for the running save, unless this process has finished one of `step` or later.

    One that fails is not waited for again.
    """
    if self._finishing is not None and (self._finished is None or self._finished < step):
      self._finishing.join()

  def _note_failure(self, step: int, error: Exception) -> None:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    self._failure, self._failed_at, self._holds_failure = reason, time.monotonic(), True
    self._report(
      f'WARNING: checkpoint {self.path(step)} could not be saved: {reason}; training goes on, another attempt '
      f'follows in {RETRY_SECONDS:.0f} s or at the next checkpoint'
    )

  def _retain(self) -> None:
    losses, mirror = {}, self._mirror
    for step in sorted({*self.steps, *(mirror.steps if mirror else ())}):
      folder = self.path(step) if mirror is None or self.path(step).exists() else mirror.path(step)
      try:
        losses[step] = integrity.read_manifest(folder)['validation_loss']
      except ValueError:
        continue  # unfinished or damaged: not ours to judge
    for step in retention.to_remove(self._settings, losses):
      self._remove(step)

  def _remove(self, step: int) -> None:
    """Renames before deleting, so that a partly deleted folder never has a checkpoint's name."""
    if runtime.is_main():
      if self._mirror is not None:
        self._mirror.remove(step)
      if not self.path(step).exists():
        return
      target = self.path(step).with_name(f'{step}{_REMOVED}')
      if target.exists():
        target.rmtree()
      self.path(step).rename(target)
      target.rmtree()

  def _join(self) -> None:
    """Waits for the running save."""
    if self._finishing is not None:
      self._finishing.join()
      self._finishing = None
    if self._holds_failure:
      with contextlib.suppress(Exception):
        self._checkpointer.close()
      with contextlib.suppress(Exception):  # a disk that is still full, perhaps: the next call tries again
        self._open()
        self._holds_failure = False

  def _clear_away(self) -> None:
    """Removes what was half-written or half-removed, as far as it can be.

    Threads of a save that failed may still add files to its folder, which is not empty then: so it loses its name first.
    Orbax would do without, and fail the next save with it.
    """
    if not (runtime.is_main() and self._folder.is_dir()):
      return
    there = list(self._folder.iterdir())
    removed = [path for path in there if path.name.endswith(_REMOVED)]
    half_written = [path for path in there if _HALF_WRITTEN in path.name and path not in removed]
    for path in removed:
      with contextlib.suppress(Exception):
        path.rmtree()
    for path in half_written:  # second, since the name that one gets may have been taken
      with contextlib.suppress(Exception):
        path.rename(path.with_name(f'{path.name}{_REMOVED}')).rmtree()

  def wait(self) -> None:
    """Returns when everything saved is complete on disk.

    Raises:
      RunError: the last save failed.
    """
    self._join()
    if self._failure is not None:
      kept = self.latest_step
      remedy = f'run the same command again: it continues after step {kept}' if kept else 'there is none yet'
      raise RunError(f'the last checkpoint could not be saved ({self._failure}); make room, then {remedy}')

  # ---- restoring ----

  def restore(self, step: int, abstract_state: Any) -> Any:
    """The state of a step, laid out as `abstract_state` (shapes, dtypes, shardings) says."""
    return self._checkpointer.load(step, abstract_state)

  def restore_parts(self, step: int, abstract_parts: dict[str, Any]) -> dict[str, Any]:
    """Some parts of the state alone: parameters and router state are all that a converted model has."""
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
      return ocp.load(self.path(step), abstract_parts)

  def stored_shapes(self, step: int, part: str) -> dict[str, Any]:
    """Shapes and dtypes of a part of the state of a step, such as 'params', as nested dicts."""
    return ocp.metadata(self.path(step)).metadata[part]

  def manifest(self, step: int) -> dict[str, Any]:
    """What a checkpoint says about itself: step, processes, validation_loss, `about`."""
    return integrity.read_manifest(self.path(step))

  def describe_newest(self) -> str:
    """What of the training is safe, for a user."""
    step = self.latest_step
    return f'saved after step {step} in {self.path(step)}' if step else 'nothing was trained yet'

  def has_shapes(self, step: int, part: str, abstract: Any) -> bool:
    """Whether a part of the state of a step, such as 'opt_state', has these shapes."""
    return _shapes(self.stored_shapes(step, part)) == _shapes(abstract)

  def check_shapes(self, step: int, abstract_state: Any, leave_out: str | None = None) -> None:
    """Raises ConfigError, naming the first leaf, unless the state of a step has these shapes, but for one part."""
    stored = _shapes(ocp.metadata(self.path(step)).metadata)
    wanted = _shapes(abstract_state)
    names = (name for name in stored.keys() | wanted.keys() if name.partition('/')[0] != leave_out)
    for name in sorted(names):
      if stored.get(name) != wanted.get(name):
        was, now = (shapes.get(name, 'missing') for shapes in (stored, wanted))
        raise ConfigError(
          f'the checkpoint {self.path(step)} does not fit the settings: {name} was {was}, now {now}; restore the '
          f'settings of the model and the optimiser that --allow_change names, or begin a new run'
        )

  def position(self, step: int) -> dict[str, Any] | None:
    """Where this process stood in its stream of data, None if it read none.

    Raises:
      RunError: the checkpoint is of another number of processes, each of which read a part.
    """
    processes = self.manifest(step)['processes']
    positions = [integrity.read_share(self.path(step), process)['position'] for process in range(processes)]
    if processes != jax.process_count() and any(position is not None for position in positions):
      raise RunError(
        f'the run read its data live (data.live=true) with {processes} processes and can only go on with as many, '
        f'not with {jax.process_count()}; start {processes}, or prepare the data and begin a new run'
      )
    return positions[jax.process_index()] if processes == jax.process_count() else None
