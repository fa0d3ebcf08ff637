"""How a run goes on under other settings, and what keeps it from going on as another run."""

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mor_jax import train
from mor_jax.checkpoints import integrity
from mor_jax.config import ConfigError, resolve, with_changes
from mor_jax.parallel import runtime
from mor_jax.runs import lock, metrics
from mor_jax.runs.run_folder import RunFolder


@pytest.fixture
def config(finished_run):
  return finished_run[0]


@pytest.fixture
def copy(finished_run, tmp_path) -> Path:
  """A copy of a finished run of 20 steps."""
  return Path(shutil.copytree(finished_run[1], tmp_path / 'copy'))


def content(folder: Path) -> dict[str, bytes]:
  return {
    str(path): path.read_bytes()
    for path in folder.rglob('*')
    if path.is_file() and path.name != 'goodput.json'
  }


# ---- whose checkpoint ----


def test_a_checkpoint_of_another_run_is_not_adopted(config, copy, tmp_path):
  elsewhere = {'folder': str(copy / 'checkpoints')}
  other = with_changes(config, train={'seed': 7, 'learning_rate': 1e-4}, checkpoint=elsewhere)
  with pytest.raises(
    ConfigError,
    match=r'checkpoint\.folder=.* holds a checkpoint of another run, small: train\.learning_rate was .* '
    r'train\.seed was 0, now 7; .*--allow_change=train\.learning_rate,train\.seed',
  ):
    train.main(other, str(tmp_path / 'other'))


def test_a_checkpoint_of_the_same_settings_or_the_same_run_is_gone_on_from(config, copy):
  folder, newest = RunFolder(copy), copy / 'checkpoints' / '20'
  manifest = json.loads(json.loads((newest / 'manifest.json').read_text())['manifest'])
  with_vocabulary = folder.with_vocabulary(config)
  folder.check_checkpoint(manifest, with_vocabulary)
  changed = with_changes(with_vocabulary, train={'seed': 7})
  folder.check_checkpoint(manifest, changed)  # its own: the folder said that it may change
  foreign = manifest | {'run': 'another'}
  folder.check_checkpoint(foreign, with_vocabulary)
  folder.check_checkpoint(foreign, changed, ['train.seed'])
  with pytest.raises(ConfigError, match='of another run'):
    folder.check_checkpoint(foreign, changed)
  with pytest.raises(ConfigError, match='holds a checkpoint of format 1, and this mor_jax reads format 2'):
    folder.check_checkpoint({name: value for name, value in manifest.items() if name != 'format'}, changed)
  with pytest.raises(ConfigError, match='of unknown settings'):
    folder.check_checkpoint({'format': 2}, changed)


# ---- one process at a time ----


def test_two_processes_do_not_train_in_one_folder(config, copy, tmp_path):
  (copy / 'summary.json').unlink()
  with (
    lock.exclusive(copy, 'workdir'),
    pytest.raises(ConfigError, match=r'^workdir=.* is in use by process \d+ on'),
  ):
    train.main(config, str(copy))
  shared = with_changes(config, checkpoint={'folder': str(tmp_path / 'shared')})
  with (
    lock.exclusive(tmp_path / 'shared', 'checkpoint.folder'),
    pytest.raises(ConfigError, match=r'^checkpoint\.folder=.*shared is in use by process'),
  ):
    train.main(shared, str(tmp_path / 'new'))
  assert not (tmp_path / 'new').exists()
  assert not (tmp_path / 'shared').exists()


def test_a_killed_process_leaves_the_folder_free(tmp_path):
  program = 'import pathlib, sys, time\nfrom mor_jax.runs import lock\n'
  program += 'with lock.exclusive(pathlib.Path(sys.argv[1]), "workdir"):\n  print("has it", flush=True)\n  time.sleep(60)'
  process = subprocess.Popen(
    [sys.executable, '-c', program, tmp_path / 'run'], stdout=subprocess.PIPE, text=True
  )
  assert process.stdout.readline() == 'has it\n'
  with (
    pytest.raises(ConfigError, match=f'is in use by process {process.pid}'),
    lock.exclusive(tmp_path / 'run', 'x'),
  ):
    pass
  process.kill()
  process.wait()
  with lock.exclusive(tmp_path / 'run', 'workdir'):
    pass
  assert not list((tmp_path / 'run').iterdir())


