"""From conversations to answers: rows, a training that learns what the assistant says, and python -m mor_jax.generate --chat."""

import dataclasses
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys

import entry_points
import jax
import numpy as np
import pytest
import tiny_run
from absl.testing import flagsaver
from rich.console import Console
from scipy.special import log_softmax

from mor_jax import cli, train
from mor_jax.config import ConfigError, DataConfig, with_changes
from mor_jax.data import loader, schedule
from mor_jax.data import tokenizer as tokenizers
from mor_jax.data.chats import Chats
from mor_jax.evaluation import held_out
from mor_jax.inference import dialogue
from mor_jax.inference.requests import Request
from mor_jax.inference.scheduler import Scheduler
from mor_jax.inference.terminal import Writer
from mor_jax.interop import huggingface, pretrained
from mor_jax.runs import metrics
from mor_jax.runs.restore import load_run
from tests import tiny, tiny_engine

TEMPLATE = (
  "{% for m in messages %}{{ m.role[0] + ':' + m.content + (eos_token if m.role == 'assistant' else '') + '\n' }}"
  "{% endfor %}{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
SAID = re.compile('(?<=a:)[a-z]+\0')


@pytest.fixture(scope='module')
def tuned(tmp_path_factory):
  """Config and folder of a training of 20 steps on conversations of letters."""
  folder = tmp_path_factory.mktemp('tuned')
  rng = np.random.default_rng(0)

  def letters(most):
    return ''.join(rng.choice(list('bcdefgh'), rng.integers(1, most)))

  lines = [json.dumps({'prompt': letters(30), 'completion': letters(20)}) for _ in range(300)]
  (folder / 'chats.jsonl').write_text('\n'.join(lines) + '\n')
  (folder / 'template.jinja').write_text(TEMPLATE)
  data = {
    'format': 'chat',
    'source': f'files:{folder}/chats.jsonl',
    'chat_template': f'{folder}/template.jinja',
    'packing': 'first_fit',
    'validation_fraction': 0.2,
    'cache_dir': str(folder / 'cache'),
  }
  steps = {'log_every': 1, 'eval_every': 0, 'sample_tokens': 0}
  config = with_changes(tiny_run.CONFIG, model={'vocab_size': None}, data=data, train=steps)
  with pytest.MonkeyPatch.context() as patch, (folder / 'output.txt').open('w') as output:
    patch.setattr(sys, 'stdout', output)
    train.main(dataclasses.replace(config, name='tuned'), str(folder / 'run'))
  return config, folder / 'run'


def by_hand(model, variables, rows) -> np.ndarray:
  """Loss of every letter that the assistant says in the rows, and of the end of its turn, found in their text."""
  output = jax.jit(model.apply)(
    variables, rows['tokens'], segment_ids=rows['segment_ids'], positions=rows['positions']
  )
  losses = []
  for tokens_T, logits_TV in zip(rows['tokens'], np.asarray(output.logits, np.float64), strict=True):
    text = bytes((tokens_T % 256).tolist()).decode()
    places = [place for found in SAID.finditer(text) for place in range(*found.span())]
    scores_TV = log_softmax(logits_TV, axis=-1)
    losses += [-scores_TV[place - 1, tokens_T[place]] for place in places]
  return np.array(losses)


@pytest.mark.slow
def test_training_and_evaluation_count_what_the_assistant_says(tuned):
  """The first loss of the training and the last of the evaluation, from logits and the text of the rows alone."""
  config, folder = tuned
  run = load_run(folder, mesh=tiny_run.MESH)
  dataset = held_out.open_data(run, None)
  first = json.loads((folder / 'metrics.jsonl').read_text().splitlines()[0])
  batch = next(
    iter(loader.train_batches(dataset, run.config.data, schedule.constant(config.train.global_batch)))
  )
  start = tiny_run.run(with_changes(config, model={'vocab_size': 257}))
  expected = by_hand(start.model, start.initial().variables, batch)
  assert 0 < len(expected) < (batch['segment_ids'] > 0).sum() / 2
  assert first['train/loss'] == pytest.approx(expected.mean(), rel=1e-4)

  rows = next(iter(loader.validation_batches(dataset, 16)))
  result = held_out.evaluate(run, dataset, tiny_run.MESH, batch_size=16, max_rows=16)['routing']['topk']
  expected = by_hand(run.model, run.variables, rows)
  assert result['predicted_tokens'] == len(expected)
  assert result['nll'] == pytest.approx(expected.mean(), rel=1e-4)
  assert result['nll'] < 0.6 * first['train/loss'], 'it has learned something'


def test_a_tuned_run_is_measured_on_texts_too(tuned, tmp_path):
  (tmp_path / 'text.txt').write_text('the boats came in before the storm ' * 40)
  run, source = load_run(tuned[1]), f'files:{tmp_path}/text.txt'
  with pytest.raises(ConfigError, match='reads conversations from'):
    held_out.open_data(run, source)
  dataset = held_out.open_data(run, source, form='text')
  rows = next(loader.validation_batches(dataset, 2, 2))
  assert 'loss_mask' not in rows
  assert bytes((rows['tokens'][0, 1:10] % 256).tolist()) == b'he boats '


def test_the_run_keeps_the_template_when_the_file_is_gone(tuned, tmp_path):
  _, folder = tuned
  run = load_run(folder)
  template = folder.parent / 'template.jinja'
  moved = template.rename(tmp_path / 'moved.jinja')
  try:
    assert held_out.open_data(run, None).manifest.chat['template'] == TEMPLATE
    other = held_out.open_data(run, f'files:{folder.parent}/chats.jsonl')
    assert other.manifest.splits['validation'].documents == 300
  finally:
    moved.rename(template)
  tokenizer = held_out.open_data(run, None).tokenizer
  conventions = run.folder.conventions(run.config, tokenizer)
  assert conventions.ends == (256,)
  assert Chats.of(conventions, tokenizer).prompt([{'role': 'user', 'content': 'b'}]) == list(b'u:b\na:')


@pytest.mark.parametrize('variant', ['mor', 'recursive', 'vanilla'])
def test_the_recipe_tunes_smollm2_to_conversations(variant):
  config = cli.load_config(f'configs/sft_smollm2_135m.py:{variant}', {})
  assert (config.data.format, config.data.packing, config.data.tokenizer) == ('chat', 'first_fit', 'source')
  assert config.data.segment_mask
  assert (config.model.kind, config.model.num_layers) == (variant, 30)
  assert config.train.learning_rate == (1e-4 if variant == 'vanilla' else 5e-4)


@pytest.mark.slow
def test_a_model_with_a_template_is_tuned_by_the_recipe(tuned, tmp_path):
  """Its own template, which the run keeps and exports as it was."""
  changes = {
    **{f'model.{name}': value for name, value in tiny.SHAPE.items() if name != 'vocab_size'},
    'model.vocab_size': 257,
    'model.capacity_warmup_steps': 0,
    'model.rope_theta': 10000.0,
    'data.source': tuned[0].data.source,
    'data.cache_dir': str(tmp_path / 'cache'),
    'data.seq_len': 64,
    'data.validation_fraction': 0.2,
    'train.global_batch': 8,
    'train.accumulation': 1,
    'train.steps': 8,
    'train.warmup_steps': 1,
    'train.log_every': 1,
    'train.eval_every': 0,
  }
  recipe = cli.load_config('configs/sft_smollm2_135m.py', changes)
  model, variables = tiny.model(kind='vanilla', vocab_size=257)
  made = tokenizers.build(DataConfig(tokenizer='bytes'))
  huggingface.save(tmp_path / 'llama', model, variables, made)
  (tmp_path / 'llama' / 'chat_template.jinja').write_text(TEMPLATE)
  assert train.main(pretrained.with_source(recipe, str(tmp_path / 'llama')), str(tmp_path / 'run')) == 0
  records = metrics.read(tmp_path / 'run' / 'metrics.jsonl')
  assert records[-1]['train/loss'] < records[0]['train/loss']
  run = load_run(tmp_path / 'run')
  assert run.folder.conventions(run.config, made).files['chat_template.jinja'] == TEMPLATE


# ---- the command ----


@pytest.mark.slow
def test_lines_in_answers_out(tuned):
  flags = f'--checkpoint={tuned[1]}', '--chat', '--temperature=0', '--max_new_tokens=6'
  program = [sys.executable, '-m', 'mor_jax.generate', *flags]
  lines = 'bcd\n\n/reset\nbcd\n/what\n/exit\nnever\n'
  done = subprocess.run(program, input=lines, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  first, second = done.stdout.splitlines()
  assert first == second
  assert first
  assert 'what was said is forgotten' in done.stderr
  assert '/what is not one of /reset and /exit' in done.stderr
  assert 'tokens/s' in done.stderr


@pytest.mark.slow
def test_a_terminal_shows_colours_and_ctrl_c_stops_an_answer_only(tuned):
  """Typed on a terminal: a legend, an answer in colours, Ctrl-C at the prompt, and the end of input."""
  terminal, theirs = pty.openpty()
  flags = ['--chat', f'--checkpoint={tuned[1]}', '--max_new_tokens=6', '--temperature=0']
  talk = subprocess.Popen(
    [sys.executable, '-m', 'mor_jax.generate', *flags],
    env={**os.environ, 'TERM': 'xterm-256color'},
    stdin=theirs,
    stdout=theirs,
    stderr=theirs,
  )
  os.close(theirs)
  shown = b''

  def read(until: bytes) -> bytes:
    nonlocal shown
    start = len(shown)
    while until not in shown[start:]:
      try:
        shown += os.read(terminal, 4096)
      except OSError:  # the program has ended
        break
    return shown[start:]

  assert b'recursions:' in read(b'> ')
  os.write(terminal, b'bcd\n')
  assert re.search(rb'\x1b\[3[26]m', read(b'\n> '))
  talk.send_signal(signal.SIGINT)
  assert b'/exit or the end of input' in read(b'\n> ')
  os.write(terminal, b'\x04')
  assert b'tokens/s' in read(b'nothing')
  assert talk.wait(timeout=60) == 0
  os.close(terminal)


def refused(**flags) -> str:
  """Why the command refuses."""
  program = entry_points.load('mor_jax.generate')
  with flagsaver.flagsaver(**flags), pytest.raises(ConfigError) as error:
    program.main()
  return str(error.value)


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ({'chat': True, 'prompt': 'a'}, '--prompt=a does not go with --chat'),
    ({'chat': True, 'input': 'a'}, '--input=a does not go with --chat'),
    ({'chat': True, 'num_samples': 2}, '--num_samples=2 does not go with --chat'),
    ({'chat': True, 'ignore_end_of_text': True}, '--ignore_end_of_text=True does not go with --chat'),
    ({'prompt': 'a', 'system': 'b'}, '--system=b begins a conversation: give --chat too'),
  ],
)
def test_flags_that_do_not_go_with_chats(tuned, flags, message):
  assert message in refused(checkpoint=str(tuned[1]), **flags)


