"""Checkpoints: bit for bit, verified before use, damaged ones set aside, failed saves told and retried."""

import contextlib
import errno
import json
import os
import pickle
import resource
import shutil
import time
import types

import chex
import jax
import numpy as np
import pytest
import tiny_run

from benchmarks.damage import DAMAGE, flip, newest, payload
from mor_jax.checkpoints import checkpoint as checkpoint_lib
from mor_jax.checkpoints import integrity
from mor_jax.checkpoints.checkpoint import Checkpoints
from mor_jax.config import CheckpointConfig
from mor_jax.errors import RunError

SETTINGS = CheckpointConfig(keep=2)


@pytest.fixture(scope='module')
def run():
  return tiny_run.run()


@pytest.fixture(scope='module')
def state(run):
  return run.initial()


@pytest.fixture(scope='module')
def saved(state, tmp_path_factory):
  """A folder with checkpoints 3 and 6."""
  folder = tmp_path_factory.mktemp('saved') / 'checkpoints'
  with Checkpoints(folder, SETTINGS, about={'config': {'name': 'x'}}) as checkpoints:
    for step in (3, 6):
      checkpoints.save(step, state, validation_loss=step / 2, position={'unit': step})
    checkpoints.wait()
  return folder


@pytest.fixture
def folder(saved, tmp_path):
  """A copy of it, to be damaged."""
  return shutil.copytree(saved, tmp_path / 'checkpoints')


def test_state_survives_bit_for_bit_while_training_goes_on(run, tmp_path):
  """The step donates the state's memory right after the asynchronous save has begun."""
  batches = tiny_run.batches()
  state, _ = run.step(run.initial(), next(batches))
  original = jax.tree.map(lambda leaf: np.array(leaf, copy=True), state)
  with Checkpoints(tmp_path / 'new' / 'checkpoints', SETTINGS) as checkpoints:
    checkpoints.save(1, state)
    for _ in range(3):
      state, _ = run.step(state, next(batches))
    checkpoints.wait()
    assert checkpoints.newest_good() == 1
    restored = checkpoints.restore(1, run.abstract)
  chex.assert_trees_all_equal_dtypes(restored, original)
  chex.assert_trees_all_equal(restored, original)
  next_state, _ = run.step(restored, next(batches))
  assert int(next_state.step) == 2


def test_newest_are_kept(state, tmp_path):
  with Checkpoints(tmp_path, SETTINGS) as checkpoints:
    assert checkpoints.latest_step is None
    assert checkpoints.newest_good() is None
    for step in (3, 6, 9):
      checkpoints.save(step, state)
    checkpoints.wait()
    assert checkpoints.latest_step == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == ['6', '9', 'finished']
    assert checkpoints.path(9) == tmp_path / '9'
  with Checkpoints(tmp_path, SETTINGS) as reopened:
    assert reopened.latest_step == 9


def test_says_what_it_is_of(saved):
  with Checkpoints(saved, SETTINGS) as checkpoints:
    manifest = checkpoints.manifest(6)
    assert checkpoints.position(6) == {'unit': 6}
  assert (manifest['step'], manifest['processes'], manifest['validation_loss']) == (6, 1, 3.0)
  assert manifest['config'] == {'name': 'x'}


@pytest.mark.parametrize('damage', DAMAGE.values(), ids=DAMAGE)
def test_damaged_newest_is_set_aside_for_the_one_before(run, state, folder, damage):
  damage(folder)
  told = []
  with Checkpoints(folder, SETTINGS, report=told.append) as checkpoints:
    assert checkpoints.newest_good() == 3
    restored = checkpoints.restore(3, run.abstract)
    assert sorted(path.name for path in folder.iterdir()) == ['3', '6.damaged', 'finished']
    checkpoints.save(6, state)  # its place is free again
    checkpoints.wait()
    assert checkpoints.newest_good() == 6
  assert f'{folder}/6 cannot be used' in told[0]
  assert 'set it aside as 6.damaged' in told[-1]
  chex.assert_trees_all_equal(restored, state)


def test_without_a_good_one_the_run_stops_and_begins_nothing_anew(folder):
  for step in (3, 6):
    flip(payload(folder / str(step)))
  for _ in range(2):  # not when the command is given again, either
    with (
      Checkpoints(folder, SETTINGS, report=lambda text: None) as checkpoints,
      pytest.raises(RunError, match=r'none of the checkpoints .* can be used'),
    ):
      checkpoints.newest_good()
  assert sorted(path.name for path in folder.iterdir()) == ['3.damaged', '6.damaged', 'finished']
  shutil.rmtree(folder / '3.damaged')
  shutil.rmtree(folder / '6.damaged')
  assert checkpoint_lib.ever_finished(folder)


