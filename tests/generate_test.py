"""python -m mor_jax.generate: streamed and coloured text, batches in JSONL, and what it refuses."""

import dataclasses
import functools
import io
import json
import os
import shutil
import subprocess
import sys

import entry_points
import jax
import numpy as np
import pytest
import tiny_run
from absl.testing import flagsaver
from rich.console import Console

from mor_jax.cli import engines
from mor_jax.config import ConfigError
from mor_jax.data import tokenizer as tokenizers
from mor_jax.evaluation import calibration
from mor_jax.inference import batch
from mor_jax.inference.requests import Request, Result
from mor_jax.inference.scheduler import Scheduler
from mor_jax.inference.terminal import Writer
from mor_jax.interop import huggingface
from mor_jax.runs.restore import load_run
from tests import tiny, tiny_engine


def command(*flags, devices=1):
  program = [sys.executable, '-m', 'mor_jax.generate', *flags]
  env = os.environ | {'JAX_NUM_CPU_DEVICES': str(devices)}
  return subprocess.run(program, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope='module')
def tokenizer():
  return tokenizers.build(tiny_run.CONFIG.data)


def test_samples_of_a_prompt_are_printed(finished_run):
  done = command(
    f'--checkpoint={finished_run[1]}',
    '--prompt=The ',
    '--num_samples=2',
    '--max_new_tokens=12',
    '--show_depth',
    '--speculate=2',
  )
  assert done.returncode == 0, done.stderr
  legend, *samples = done.stdout.splitlines()
  assert legend == 'recursions: 0 1 2'
  assert done.stdout.count('T[') == 2
  assert [line for line in samples if line.startswith('---')] == [
    '--- sample 1 (seed 0)',
    '--- sample 2 (seed 1)',
  ]
  for said in (
    '24 tokens in',
    'tokens/s',
    'first token after',
    'mean depth',
    'without a place',
    'tokens a draft',
  ):
    assert said in done.stderr


@pytest.mark.slow
def test_a_file_of_prompts_is_answered_line_by_line(finished_run, tmp_path):
  lines = [{'prompt': 'The harbour'}, {'prompt': ''}, {'tokens': [72, 105], 'max_new_tokens': 3, 'id': 'x'}]
  (tmp_path / 'in.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  flags = f'--checkpoint={finished_run[1]}', f'--input={tmp_path}/in.jsonl', '--max_new_tokens=5'
  flags += '--max_recursions=1', '--temperature=0'
  done = command(*flags, f'--output={tmp_path}/out.jsonl')
  assert done.returncode == 1
  assert '1 of 3 lines could not be answered' in done.stderr
  whole = (tmp_path / 'out.jsonl').read_text()
  first, second, third = map(json.loads, whole.splitlines())
  assert len(first['tokens']) == 5
  assert first['prompt_depths'] + first['depths'] == [1] * 15, 'one recursion each; the last token takes none'
  assert first['finish'] == 'length'
  assert second == {'error': 'the prompt is empty; give at least one token'}
  assert (len(third['tokens']), third['id']) == (3, 'x')

  # As if it had been killed while it wrote the last answer.
  (tmp_path / 'out.jsonl').write_text(whole[:-20])
  assert command(*flags, f'--output={tmp_path}/out.jsonl', '--resume').returncode == 0
  assert (tmp_path / 'out.jsonl').read_text() == whole
  for more in (f'--output={tmp_path}/in.jsonl', '--slots=0'):  # nothing is lost by a command that is refused
    refused = command(*flags, f'--output={tmp_path}/out.jsonl', more)
    assert refused.returncode == 2
    assert (tmp_path / 'out.jsonl').read_text() == whole
    assert (tmp_path / 'in.jsonl').read_text() == '\n'.join(map(json.dumps, lines))


@pytest.mark.slow
def test_a_mesh_prints_the_same_text(finished_run):
  """Two texts on four devices, each with a slot of its own; and what cannot be divided."""
  flags = f'--checkpoint={finished_run[1]}', '--prompt=The ', '--num_samples=2', '--max_new_tokens=12'
  mesh = '--config.parallel.replica=2', '--config.parallel.fsdp=2'
  one, four = command(*flags, devices=4), command(*flags, *mesh, devices=4)
  assert four.returncode == 0, four.stderr
  assert four.stdout == one.stdout
  for more, message in (
    ((*mesh, '--slots=3'), 'slots=3 cannot be divided among the 4 parts'),
    (('--config.parallel.tensor=3',), 'cannot be laid out on 4 devices'),
    (('--config.parallel.tensor=2',), 'model.num_kv_heads=1 cannot be split into parallel.tensor=2'),
  ):
    refused = command(*flags, *more, devices=4)
    assert refused.returncode == 2
    assert message in refused.stderr


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ((), 'give one of --prompt, --prompt_file, --input and --chat; there is none of them'),
    (('--prompt=',), '--prompt is empty'),
    (('--prompt=a', '--temperature=-1'), '--temperature=-1.0 is not allowed: must be >= 0'),
    (('--prompt=' + 'a' * 64,), 'the prompt has 64 tokens, which leaves no room in a cache of max_len=64'),
    (('--prompt=a', '--max_len=99999999'), 'GB for keys and values on each device'),
    (('--prompt=a', '--capacities=1.0,0.1'), 'first run python -m mor_jax.calibrate'),
    (
      ('--prompt=a', '--speculate=many'),
      '--speculate=many is not allowed: must be auto, or a number of tokens',
    ),
    (('--prompt=a', '--logprobs=2'), '--logprobs=2 is for batch mode'),
    (('--prompt=a', '--resume'), '--resume goes on with the answers in a file'),
  ],
)
def test_refuses(finished_run, flags, message):
  done = command(f'--checkpoint={finished_run[1]}', *flags)
  assert done.returncode == 2, done.stderr
  assert message in done.stderr
  assert len(done.stderr.splitlines()) < 4


