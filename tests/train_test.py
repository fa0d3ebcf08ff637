"""The training job from settings to result, on a tiny model and a few of the corpus's documents."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from mor_jax import train
from mor_jax.config import Config, ConfigError, with_changes
from mor_jax.data import loader
from mor_jax.model import flops
from mor_jax.runs import metrics
from mor_jax.runs.run_folder import RunFolder
from mor_jax.training.watch.nonfinite import NonFiniteError

KILL_BEFORE_STEP = 17
KILLED_RUN = f"""
import json, os, sys
from mor_jax import config, train
from mor_jax.data import loader
from mor_jax.training.watch import goodput

goodput.WRITE_EVERY = 0
batches = loader.train_batches

def deadly(*args, start_step, **hosts):
  for step, batch in enumerate(batches(*args, start_step=start_step, **hosts), start_step + 1):
    if step == {KILL_BEFORE_STEP}:
      os.kill(os.getpid(), int(sys.argv[3]))
    yield batch

loader.train_batches = deadly
sys.exit(train.main(config.resolve(json.loads(sys.argv[1])), sys.argv[2]))
"""


@pytest.fixture
def config(finished_run) -> Config:
  return finished_run[0]


@pytest.fixture
def finished(finished_run) -> Path:
  return finished_run[1]


def test_leaves_a_complete_run_folder(config, finished):
  assert {path.name for path in finished.iterdir()} == {
    'config.json',
    'data.json',
    'tokenizer.json',
    'metrics.jsonl',
    'goodput.json',
    'tensorboard',
    'checkpoints',
    'summary.json',
  }
  records = metrics.read(finished / 'metrics.jsonl')
  assert [record['step'] for record in records] == list(range(1, 21))
  assert [record['step'] for record in records if 'validation/nll' in record] == [10, 20]
  assert records[-1]['train/loss'] < records[0]['train/loss'] - 1
  for name in (
    'aux_loss',
    'sampling_accuracy',
    'dead_token_ratio',
    'tokens_recursion_2',
    'data_wait_seconds',
  ):
    assert f'train/{name}' in records[0]
  summary = json.loads((finished / 'summary.json').read_text())
  assert summary['validation/nll'] == records[-1]['validation/nll']
  assert summary['parameters'] == sum(
    leaf.size for leaf in jax.tree.leaves(_checkpoint(finished, 20)['params'])
  )
  assert summary['tokens'] == 20 * 8 * 64
  assert (finished / summary['checkpoint']).is_dir()
  assert summary['validation/unigram_entropy'] > summary['validation/bigram_entropy'] > 0


def test_tells_the_user_what_runs_and_what_came_out(config, finished):
  text = (finished.parent / 'output.txt').read_text()
  model = with_changes(config, model={'vocab_size': 257}).model
  ratio = flops.train_flops_per_token(model, 64) / flops.train_flops_per_token(flops.vanilla_of(model), 64)
  for shown in (
    f'{flops.count_parameters(model).total / 1e3:.1f} k',
    '64, 32 of 64',
    f'{ratio:.2f} and ',
    'temporaries',
    'step 20/20  loss',
    'bits per byte',
    'unigram entropy',
    'tokens by recursions taken',
    'The ',
    str(finished / 'checkpoints' / '20'),
    str(finished / 'metrics.jsonl'),
  ):
    assert shown in text, shown
  sections = ['small', 'devices', 'compiled', 'step  1/20', 'step 20/20', 'Finished', 'sample', 'metrics']
  assert sections == sorted(sections, key=lambda section: re.search(rf'^ *{section}', text, re.M).start())


@pytest.mark.parametrize(
  ('number', 'code', 'saves'),
  [
    (signal.SIGKILL, -signal.SIGKILL, (6, 12)),
    pytest.param(signal.SIGTERM, 143, (16,), marks=pytest.mark.slow),
  ],
)
def test_killed_and_resumed_is_bit_for_bit_the_uninterrupted_run(
  config, finished, tmp_path, monkeypatch, number, code, saves
):
  folder = tmp_path / 'killed'
  killed = _run_until_killed(config, folder, number)
  assert killed.returncode == code, killed.stderr
  saved = max(int(path.name) for path in (folder / 'checkpoints').iterdir() if path.name.isdigit())
  assert saved in saves
  if number == signal.SIGTERM:
    assert (
      f'SIGTERM: saved after step 16 in {folder}/checkpoints/16; the same command resumes' in killed.stdout
    )
  _mark_lines(folder / 'metrics.jsonl')

  starts = []
  batches = loader.train_batches

  def recorded(*args, start_step, **hosts):
    starts.append(start_step)
    return batches(*args, start_step=start_step, **hosts)

  monkeypatch.setattr(loader, 'train_batches', recorded)
  train.main(config, str(folder))
  assert starts == [saved], 'it must have resumed, not begun again'
  resumed = metrics.read(folder / 'metrics.jsonl')
  assert [record['step'] for record in resumed if 'marked' not in record] == list(range(saved + 1, 21))

  uninterrupted = metrics.read(finished / 'metrics.jsonl')
  for name in ('step', 'train/loss', 'train/grad_norm', 'train/sampling_accuracy', 'validation/nll'):
    assert [r.get(name) for r in resumed] == [r.get(name) for r in uninterrupted], name
  result = json.loads((folder / 'summary.json').read_text())
  assert result['restarts'] == 1
  assert (result['goodput']['lost'] > 0.01) == (number == signal.SIGKILL)
  _assert_same_last_state(folder, finished)


@pytest.mark.slow
@pytest.mark.parametrize(
  'change',
  [
    {'model': {'attention': 'reference'}},  # the others need accelerators; `auto` is xla here
    {'train': {'loss_chunk': 0}},
    {'train': {'loss_chunk': 100}},
    {'model': {'router_target': 'benefit', 'benefit_rows': 1.0}, 'train': {'readout_rows': 1.0}},
  ],
)
def test_resumes_bit_for_bit_with_every_attention_loss_and_target(config, tmp_path, change):
  changed = with_changes(config, **change)
  killed = _run_until_killed(changed, tmp_path / 'killed', signal.SIGKILL)
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  for name in ('killed', 'uninterrupted'):
    assert train.main(changed, str(tmp_path / name)) == 0
  _assert_same_last_state(tmp_path / 'killed', tmp_path / 'uninterrupted')
  assert json.loads((tmp_path / 'killed' / 'summary.json').read_text())['restarts'] == 1


@pytest.mark.slow
def test_a_restart_does_not_compile_again(config, tmp_path):
  """What a user gets without setting anything: the programs are kept beside the datasets."""
  own = with_changes(config, data={'cache_dir': str(tmp_path / 'cache')})
  environment = {name: value for name, value in os.environ.items() if 'CACHE_DIR' not in name}
  for number, code in ((signal.SIGTERM, 143), (0, 0)):  # 0: no signal
    done = _run_until_killed(own, tmp_path / 'run', number, environment)
    assert done.returncode == code, done.stderr
  first, second = json.loads((tmp_path / 'run' / 'goodput.json').read_text())
  assert second['seconds']['compile'] < 0.6 * first['seconds']['compile']
  assert list((tmp_path / 'cache' / 'xla').glob('jit_train_step*'))


def test_numbers_that_go_wrong_end_the_run_with_all_there_is_to_know(config, tmp_path):
  wild = with_changes(config, train={'learning_rate': 1e18, 'warmup_steps': 0}, checkpoint={'every_steps': 1})
  with pytest.raises(NonFiniteError) as stop:
    train.main(wild, str(tmp_path))
  step = stop.value.step
  assert 1 < step < 10
  rows = loader.batch_rows(_train_rows(tmp_path), (step - 1) * 8, 8, config.data.seed)
  for told in (
    f'nan at step {step} (gradient norms: block.attention ',
    'the update was not applied',
    f'the last checkpoint is {tmp_path}/checkpoints/{step - 1}',
    f'its batch had 8 rows of the training split: {", ".join(map(str, rows))};',
    'train.on_nonfinite=skip',
  ):
    assert told in str(stop.value)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(_checkpoint(tmp_path, step - 1)))


def _train_rows(folder: Path) -> int:
  return RunFolder(folder).read_data()['splits']['train']['rows']


def test_finished_run_shows_its_result_again(config, finished, capsys, monkeypatch):
  before = _content(finished)
  monkeypatch.setattr(jax, 'jit', None)  # nothing is compiled
  train.main(config, str(finished))
  text = capsys.readouterr().out
  assert 'Already finished' in text
  assert f'{json.loads((finished / "summary.json").read_text())["validation/nll"]:.4f}' in text
  assert _content(finished) == before


def test_lost_summary_is_made_again(config, finished, capsys):
  expected = json.loads((finished / 'summary.json').read_text())
  (finished / 'summary.json').unlink()
  train.main(config, str(finished))
  made = json.loads((finished / 'summary.json').read_text())
  assert made | {'goodput': 0, 'restarts': 0} == expected | {'goodput': 0, 'restarts': 0}
  capsys.readouterr()


def test_another_model_is_refused(config, finished):
  before = _content(finished)
  with pytest.raises(ConfigError, match=r'model\.num_recursions was 2, now 1'):
    train.main(with_changes(config, model={'num_recursions': 1}), str(finished))
  assert _content(finished) == before


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'model': {'vocab_size': 100}},
      'model.vocab_size=100 is too small for the tokenizer, whose largest id is 256',
    ),
    ({'data': {'seq_len': 10**8}}, 'data.seq_len=100000000'),
  ],
)
def test_bad_settings_leave_no_folder(config, tmp_path, changes, message):
  with pytest.raises(ConfigError, match=message):
    train.main(with_changes(config, **changes), str(tmp_path / 'runs' / 'bad'))
  assert list(tmp_path.iterdir()) == []


def test_default_folder_is_named_after_the_run(config, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'runs').write_text('in the way')
  with pytest.raises(ConfigError, match='workdir=runs/small cannot be written'):
    train.main(config, None)


def _mark_lines(path: Path) -> None:
  """Makes the lines of the killed process recognisable."""
  lines = [json.dumps(record | {'marked': 1}) for record in metrics.read(path)]
  path.write_text('\n'.join(lines) + '\n')


def _checkpoint(folder: Path, step: int):
  return ocp.load(folder / 'checkpoints' / str(step))


def _run_until_killed(config, folder, number, environment=os.environ) -> subprocess.CompletedProcess[str]:
  """A training in a process of its own, which gets the signal (0: none) before KILL_BEFORE_STEP."""
  command = [sys.executable, '-c', KILLED_RUN, json.dumps(config.to_dict()), str(folder), str(int(number))]
  environment = environment | {'JAX_PLATFORMS': 'cpu'}
  return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def _assert_same_last_state(folder: Path, other: Path) -> None:
  one, two = _checkpoint(folder, 20), _checkpoint(other, 20)
  chex.assert_trees_all_equal(one, two)


def _content(folder: Path) -> dict[str, bytes]:
  return {str(path): path.read_bytes() for path in folder.rglob('*') if path.is_file()}