def test_a_first_save_that_was_never_finished_is_no_loss(folder):
  """The process was killed between Orbax's end and the manifest: nothing was ever there to go on from."""
  shutil.rmtree(folder / '3')
  (folder / 'finished').unlink()
  (folder / '6' / integrity.MANIFEST).unlink()
  told = []
  with Checkpoints(folder, SETTINGS, report=told.append) as checkpoints:
    assert checkpoints.newest_good() is None
  assert 'its save was never finished' in told[0]
  assert not checkpoint_lib.ever_finished(folder)


def test_a_reader_leaves_everything_where_it_is(folder):
  flip(payload(newest(folder)))
  (folder / '9.orbax-checkpoint-tmp').mkdir()  # a save under way
  names = sorted(path.name for path in folder.iterdir())
  with Checkpoints(folder, SETTINGS, report=lambda text: None, read_only=True) as checkpoints:
    assert checkpoints.newest_good() == 3
  assert sorted(path.name for path in folder.iterdir()) == names


def test_files_of_other_processes_are_theirs_to_digest(tmp_path):
  for name in (
    'state/ocdbt.process_0/d/a',
    'state/ocdbt.process_1/d/b',
    'state/array_metadatas/process_1',
    'state/x',
  ):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(name)
  for process in range(2):
    integrity.write_share(checkpoint_lib.epath.Path(tmp_path), process, {})
  shares = [json.loads((tmp_path / f'process_{process}.json').read_text())['files'] for process in range(2)]
  assert sorted(shares[0]) == ['state/ocdbt.process_0/d/a', 'state/x']
  assert sorted(shares[1]) == ['state/array_metadatas/process_1', 'state/ocdbt.process_1/d/b']
  integrity.publish(checkpoint_lib.epath.Path(tmp_path), 2, {})
  assert integrity.problems(checkpoint_lib.epath.Path(tmp_path)) == []
  flip(tmp_path / 'state/ocdbt.process_1/d/b')
  found = [integrity.problems(checkpoint_lib.epath.Path(tmp_path), part, 3) for part in range(3)]
  assert sorted(map(len, found)) == [0, 0, 1], 'each looks at its part, together at all'


def test_another_number_of_processes_cannot_go_on_with_live_data(folder, monkeypatch):
  with Checkpoints(folder, SETTINGS) as checkpoints, monkeypatch.context() as two:
    two.setattr(jax, 'process_count', lambda: 2)
    with pytest.raises(RunError, match=r'data\.live=true\) with 1 processes .* not with 2'):
      checkpoints.position(6)


# ---- saves that fail ----


@pytest.fixture
def clock(monkeypatch):
  """Seconds that pass only when told to."""
  now = types.SimpleNamespace(seconds=1000.0)
  monkeypatch.setattr(checkpoint_lib.time, 'monotonic', lambda: now.seconds)
  return now


@pytest.mark.parametrize('where', ['write_share', 'publish'])
def test_failed_save_is_told_and_tried_again_and_removes_nothing(state, folder, monkeypatch, clock, where):
  told = []
  with Checkpoints(folder, SETTINGS, report=told.append) as checkpoints:
    with monkeypatch.context() as full:
      full.setattr(integrity, where, _full_disk)
      checkpoints.save(9, state)
      checkpoints._join()
    assert 'WARNING' in told[0]
    assert 'No space left on device' in told[0]
    assert {'3', '6'} <= {path.name for path in folder.iterdir()}
    assert checkpoints.latest_step == 6
    assert not checkpoints.wants_save()
    clock.seconds += checkpoint_lib.RETRY_SECONDS + 1
    assert checkpoints.wants_save()
    checkpoints.save(10, state)
    checkpoints.wait()
    assert checkpoints.newest_good() == 10
    assert not checkpoints.wants_save()


def test_unwritable_folder_does_not_end_the_training_but_its_end_says_so(state, tmp_path, monkeypatch):
  told = []
  with Checkpoints(tmp_path / 'checkpoints', SETTINGS, report=told.append) as checkpoints:
    monkeypatch.setattr(checkpoints._checkpointer, 'save_async', _full_disk)
    checkpoints.save(5, state)
    assert 'No space left' in told[0]
    with pytest.raises(RunError, match='could not be saved'):
      checkpoints.wait()