def test_a_model_without_template_is_refused(tuned, tmp_path):
  run = shutil.copytree(tuned[1], tmp_path / 'run')
  (run / 'conventions.json').unlink()
  assert '--chat needs a chat template' in refused(checkpoint=str(run), chat=True)


# ---- without a process of its own ----


@pytest.fixture(scope='module')
def parts(tuned):
  """(run, tokenizer, chats) of the tuned model."""
  run = load_run(tuned[1])
  tokenizer = held_out.open_data(run, None).tokenizer
  return run, tokenizer, Chats.of(run.folder.conventions(run.config, tokenizer), tokenizer)


class Talk:
  """A conversation whose lines are given, what it printed and what it said beside it."""

  def __init__(self, parts, max_len=64, system=None, colours=None, show_depth=False, **options):
    run, tokenizer, chats = parts
    self.engine = tiny_engine.engine(run.model, run.variables, slots=1, max_len=max_len)
    self.scheduler = Scheduler(self.engine, tokenizer, ticks_per_call=4)
    template = Request((256,), **{'max_new_tokens': 8, 'temperature': 0.0, 'stop_tokens': (256,), **options})
    self.dialogue = dialogue.Dialogue(self.scheduler, chats, template, system)
    self.output, self.said = io.StringIO(), []
    console = Console(file=self.output, force_terminal=colours is not None, color_system=colours, width=200)
    self.writer = Writer(console, tokenizer, self.engine.steps, show_depth)

  def __call__(self, *lines):
    before = len(self.output.getvalue())
    dialogue.talk(self.dialogue, self.writer, lines, self.said.append)
    return self.output.getvalue()[before:]