def test_a_run_without_tokenizer_is_refused(finished_run, tmp_path):
  run = shutil.copytree(finished_run[1], tmp_path / 'run')
  (run / 'tokenizer.json').unlink()
  done = command(f'--checkpoint={run}', '--prompt=a')
  assert done.returncode == 2
  assert 'has no tokenizer: put the tokenizer.json' in done.stderr


# ---- without a process of its own ----


def test_lines_are_answered_in_their_order_and_bad_ones_harm_nobody(tokenizer):
  engine = two_slots()
  template = Request((256,), max_new_tokens=4)
  lines = [
    '{"prompt": "a", "max_new_tokens": 30}',
    'no JSON',
    '{"prompt": "b", "temperature": 1, "seed": 3, "stop_strings": ["zz"]}',
    '{"text": "c"}',
    '{"tokens": [1, 999]}',
    '{"tokens": "a"}',
    '{"prompt": "d", "colour": "red"}',
    '{"prompt": "e", "temperature": "hot"}',
    '{"prompt": "f", "max_recursions": null}',
  ]
  output = io.StringIO()
  refused = batch.answer(Scheduler(engine, tokenizer), tokenizer, template, lines, output)
  answers = [json.loads(line) for line in output.getvalue().splitlines()]
  assert refused == 6
  assert [len(answer.get('tokens', ())) for answer in answers] == [30, 0, 4, 0, 0, 0, 0, 0, 4]
  errors = [answer['error'] for answer in answers if 'error' in answer]
  for message, error in zip(
    ('not JSON', '"prompt", a text', 'token 999', 'must be a list', '"colour"', "temperature='hot'"),
    errors,
    strict=True,
  ):
    assert message in error
  # A negative temperature is refused like everything that a flag would refuse.
  one = io.StringIO()
  assert batch.answer(
    Scheduler(engine, tokenizer), tokenizer, template, ['{"prompt":"a","temperature":-1}'], one
  )
  assert 'temperature=-1.0 is not allowed' in one.getvalue()


@functools.cache
def two_slots():
  """An engine of a tiny model for 64 tokens."""
  run = tiny_run.run()
  return tiny_engine.engine(run.model, run.initial().variables, slots=2)


