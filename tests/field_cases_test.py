"""Faults that use brought to light, by kind: what was once silently wrong."""

import dataclasses
import errno
import io
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import tokenizers as hugging_face

from mor_jax import cli, train
from mor_jax.checkpoints.checkpoint import Checkpoints
from mor_jax.config import CheckpointConfig, Config, ConfigError, DataConfig, resolve, with_changes
from mor_jax.console import Output
from mor_jax.data import corpus, dataset, revisions, tokenizer
from mor_jax.errors import RunError
from mor_jax.parallel import device_memory, runtime
from mor_jax.runs import metrics, summary
from mor_jax.runs.run_folder import RunFolder

# ---- vocabularies with holes ----


def word_level(path: pathlib.Path, words: dict[str, int]) -> pathlib.Path:
  """A tokenizer.json of whole words with these ids."""
  backend = hugging_face.Tokenizer(hugging_face.models.WordLevel(words, unk_token='<unk>'))
  backend.pre_tokenizer = hugging_face.pre_tokenizers.WhitespaceSplit()
  path.parent.mkdir(parents=True, exist_ok=True)
  backend.save(str(path))
  return path


@pytest.fixture
def holed(tmp_path):
  """Settings of a corpus whose tokenizer has 4 entries and ids up to 70000."""
  path = word_level(tmp_path / 'holed' / 'tokenizer.json', {'<unk>': 0, '</s>': 1, 'low': 2, 'high': 70000})
  for number in range(40):
    (tmp_path / f'{number}.txt').write_text(f'low high {"low " * number}')
  return DataConfig(
    source=f'files:{tmp_path}/*.txt',
    tokenizer=str(path),
    separator='</s>',
    seq_len=8,
    cache_dir=str(tmp_path / 'cache'),
    validation_fraction=0.2,
  )


def test_ids_above_the_number_of_entries_are_kept(holed):
  prepared = dataset.prepare(holed)
  assert prepared.manifest.vocab_size == prepared.tokenizer.vocab_size == 70001
  assert prepared.tokenizer.entries == 4
  assert max(row['tokens'].max() for row in prepared.rows('train')) == 70000


def test_rows_that_lost_ids_to_an_earlier_version_are_refused(holed):
  folder = dataset.prepare(holed).folder
  manifest = json.loads((folder / 'manifest.json').read_text())
  (folder / 'manifest.json').write_text(json.dumps(manifest | {'vocab_size': 4}))
  with pytest.raises(ConfigError, match='its vocabulary has holes'):
    dataset.open_dataset(folder)


# ---- which corpus, which tokenizer ----


def fingerprint(path: os.PathLike, **settings) -> str:
  return corpus.open_source(DataConfig(source=f'files:{path}', **settings)).fingerprint()