def test_an_answer_is_that_of_the_whole_conversation(parts):
  """The second answer is what the model says after the first, and the beginning is not computed again."""
  _, tokenizer, chats = parts
  talk = Talk(parts, system='s')
  first, second = talk('bcd', 'efg').splitlines()
  messages = [
    {'role': 'system', 'content': 's'},
    {'role': 'user', 'content': 'bcd'},
    {'role': 'assistant', 'content': first},
    {'role': 'user', 'content': 'efg'},
  ]
  request = Request(tuple(chats.prompt(messages)), max_new_tokens=8, temperature=0.0, stop_tokens=(256,))
  assert Scheduler(talk.engine, tokenizer).run([request])[0].text == second
  assert talk.dialogue.messages == [*messages, {'role': 'assistant', 'content': second}]
  tokens, reused = talk.scheduler.prompt_tokens
  assert reused >= len(chats.prompt(messages[:2]))
  assert tokens > reused


def test_a_long_history_loses_its_oldest_turns_with_a_sentence(parts):
  talk = Talk(parts, system='s')
  talk('b' * 15, 'c' * 15, 'd' * 15)
  assert talk.said[0].startswith(
    'the conversation has become longer than max_len=64 tokens: its oldest 2 messages'
  )
  contents = [message['content'] for message in talk.dialogue.messages if message['role'] != 'assistant']
  assert contents[0] == 's'
  assert contents[-1] == 'd' * 15
  assert 'b' * 15 not in contents
  before = list(talk.dialogue.messages)
  talk('e' * 80)
  assert 'the prompt has 89 tokens' in talk.said[-1]
  assert talk.dialogue.messages == before


