"""The command: tables, JSON, and what it refuses."""

import json
import re
import shutil
import subprocess
import sys

import entry_points
import pytest
from absl import flags as absl_flags
from absl.testing import flagsaver

from mor_jax.config import ConfigError


def command(*flags):
  program = [sys.executable, '-m', 'mor_jax.evaluate', *flags]
  return subprocess.run(program, capture_output=True, text=True, check=False)


@pytest.fixture(scope='module')
def evaluated(finished_run, tmp_path_factory):
  """A copy of a finished run, and what evaluating it printed as JSON."""
  run = shutil.copytree(finished_run[1], tmp_path_factory.mktemp('evaluated') / 'run')
  done = command(f'--checkpoint={run}', '--json')
  assert done.returncode == 0, done.stderr
  return run, json.loads(done.stdout), done


def test_losses_agree_with_those_of_the_training(evaluated):
  run, result, _ = evaluated
  summary = json.loads((run / 'summary.json').read_text())
  topk = result['routing']['topk']
  assert topk['nll'] == pytest.approx(summary['validation/nll'], rel=1e-5)
  for name in ('bits_per_byte', 'sampling_accuracy', 'dead_token_ratio', 'mean_depth', 'tokens_recursion_2'):
    assert topk[name] == pytest.approx(summary[f'validation/{name}'], rel=1e-4, abs=1e-6)
  assert result['step'] == 20
  assert result['gap']['nll'] == pytest.approx(result['routing']['threshold']['nll'] - topk['nll'])
  assert [limit['max_recursions'] for limit in topk['recursion_limits']] == [1, 2]
  assert topk['recursion_limits'][1]['nll'] == topk['nll']
  assert topk['recursion_limits'][0]['nll'] != topk['nll']
  assert result['data']['rows'] == 12


def test_result_is_kept_with_the_run(evaluated):
  run, result, done = evaluated
  assert json.loads((run / 'evaluation.json').read_text()) == result
  assert str(run / 'evaluation.json') in done.stderr


def test_tables(evaluated, tmp_path):
  run, result, _ = evaluated
  flags = (f'--checkpoint={run}', '--rows=4', '--step=18', f'--output={tmp_path}/other.json')
  done = command(*flags, '--exits', '--contrast=0,0.5')
  assert done.returncode == 0, done.stderr
  other = json.loads((tmp_path / 'other.json').read_text())
  assert (other['step'], other['data']['rows']) == (18, 4)
  for text in ('bits per byte', 'gap', 'By recursion limit', 'By position', 'dead tokens', 'found no place'):
    assert text in done.stdout
  for mode in ('topk', 'threshold'):
    assert f'{other["routing"][mode]["nll"]:.4f}' in done.stdout
  for text in (
    'readouts of one forward pass',
    'Contrast decoding',
    'What routers thought',
    'is explained by',
  ):
    assert text in done.stdout
  last = other['exits']['readouts'][1]
  assert (last['control'], last['k']) == ('prefix', 2)
  assert last['nll'] == pytest.approx(other['routing']['threshold']['nll'], rel=1e-5)
  assert other['exits']['contrast'][0]['nll'] == pytest.approx(last['nll'], rel=1e-6)
  assert json.loads((run / 'evaluation.json').read_text()) == result, '--output leaves that of the run alone'


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ([], '--checkpoint is missing'),
    (['--checkpoint=nowhere'], 'is not the folder of a run'),
    (['--checkpoint=RUN', '--rows=-1'], '--rows=-1 is not allowed'),
    (['--checkpoint=RUN', '--step=7'], '--step=7: '),
    (['--checkpoint=RUN', '--data=prepared:nowhere'], 'there is no prepared dataset nowhere'),
    (['--checkpoint=RUN', '--output=nowhere/else.json'], 'there is no folder'),
    (['--checkpoint=EMPTY'], 'has no checkpoint yet'),
    (['--checkpoint=RUN', '--mean_depth=1.5'], '--mean_depth=1.5 is for --router=confidence'),
    (['--checkpoint=RUN', '--contrast=0.5'], '--contrast=0.5 is for --exits'),
    (['--checkpoint=RUN', '--rows=4', '--exits', '--contrast=much'], '--contrast=much must be numbers'),
    (['--checkpoint=RUN', '--exits', '--tasks=piqa'], '--exits=True is not used with --tasks'),
    (['--checkpoint=RUN', '--rows=4', '--router=confidence'], 'fitted on every second batch'),
  ],
)
def test_bad_input(evaluated, tmp_path, flags, message):
  run = evaluated[0]
  shutil.copy(run / 'config.json', tmp_path)
  given = [flag.replace('RUN', str(run)).replace('EMPTY', str(tmp_path)) for flag in flags]
  evaluate = entry_points.load('mor_jax.evaluate')
  with flagsaver.flagsaver():
    absl_flags.FLAGS(['evaluate', *given])
    with pytest.raises(ConfigError, match=re.escape(message)):
      evaluate.main()


@pytest.mark.parametrize(
  ('router', 'flags', 'depth'), [('all', [], 2), ('confidence', ['--batch_size=2', '--mean_depth=1.5'], 1.5)]
)
def test_other_routers_have_a_result_of_their_own(evaluated, router, flags, depth):
  """Of all rows, also where the choice is fitted on some of them."""
  run, result, _ = evaluated
  done = command(f'--checkpoint={run}', f'--router={router}', '--json', *flags)
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  assert json.loads((run / f'evaluation_{router}.json').read_text()) == found
  assert list(found['routing']) == [router]
  figures = found['routing'][router]
  assert figures['mean_depth'] == pytest.approx(depth, abs=0.2)
  assert figures['predicted_tokens'] == result['routing']['topk']['predicted_tokens']
  assert json.loads((run / 'evaluation.json').read_text()) == result


def test_other_text_is_measured_whole_and_kept_apart(evaluated, tmp_path):
  run, result, _ = evaluated
  (tmp_path / 'text.txt').write_text('the boats came in before the storm ' * 40)
  done = command(f'--checkpoint={run}', f'--data=files:{tmp_path}/text.txt', '--json')
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  assert found['routing']['topk']['predicted_tokens'] > 1300
  assert json.loads((run / 'evaluation_data.json').read_text()) == found
  assert json.loads((run / 'evaluation.json').read_text()) == result


def test_a_folder_without_checkpoint_ends_the_command(evaluated, tmp_path):
  shutil.copy(evaluated[0] / 'config.json', tmp_path)
  done = command(f'--checkpoint={tmp_path}')
  assert done.returncode == 2
  assert done.stderr.startswith('error: ')
  assert 'Traceback' not in done.stderr
