"""Checkpoints whose folder Orbax cannot write to: copied there, and taken from there."""

import pathlib
import shutil

import chex
import jax
import pytest
import tiny_run
from etils import epath

from mor_jax.checkpoints import integrity, mirror
from mor_jax.checkpoints.checkpoint import Checkpoints, ever_finished
from mor_jax.checkpoints.mirror import Mirror
from mor_jax.config import CheckpointConfig, ConfigError
from mor_jax.errors import RunError

SETTINGS = CheckpointConfig(keep=2)
SCHEME = 'elsewhere://'
_roots = []


@epath.register_path_cls(SCHEME)
class _Elsewhere:
  """A file system that Orbax has never heard of; etils finds it by its scheme."""

  def __new__(cls, path):
    return epath.Path(_roots[-1]) / path.removeprefix(SCHEME)


@pytest.fixture
def remote(tmp_path):
  _roots.append(tmp_path / 'remote')
  yield f'{SCHEME}bucket/run'
  _roots.pop()


@pytest.fixture(scope='module')
def state():
  return tiny_run.run().initial()


@pytest.fixture
def local(tmp_path):
  return tmp_path / 'checkpoints'


def opened(local, remote, told=None, **options):
  report = told.append if told is not None else lambda text: None
  return Checkpoints(local, SETTINGS, report=report, mirror=Mirror(remote, local), **options)


@pytest.fixture
def saved(state, local, remote):
  """Steps 1 to 3, of which the newest two are kept."""
  with opened(local, remote) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(step, state.replace(step=jax.numpy.int32(step)))
    checkpoints.wait()
  return epath.Path(remote)


def largest_file(folder):
  files = [path for path in pathlib.Path(folder).rglob('*') if path.is_file()]
  return max(files, key=lambda path: path.stat().st_size)


def step_of(checkpoints, abstract):
  step = checkpoints.newest_good()
  assert int(checkpoints.restore(step, abstract).step) == step
  return step


def test_copies_follow_the_originals(saved, local, remote):
  assert Mirror(remote, local).steps == [2, 3]
  for step in (2, 3):
    assert integrity.problems(saved / str(step)) == []
  assert sorted(path.name for path in saved.iterdir()) == ['2', '3']


def test_a_lost_disk_costs_nothing(saved, local, remote, state):
  shutil.rmtree(local)
  abstract = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
  )
  assert ever_finished(epath.Path(local), Mirror(remote, local))
  with opened(local, remote) as checkpoints:
    assert step_of(checkpoints, abstract) == 3
    restored = checkpoints.restore(3, abstract).replace(step=state.step)
    chex.assert_trees_all_equal(restored, state)
    checkpoints.save(4, state)
    checkpoints.wait()
  assert Mirror(remote, local).steps == [3, 4]  # 2 was removed, though it was never here again


def test_the_copy_replaces_a_damaged_original(saved, local, remote, state):
  payload = largest_file(local / '3')
  payload.write_bytes(payload.read_bytes()[:-1])
  told = []
  with opened(local, remote, told) as checkpoints:
    assert checkpoints.newest_good() == 3
  assert (local / '3.damaged').is_dir()
  assert any('has' in line and 'bytes instead of' in line for line in told)


def test_a_damaged_copy_is_set_aside_and_the_one_before_it_used(saved, local, remote):
  shutil.rmtree(local)
  payload = largest_file(saved / '3')
  contents = payload.read_bytes()
  payload.write_bytes(contents[:-1] + bytes([contents[-1] ^ 1]))
  with opened(local, remote, read_only=True) as checkpoints:
    assert checkpoints.newest_good() == 2
  assert Mirror(remote, local).steps == [2, 3]  # whoever only reads changes nothing there
  shutil.rmtree(local)
  with opened(local, remote) as checkpoints:
    assert checkpoints.newest_good() == 2
  assert Mirror(remote, local).steps == [2]


def test_nothing_good_is_no_new_beginning(saved, local, remote):
  shutil.rmtree(local)
  for step in (2, 3):
    (saved / str(step) / integrity.MANIFEST).write_text('{')
  for _ in range(2):
    with opened(local, remote) as checkpoints, pytest.raises(RunError, match='none of the checkpoints'):
      checkpoints.newest_good()
    shutil.rmtree(local)


def test_a_first_copy_that_was_cut_off_is_no_checkpoint(local, remote, state):
  (epath.Path(remote) / '1').mkdir(parents=True)
  (epath.Path(remote) / '1' / 'left over').write_text('')
  with opened(local, remote) as checkpoints:
    assert checkpoints.newest_good() is None
    checkpoints.save(1, state)
    checkpoints.wait()
  assert Mirror(remote, local).steps == [1]
  assert not (epath.Path(remote) / '1' / 'left over').exists()


def test_a_copy_that_fails_is_reported_and_what_was_there_stays(saved, local, remote, state, monkeypatch):
  copy_file = mirror._copy_file

  def fails(path, copy):
    if path.name == 'process_0.json':
      raise ConnectionError('no route to the bucket')
    copy_file(path, copy)

  told = []
  with opened(local, remote, told) as checkpoints:
    with monkeypatch.context() as broken:
      broken.setattr(mirror, '_copy_file', fails)
      checkpoints.save(4, state)
      with pytest.raises(RunError, match='no route to the bucket'):
        checkpoints.wait()
    assert any('could not be saved: no route' in line for line in told)
    assert Mirror(remote, local).steps == [2, 3]
    checkpoints.save(5, state)
    checkpoints.wait()
  assert Mirror(remote, local).steps == [5]  # 4 is whole here alone; the newest two are kept


def test_folders_are_tried_out(remote, tmp_path):
  mirror.check_folder(remote, writes=True)
  assert list(epath.Path(remote).iterdir()) == []
  (tmp_path / 'remote' / 'file').write_text('')
  with pytest.raises(RunError, match=r'checkpoint\.folder=elsewhere://file/run cannot be reached'):
    mirror.check_folder(f'{SCHEME}file/run', writes=True)
  with pytest.raises(ConfigError, match='no file system is known by nowhere://'):
    mirror.check_folder('nowhere://bucket/run', writes=True)