def answers_to(tokenizer, lines, **options):
  """The answers to lines, of a tiny model."""
  template, output = Request((256,), max_new_tokens=8, temperature=1.0), io.StringIO()
  batch.answer(Scheduler(two_slots(), tokenizer), tokenizer, template, lines, output, **options)
  text = output.getvalue()
  text.encode()
  return [json.loads(line) for line in text.split('\n')[:-1]]


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    ('{"prompt": "\\ud800"}', 'half of a surrogate pair'),
    ('{"prompt": "a", "stop_strings": 1e9}', 'stop_strings=1000000000.0 must be a list'),
    (
      '{"prompt": "a", "top_k": 99999999999}',
      'top_k=99999999999 is not allowed: must be from 0 to 2**31 - 1',
    ),
    ('{"prompt": "a", "temperature": 1' + '0' * 400 + '}', '... is too large'),
    ('{"prompt": "a", "temperature": 1e300}', 'temperature=1e+300 is not allowed'),
    ('{"prompt": "a", "top_p": NaN}', 'top_p=nan is not allowed'),
    ('{"prompt": "a", "min_p": 1.5}', 'min_p=1.5 is not allowed'),
    ('{"prompt": "a", "logit_bias": {"a": 1}}', 'must be an object of numbers by token id'),
    ('{"prompt": "a", "logit_bias": {"999": 1}}', 'token 999 is outside the vocabulary'),
    ('{"prompt": "a", "logit_bias": {"1": 1e400}}', 'is not allowed: must be finite numbers for at most 300'),
    ('{"prompt": "a", "max_new_tokens": 1' + '0' * 400 + '}', 'max_new_tokens=1'),
    ('{"prompt": "a", "seed": ' + '1' * 5000 + '}', 'the line is not JSON'),
    ('{"tokens": [1' + '0' * 400 + ']}', 'is outside the vocabulary'),
    ('[' * 100_000, 'the line is not JSON: it is nested too deep'),
    ('{"prompt": "a", "stop_tokens": ' + '[' * 900 + ']' * 900 + '}', 'must be a list of int'),
    (b'{"prompt": "\xff"}', 'the line is not JSON'),
    ('{"prompt": "a", "\\ud800": 1}', 'unknown field "\ud800"'),
  ],
)
def test_whatever_a_line_is_the_others_are_answered(tokenizer, line, message):
  first, bad, last = answers_to(tokenizer, ['{"prompt": "a"}', line, '{"prompt": "a", "id": null}'])
  assert message in bad['error']
  assert len(bad['error']) < 400
  assert len(first['tokens']) == len(last['tokens']) == 8
  assert next(iter(last)) == 'id'


def test_equal_lines_get_other_texts_whose_seeds_are_told(tokenizer):
  lines = ['{"prompt": "a"}'] * 3 + ['{"prompt": "a", "seed": 1, "id": "x"}']
  lines.append('{"tokens": [97, 195]}')  # which ends inside a character
  found = answers_to(tokenizer, lines)
  assert len(found.pop()['tokens']) == 8
  lines.pop()
  texts = [entry['text'] for entry in found]
  assert len(set(texts)) == 3
  assert texts[3] == texts[1]
  assert [entry.get('id') for entry in found] == [None, None, None, 'x']
  assert answers_to(tokenizer, lines, first=2) == found[2:]


def test_answers_have_log_probabilities_if_wanted(tokenizer):
  run = tiny_run.run()
  engine = tiny_engine.engine(run.model, run.initial().variables, slots=2, top_logprobs=2)
  output = io.StringIO()
  line = '{"prompt": "ab", "logit_bias": {"99": 100}, "max_new_tokens": 3, "prompt_logprobs": true}'
  batch.answer(Scheduler(engine, tokenizer), tokenizer, Request((256,)), [line], output)
  found = json.loads(output.getvalue())
  assert found['text'] == 'ccc'
  assert found['logprobs'][0] is None
  assert len(found['logprobs']) == 2 + 3
  assert all(value < 0 for value in found['logprobs'][1:])  # of the model, which the bias does not change
  assert [len(top) for top in found['top_logprobs']] == [0, 2, 2, 2, 2]


def test_lines_end_with_newlines_alone(tmp_path):
  path = tmp_path / 'in.jsonl'
  lines = ['{"prompt": "a\u2028b\u0085c"}', '{"prompt": "d"}\r', '', '{"prompt": "e"}']
  path.write_bytes(b'\xef\xbb\xbf' + '\n'.join(lines).encode())
  found = [json.loads(line)['prompt'] for line in batch.read(str(path))]
  assert found == ['a\u2028b\u0085c', 'd', 'e']