def test_colours_and_brackets_tell_the_depth_of_the_answer_alone(parts):
  plain = Talk(parts)('bcd')
  coloured = Talk(parts, colours='truecolor', show_depth=True)('bcd')
  bracketed = Talk(parts, show_depth=True)('bcd')
  assert '\x1b[' in coloured
  assert re.sub(r'\x1b\[[0-9;]*m', '', coloured) == plain
  assert re.sub(r'\[\d\]', '', bracketed) == plain
  assert bracketed != plain


def test_a_first_interrupt_stops_the_answer_only(parts, monkeypatch):
  talk = Talk(parts, max_new_tokens=40, stop_tokens=())
  step, steps = talk.dialogue.step, []

  def interrupted():
    steps.append(1)
    if len(steps) == 2:
      os.kill(os.getpid(), signal.SIGINT)
    step()

  monkeypatch.setattr(talk.dialogue, 'step', interrupted)
  answers = talk('bcd', 'efg').splitlines()
  assert talk.said[0] == 'stopped'
  assert len(answers[0]) < 40
  assert talk.dialogue.messages[1]['content'] == answers[0]
  assert len(talk.dialogue.messages) == 4
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_the_template_refuses_is_said_and_forgotten(parts):
  talk = Talk(parts)
  assert talk('b\ufdd0') == ''
  assert 'reserved for programs' in talk.said[0]
  assert talk.dialogue.messages == []