def test_a_file_rewritten_within_a_second_is_another_corpus(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_text('one text')
  before, times = fingerprint(path), path.stat()
  path.write_text('two text')
  os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
  assert fingerprint(path) != before


def test_a_file_replaced_with_its_times_kept_is_another_corpus(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_text('one text')
  before, times = fingerprint(path), path.stat()
  path.write_text('two text')
  os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
  assert fingerprint(path) != before


def test_equal_names_in_two_folders_are_two_corpora(tmp_path):
  for version, text in (('v1', 'one text'), ('v2', 'two text')):
    (tmp_path / version).mkdir()
    (tmp_path / version / 'a.txt').write_text(text)
    os.utime(tmp_path / version / 'a.txt', ns=(0, 0))
  assert fingerprint(tmp_path / 'v1' / '*.txt') != fingerprint(tmp_path / 'v2' / '*.txt')


@pytest.mark.parametrize('kind', ['hf:{}', 'tfds:{}/train/text'])
def test_a_changed_folder_of_a_library_is_another_corpus(tmp_path, kind):
  def found():
    return corpus.open_source(DataConfig(source=kind.format(tmp_path))).fingerprint()

  (tmp_path / 'train.jsonl').write_text('{"text": "one"}')
  before = found()
  assert found() == before
  (tmp_path / 'train.jsonl').write_text('{"text": "two"}')
  assert found() != before


def test_a_new_revision_on_the_hub_is_another_corpus_and_the_last_one_serves_without_a_network(
  tmp_path, monkeypatch
):
  def found(spec='some/dataset'):
    return corpus.open_source(DataConfig(source=f'hf:{spec}', cache_dir=str(tmp_path))).fingerprint()

  answers = {'some/dataset': 'aaaa'}
  monkeypatch.setattr(revisions, '_ask', answers.get)
  first = found()
  answers['some/dataset'] = 'bbbb'
  second = found()
  answers.clear()
  assert first != second == found()
  assert found('some/dataset@aaaa') == found('some/dataset@aaaa') != second


def test_a_tokenizer_that_draws_its_tokens_is_refused(tmp_path):
  backend = hugging_face.Tokenizer(
    hugging_face.models.BPE({'a': 0, 'b': 1, 'ab': 2, '</s>': 3}, [('a', 'b')])
  )
  backend.model.dropout = 0.5
  backend.save(str(tmp_path / 'tokenizer.json'))
  with pytest.raises(ConfigError, match=r'cannot be used: the tokenizer has dropout 0\.5'):
    tokenizer.build(DataConfig(tokenizer=str(tmp_path / 'tokenizer.json'), separator='</s>'))


def test_the_same_tokenizer_in_another_folder_is_the_same(holed, tmp_path):
  folder = dataset.prepare(holed).folder
  copy = tmp_path / 'copy' / 'tokenizer.json'
  copy.parent.mkdir()
  copy.write_bytes(pathlib.Path(holed.tokenizer).read_bytes())
  elsewhere = dataclasses.replace(holed, tokenizer=str(copy))
  assert dataset.dataset_folder(elsewhere).name.rpartition('-')[2] == folder.name.rpartition('-')[2]
  assert dataset.prepare(dataclasses.replace(elsewhere, source=f'prepared:{folder}')).folder == folder
  other = word_level(copy, {'<unk>': 0, '</s>': 1, 'low': 3, 'high': 2})
  with pytest.raises(ConfigError, match='was prepared with tokenizer='):
    dataset.prepare(dataclasses.replace(elsewhere, source=f'prepared:{folder}', tokenizer=str(other)))


def test_a_run_goes_on_with_its_tokenizer_from_another_folder(holed, tmp_path):
  config = with_changes(Config(), data=dataclasses.asdict(holed), model={'vocab_size': 70001})
  prepared, folder = dataset.prepare(holed), RunFolder(tmp_path / 'run')
  folder.create(config, prepared)
  moved = with_changes(config, data={'tokenizer': str(folder.tokenizer)})
  folder.check(moved)
  folder.create(moved, dataset.prepare(moved.data))
  with pytest.raises(ConfigError, match=r'data\.tokenizer was .*, now bytes'):
    folder.check(with_changes(config, data={'tokenizer': 'bytes'}))


# ---- work that must not be lost ----


class FullDisk(io.FileIO):
  """A file on a disk with room for so many bytes more."""

  room = 0

  def write(self, content) -> int:
    kept = bytes(content)[: FullDisk.room]
    if content and not kept:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    FullDisk.room -= len(kept)
    return super().write(kept)


def test_metrics_wait_for_room_on_a_full_disk(tmp_path, monkeypatch):
  told, room = [], {'left': True}

  class FullBoard:
    def __init__(self, *_):
      if not room['left']:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write = close = __init__

  monkeypatch.setattr(metrics, 'Board', FullBoard)
  with metrics.MetricsLog(tmp_path, 0, report=told.append) as log:
    log._file.close()
    log._file = FullDisk(tmp_path / 'metrics.jsonl', 'r+')
    FullDisk.room = 70
    for step in range(1, 5):
      room['left'] = step < 3
      log.write(step, {'train/loss': 1 / step})
    assert len(metrics.read(tmp_path / 'metrics.jsonl')) == 2
    assert len(told) == 1
    assert 'No space left on device' in told[0]
    FullDisk.room, room['left'] = 10_000, True
    log.write(5, {'train/loss': 0.5})
  assert [record['step'] for record in metrics.read(tmp_path / 'metrics.jsonl')] == [1, 2, 3, 4, 5]
  assert metrics.read(tmp_path / 'metrics.jsonl')[2] == {'step': 3, 'train/loss': 1 / 3}


def test_a_folder_without_room_is_refused_in_a_sentence(tmp_path, monkeypatch):
  def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(metrics, 'write_atomically', full)
  with pytest.raises(RunError, match=r'workdir=.* cannot be written \(No space left on device\); make room'):
    metrics.MetricsLog(tmp_path, 0)


LOOP = """
import signal, sys, time
from mor_jax.console import open_console, print_line
from mor_jax.training.watch import stopping

for number in stopping.HANDLED:
  signal.signal(number, signal.SIG_DFL)  # whoever runs the tests may have them ignored
with stopping.Signals() as signals:
  console = open_console(lost=signals.output_lost)
  with signals.training():
    for step in range(300):
      print_line(console, f'step {step} \u2713')
      time.sleep(0.02)
      if signals.received:
        print('saved after step', step, file=sys.stderr, flush=True)
        break
  signals.exit_code(signals.received)
"""


@pytest.mark.parametrize(
  ('happens', 'code'),
  [(signal.SIGHUP, 129), (signal.SIGQUIT, 131), ('reader gone', 141), ('terminal gone', 141)],
)
def test_the_state_is_saved_however_the_user_goes_away(happens, code):
  reader, writer = os.openpty() if happens == 'terminal gone' else os.pipe()
  command = [sys.executable, '-c', LOOP]
  with subprocess.Popen(command, stdout=writer, stderr=subprocess.PIPE, text=True) as process:
    os.close(writer)
    assert os.read(reader, 6) == b'step 0'
    if isinstance(happens, str):
      os.close(reader)
    else:
      process.send_signal(happens)
    errors = process.stderr.read()
    assert process.wait(timeout=30) == code
  assert 'saved after step' in errors


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='only Linux has a device that is full')
def test_output_without_room_ends_nothing(tmp_path):
  program = 'from mor_jax.console import open_console, print_line\nconsole = open_console()\n'
  program += (
    "for i in range(3):\n  print_line(console, 'text')\nprint('still here', file=__import__('sys').stderr)"
  )
  with open('/dev/full', 'w') as full:
    done = subprocess.run(
      [sys.executable, '-c', program], stdout=full, stderr=subprocess.PIPE, text=True, check=True
    )
  assert done.stderr.count('WARNING: output cannot be written (No space left on device)') == 1
  assert 'still here' in done.stderr


@pytest.mark.parametrize('encoding', ['ascii', 'latin-1'])
def test_text_that_a_terminal_cannot_show_is_shown_as_it_can(encoding):
  stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
  Output(stream, None).write('a \u20ac b')
  stream.flush()
  assert stream.buffer.getvalue() == b'a ? b'


# ---- a sentence instead of a traceback ----


def test_a_vocabulary_that_cannot_say_unknown_words_is_refused(tmp_path):
  backend = hugging_face.Tokenizer(hugging_face.models.WordLevel({'a': 0, '</s>': 1}, unk_token='<unk>'))
  backend.save(str(tmp_path / 'tokenizer.json'))
  with pytest.raises(ConfigError, match='cannot encode words that it does not know'):
    tokenizer.build(DataConfig(tokenizer=str(tmp_path / 'tokenizer.json'), separator='</s>'))


def run_train(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
  command = [sys.executable, '-m', 'mor_jax.train', '--config=configs/tiny.py', *words]
  return subprocess.run(
    command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
  )


def test_a_platform_that_is_not_there_is_named(tmp_path):
  done = run_train(f'--workdir={tmp_path / "run"}', JAX_PLATFORMS='rocm')
  assert done.returncode == 2
  assert done.stderr.strip().startswith('error: JAX_PLATFORMS=rocm names a platform')
  assert 'Traceback' not in done.stderr


@pytest.mark.parametrize(('tasks', 'several'), [('', False), ('1', False), ('4', True)])
def test_slurm_may_leave_its_number_of_tasks_empty(tasks, several):
  found = runtime.find(runtime.Processes(), None, {'SLURM_PROCID': '0', 'SLURM_NTASKS': tasks})
  assert (found is not None) == several


def test_numbers_of_steps_may_be_written_short():
  assert cli.parse_setting('train.steps', '1e4') == 10_000
  with pytest.raises(ConfigError, match=r'train\.steps=1\.5e0 must be an integer'):
    cli.parse_setting('train.steps', '1.5e0')


def test_paths_begin_at_home(monkeypatch):
  monkeypatch.setenv('HOME', '/home/somebody')
  config = resolve({'checkpoint': {'folder': '~/c'}, 'data': {'cache_dir': '~'}, 'init': {'source': 'a~b'}})
  assert (config.checkpoint.folder, config.data.cache_dir) == ('/home/somebody/c', '/home/somebody')
  assert config.init.source == 'a~b'


def test_a_checkpoint_folder_that_cannot_be_written_is_refused_first(tmp_path):
  (tmp_path / 'file').write_text('')
  config = with_changes(Config(), checkpoint={'folder': str(tmp_path / 'file' / 'c')})
  with pytest.raises(ConfigError, match=r'checkpoint\.folder=.* cannot be written \(Not a directory\)'):
    RunFolder(tmp_path / 'run').check(config)
  assert not (tmp_path / 'run').exists()


def test_a_step_too_large_for_the_machine_is_refused_with_what_would_fit(finished_run, tmp_path, monkeypatch):
  config, _ = finished_run
  monkeypatch.setattr(device_memory, 'host_free', lambda: 1_000_000.0)
  with pytest.raises(
    ConfigError,
    match=r'needs \d\.\d MB of memory on each device, .* 1\.0 MB are free; .*accumulation.*--suggest',
  ):
    train.main(config, str(tmp_path / 'run'))


def test_what_this_machine_has_left_is_known():
  assert 1e8 < device_memory.host_free() < 1e14
  assert device_memory.free(jax.devices()) == pytest.approx(device_memory.host_free(), rel=0.2)


def test_a_corpus_repeated_too_often_is_told(holed):
  prepared = dataset.prepare(holed)
  rows = prepared.manifest.splits['train'].rows
  few, many = (with_changes(Config(), train={'steps': 500, 'global_batch': size}) for size in (1, rows))
  assert summary.warn_of_repetition(many, prepared).startswith('WARNING: the run goes 500 times over the')
  assert (summary.warn_of_repetition(few, prepared) is None) == (4 * rows >= 500)


# ---- texts that a tokenizer takes for something else, or cannot take ----


@pytest.mark.parametrize('kind', ['added', 'unigram', 'word'])
def test_a_text_that_spells_the_separator_does_not_end_its_document(tmp_path, kind):
  if kind == 'added':
    backend = hugging_face.Tokenizer(
      hugging_face.models.BPE({sign: i for i, sign in enumerate('abc<>/s')}, [])
    )
    backend.add_tokens([hugging_face.AddedToken('</s>', special=False)])
  elif kind == 'unigram':
    pieces = [('<unk>', 0.0), ('</s>', -1.0), *((sign, -3.0) for sign in 'abc<>/s')]
    backend = hugging_face.Tokenizer(hugging_face.models.Unigram(pieces, 0))
  else:
    backend = hugging_face.Tokenizer(
      hugging_face.models.WordLevel({'<unk>': 0, '</s>': 1, 'a': 2}, unk_token='<unk>')
    )
    backend.pre_tokenizer = hugging_face.pre_tokenizers.WhitespaceSplit()
  backend.save(str(tmp_path / 'tokenizer.json'))
  made = tokenizer.Tokenizer.load(tmp_path / 'tokenizer.json', '</s>')
  text = 'ab</s>c</s>' if kind != 'word' else 'a </s> a'
  assert made.end_of_text not in made.encode(text)
  assert made.encode_batch([text, 'a']) == [made.encode(text), made.encode('a')]
  if kind == 'added':
    assert made.decode(made.encode(text)).replace(' ', '') == text
  assert made.encode('a') == [made.token_to_id('a')]


@pytest.mark.parametrize('leaves_out', [False, True])
def test_text_that_a_tokenizer_cannot_say_is_counted_and_refused_above_a_share(tmp_path, leaves_out):
  signs = {sign: i for i, sign in enumerate(['</s>', '<unk>', *'abcdefgh '])}
  model = hugging_face.models.BPE(signs, [], **({} if leaves_out else {'unk_token': '<unk>'}))
  hugging_face.Tokenizer(model).save(str(tmp_path / 'tokenizer.json'))
  for number in range(40):
    (tmp_path / f'{number}.txt').write_text('abc def ' * (9 + number) + '\u0416')
  data = DataConfig(
    source=f'files:{tmp_path}/*.txt',
    tokenizer=str(tmp_path / 'tokenizer.json'),
    separator='</s>',
    seq_len=16,
    cache_dir=str(tmp_path / 'cache'),
    validation_fraction=0.2,
  )
  told = []
  prepared = dataset.prepare(data, report=told.append)
  assert prepared.manifest.unsaid == 40
  assert any('has no token for 40 characters or words' in line for line in told)
  for number in range(40):
    (tmp_path / f'{number}.txt').write_text('\u0416\u4e2d' * 30 + ' abcdefgh' * number)
  with pytest.raises(ConfigError, match=r'has no token for 2,400 .*data\.max_unknown_fraction=0\.05; use'):
    dataset.prepare(data)


# ---- files of settings ----


def test_a_config_may_import_its_neighbour_and_have_a_colon_in_its_path(tmp_path):
  for name, steps in (('a:b', 3), ('c', 4)):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'shared_by_them.py').write_text(f'STEPS = {steps}')
    (tmp_path / name / 'run.py').write_text(
      'from mor_jax import config\nfrom shared_by_them import STEPS\n\n\n'
      'def get_config(variant="one"):\n  made = config.default()\n  made.name = variant\n'
      '  made.train.warmup_steps, made.train.steps = 0, STEPS\n  return made\n'
    )
  for name, steps in (('a:b', 3), ('c', 4)):
    assert cli.load_config(str(tmp_path / name / 'run.py'), {}).train.steps == steps
    made = cli.load_config(f'{tmp_path / name / "run.py"}:other', {})
    assert (made.name, made.train.steps) == ('other', steps)
  assert str(tmp_path / 'c') not in sys.path


# ---- starting among others ----


LONELY = """
import sys
from mor_jax.parallel import runtime

runtime.PATIENCE = 2
runtime.initialize(runtime.Processes(sys.argv[1], 2, 0))
"""


def test_a_first_process_without_its_peers_ends_with_a_sentence():
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  command = [sys.executable, '-c', LONELY, f'localhost:{port}']
  done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
  assert done.returncode == 1
  assert 'the processes did not find each other through localhost' in done.stderr


def test_a_disk_that_stays_full_does_not_end_the_training(tmp_path, monkeypatch):
  told = []
  checkpoints = Checkpoints(tmp_path, CheckpointConfig(), report=told.append)
  checkpoints._note_failure(1, OSError(errno.ENOSPC, 'full'))

  def full():
    raise OSError(errno.ENOSPC, 'full')

  with monkeypatch.context() as patch:
    patch.setattr(checkpoints, '_open', full)
    checkpoints.save(2, {'a': np.zeros(3)})
    checkpoints.save(3, {'a': np.zeros(3)})
  checkpoints.save(4, {'a': np.zeros(3)})
  checkpoints.wait()
  assert checkpoints.latest_step == 4
  checkpoints.__exit__()