def test_many_starts_at_once_are_checked_without_an_error(config, tmp_path):
  errors = []

  def check():
    try:
      for _ in range(10):
        RunFolder(tmp_path / 'a' / 'b').check(config)
    except BaseException as error:
      errors.append(error)

  threads = [threading.Thread(target=check) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not errors


def test_processes_that_were_started_differently_all_say_so(monkeypatch):
  def gathered(value):
    other = value.copy()
    if value.ndim:
      other[other == ord('1')] = ord('2')
    return [value, other] if value.ndim else value[None]

  runtime.require_agreement({'train.seed': 1})  # one process
  monkeypatch.setattr(runtime.jax, 'process_count', lambda: 2)
  monkeypatch.setattr(runtime.multihost_utils, 'process_allgather', gathered)
  runtime.require_agreement({'train.seed': 3})
  with pytest.raises(ConfigError, match=r'train\.seed is 1 on process 0 and 2 on process 1'):
    runtime.require_agreement({'train.steps': 5, 'train.seed': 1})


# ---- other settings ----


def test_fewer_steps_than_were_trained_are_refused(config, copy):
  (copy / 'summary.json').unlink()
  before = content(copy)
  fewer = with_changes(config, train={'steps': 10})
  with pytest.raises(ConfigError, match=r'train\.steps=10 is less than the 20 steps after which'):
    train.main(fewer, str(copy), allow_change=['train.steps'])
  assert content(copy) == before


def test_another_shape_is_refused_and_the_run_left_as_it_was(config, copy):
  before = content(copy)
  wider = with_changes(config, model={'mlp_dim': 48}, train={'steps': 21})
  message = r'the checkpoint .* does not fit the settings: opt_state/.*mlp.* was \(.*\), now \(.*\); restore'
  with pytest.raises(ConfigError, match=message):
    train.main(wider, str(copy), allow_change=['model.mlp_dim', 'train.steps'])
  assert content(copy) == before


def test_more_steps_and_larger_batches_go_on_where_the_run_has_ended(config, copy, capsys):
  rows, length = config.train.global_batch, config.data.seq_len
  more = with_changes(config, train={'steps': 23, 'global_batch': 2 * rows, 'sample_tokens': 0})
  with pytest.raises(ConfigError, match=r'--allow_change=train\.steps,train\.global_batch'):
    train.main(more, str(copy))
  assert train.main(more, str(copy), allow_change=['train.steps', 'train.global_batch']) == 0
  assert 'resuming after step 20' in capsys.readouterr().out
  records = metrics.read(copy / 'metrics.jsonl')
  assert records[-1]['step'] == 23
  assert records[-1]['train/tokens'] == (20 * rows + 3 * 2 * rows) * length
  summary = RunFolder(copy).read_summary()
  assert (summary['steps'], summary['tokens']) == (23, records[-1]['train/tokens'])
  assert (copy / 'checkpoints' / '23').is_dir()
  stored = json.loads((copy / 'config.json').read_text())
  stored = resolve({name: value for name, value in stored.items() if name not in ('format', 'run')})
  assert stored.train == with_changes(more, model={'vocab_size': 257}).train


def test_a_run_of_an_earlier_version_goes_on(config, copy, capsys):
  """Its files lack what has been added since: an identity, the first token of texts, rows read."""
  for name, added in (('config', ['run']), ('data', ['begin', 'unsaid'])):
    path = copy / f'{name}.json'
    content = json.loads(path.read_text())
    for key in added:
      del content[key]
    content.get('data', {}).pop('begin', None)
    content['format_version'] = 2 if name == 'data' else None
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
  manifest = copy / 'checkpoints' / '20' / 'manifest.json'
  body = json.loads(json.loads(manifest.read_text())['manifest'])
  del body['run'], body['rows_read'], body['config']['data']['begin']
  text = json.dumps(body)
  manifest.write_text(json.dumps({'digest': integrity._digest(text.encode()), 'manifest': text}))
  (copy / 'summary.json').unlink()
  assert train.main(with_changes(config, train={'sample_tokens': 0}), str(copy)) == 0
  assert 'resuming after step 20' in capsys.readouterr().out