def test_a_batch_goes_on_behind_its_answers(tmp_path):
  lines = [b'{"prompt": "a", "id": 1}', b'{"prompt": "b"}', b'{"prompt": "c"}']
  output = tmp_path / 'out.jsonl'
  assert batch.answered(str(output), lines) == batch.Answered(0, 0)
  whole = '{"id": 1, "text": "é"}\n{"error": "no"}\n'
  output.write_text(whole + '{"text": "cut of', encoding='utf-8')
  before = batch.answered(str(output), lines)
  assert before == batch.Answered(2, len(whole.encode()))
  with batch.open_output(str(output), before) as file:
    file.write('{"text": "c"}\n')
  assert output.read_text(encoding='utf-8') == whole + '{"text": "c"}\n'
  with pytest.raises(ConfigError, match=r'line 1 of --output=.* does not belong'):
    batch.answered(str(output), lines[1:])
  with pytest.raises(ConfigError, match=r'line 3 of --output=.* does not belong'):
    batch.answered(str(output), lines[:2])
  output.write_text('hello\n')
  with pytest.raises(ConfigError, match=r'line 1 of --output=.* is no answer'):
    batch.answered(str(output), lines)
  with pytest.raises(ConfigError, match='is the file of --input'):
    batch.check_output(str(output), str(tmp_path / '.' / 'out.jsonl'))
  with pytest.raises(ConfigError, match='is a folder'):
    batch.check_output(str(tmp_path), str(output))


def shown(tokenizer, result, grows, **console):
  """What a writer prints while `grows` changes the result, with escape sequences."""
  output = io.StringIO()
  writer = Writer(Console(file=output, **console), tokenizer, 3, show_depth=bool(result.depths))
  writer.begin(result, None)
  for change in grows:
    change(result)
    writer.update(result)
  writer.end(result)
  return output.getvalue()


def test_depths_are_colours_where_there_are_any(tokenizer):
  result = Result(Request(tuple(b'ab')), tokens=list(b'cd'), depths=[1, 2, 3])
  colours = {'force_terminal': True, 'color_system': 'standard'}
  text = shown(tokenizer, result, [], **colours)
  assert text.startswith('recursions:')
  body = text.splitlines()[1]
  assert body == '\x1b[36ma\x1b[0m\x1b[32mb\x1b[0m\x1b[33mc\x1b[0md'
  assert shown(tokenizer, result, [], color_system=None).splitlines()[1] == 'a[1]b[2]c[3]d'


def test_what_may_become_a_stop_string_is_held_back(tokenizer):
  result = Result(Request(tuple(b'a'), stop_strings=('END',)))
  output = io.StringIO()
  writer = Writer(Console(file=output), tokenizer, 3, show_depth=False)
  writer.begin(result, None)
  result.text = 'xyzEN'
  writer.update(result)
  assert output.getvalue() == 'axyz'
  result.text, result.finish = 'xyz', 'stop_string'
  writer.update(result)
  assert output.getvalue() == 'axyz'


def test_thresholds_belong_to_a_checkpoint(finished_run, tmp_path):
  run = load_run(shutil.copytree(finished_run[1], tmp_path / 'run'))
  stored = calibration.Calibration((1.0, 0.5), (0.0, 0.1), step=run.step - 1, rows=4)
  entry_points.load('mor_jax.generate')
  with flagsaver.flagsaver(capacities=['1.0', '0.5'], checkpoint=str(run.folder.path)):
    calibration.store(run.folder.calibrations, stored)
    with pytest.raises(
      ConfigError, match=f'of step {run.step - 1}, and the thresholds of step {run.step} are'
    ):
      engines.calibrated(run)
    calibration.store(run.folder.calibrations, dataclasses.replace(stored, step=run.step))
    config, _ = engines.calibrated(run)
  assert config.model.capacities == (1.0, 0.5)


def test_a_llama_checkpoint_is_read_as_it_is(tmp_path, tokenizer):
  """Without a conversion beforehand, and nothing stays of it."""
  model, variables = tiny.model(kind='vanilla', vocab_size=257)
  folder = tmp_path / 'llama'
  huggingface.save(folder, model, variables, tokenizer)
  entry_points.load('mor_jax.generate')
  with flagsaver.flagsaver(checkpoint=str(folder)):
    run = engines.load(tiny_run.MESH)
  assert run.folder.path.name == 'llama'
  assert tmp_path not in run.folder.path.parents
  assert engines.tokenizer_of(run).digest == tokenizer.digest
  jax.tree.map(np.testing.assert_array_equal, run.variables['params'], variables['params'])
  with (
    flagsaver.flagsaver(checkpoint=str(tmp_path)),
    pytest.raises(ConfigError, match='is not the folder of a run'),
  ):
    engines.load(tiny_run.MESH)