def test_a_file_system_that_takes_no_more_bytes(state, folder, run, caplog):
  """A real one, here by a limit on the size of files; every layer below has its own words for it."""
  told, (soft, hard) = [], resource.getrlimit(resource.RLIMIT_FSIZE)
  with Checkpoints(folder, SETTINGS, report=told.append) as checkpoints:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
      checkpoints.save(9, state)
      checkpoints._join()
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert 'WARNING' in told[0]
    assert 'could not be saved' in told[0]
    assert caplog.text.count('Traceback') == 0, 'not a thousand lines of stacks'
    assert checkpoints.latest_step == 6
    replaced = checkpoints._checkpointer
    checkpoints.save(10, state)
    checkpoints.wait()
    assert checkpoints._checkpointer is replaced, 'two at a time clear away the same half-written checkpoint'
    assert checkpoints.newest_good() == 10
    chex.assert_trees_all_equal(checkpoints.restore(10, run.abstract), state)


def test_a_half_written_checkpoint_that_still_grows_is_in_nobodys_way(state, folder, run, monkeypatch):
  """Threads of a save that failed may add files while they are removed: under its name the folder is not empty then."""
  half, removed = folder / '9.orbax-checkpoint-tmp', os.rmdir

  def rmdir(path, **options):
    if str(path).endswith(half.name):
      raise OSError(errno.ENOTEMPTY, 'Directory not empty')
    removed(path, **options)

  with Checkpoints(folder, SETTINGS, report=lambda text: None) as checkpoints:
    with monkeypatch.context() as full:
      full.setattr(integrity, 'publish', _full_disk)
      checkpoints.save(9, state)
      checkpoints.await_finished(9)
    half.mkdir()
    monkeypatch.setattr(os, 'rmdir', rmdir)
    checkpoints.save(10, state)
    checkpoints.wait()
    assert not half.exists()
    chex.assert_trees_all_equal(checkpoints.restore(10, run.abstract), state)


def test_what_could_not_be_removed_is_removed_later(folder):
  for name in ('9.orbax-checkpoint-tmp', '9.orbax-checkpoint-tmp.removed', '3.removed'):
    (folder / name).mkdir()
    (folder / name / 'file').write_text('')
  with Checkpoints(folder, SETTINGS, report=lambda text: None):
    assert sorted(path.name for path in folder.iterdir()) == ['3', '6', 'finished']


def _full_disk(*_, **__):
  raise OSError(errno.ENOSPC, 'No space left on device')


def test_waits_for_a_checkpoint_that_is_not_finished(state, tmp_path, monkeypatch):
  """Once, if it fails: training goes on then."""
  publish, ended = integrity.publish, []

  def slow(*arguments):
    time.sleep(0.5)
    ended.append(True)
    publish(*arguments)

  monkeypatch.setattr(integrity, 'publish', slow)
  with Checkpoints(tmp_path, SETTINGS, report=lambda text: None) as checkpoints:
    checkpoints.await_finished(1)
    checkpoints.save(5, state)
    checkpoints.await_finished(5)
    assert ended
    assert checkpoints.latest_step == 5
    checkpoints.save(10, state)
    checkpoints.await_finished(5)
    assert len(ended) == 1, 'it has one that is new enough'
    checkpoints.wait()
    monkeypatch.setattr(integrity, 'publish', _full_disk)
    checkpoints.save(15, state)
    checkpoints.await_finished(15)
    assert checkpoints.latest_step == 10


def test_saves_by_the_clock(state, tmp_path, clock):
  with Checkpoints(tmp_path, CheckpointConfig(every_minutes=2)) as checkpoints:
    assert not checkpoints.wants_save()
    clock.seconds += 121
    assert checkpoints.wants_save()
    checkpoints.save(1, state)
    assert not checkpoints.wants_save()
  with Checkpoints(tmp_path, SETTINGS) as checkpoints:
    clock.seconds += 10**6
    assert not checkpoints.wants_save(), 'no clock unless asked for'


@pytest.mark.filterwarnings('ignore')  # what libraries say of such files
def test_nothing_in_a_checkpoint_is_code(run, folder):
  """A pickle in any of its files would be run by whoever unpickles it."""
  ran = folder / 'ran'

  class Attack:
    def __reduce__(self):
      return (open, (str(ran), 'w'))

  for path in [path for path in (folder / '6').rglob('*') if path.is_file()]:
    copy = shutil.copytree(folder / '6', folder / '9')
    target = copy / path.relative_to(folder / '6')
    target.write_bytes(pickle.dumps(Attack()))
    # Whoever made it has fitting digests, too.
    for name in ('process_0.json', integrity.MANIFEST):
      (copy / name).unlink()
    with contextlib.suppress(Exception):  # refusing it is as good as ignoring it
      integrity.write_share(checkpoint_lib.epath.Path(copy), 0, {'position': None})
      integrity.publish(checkpoint_lib.epath.Path(copy), 1, {'step': 9, 'validation_loss': None})
      with Checkpoints(folder, SETTINGS, report=lambda text: None, read_only=True) as checkpoints:
        checkpoints.restore(9, run.abstract)
    assert not ran.exists()
    shutil.rmtree(copy)
