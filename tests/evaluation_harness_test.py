"""The class for lm-evaluation-harness, and its tasks through the command, without a network."""

import functools
import json
import os
import re
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from lm_eval.api.instance import Instance
from scipy.special import log_softmax

from mor_jax.config import ConfigError
from mor_jax.data.tokenizer import END_OF_TEXT, Tokenizer
from mor_jax.evaluation import few_shot
from mor_jax.evaluation.harness import HarnessModel
from mor_jax.runs.restore import load_run

ANIMALS = ['cat', 'dog', 'owl', 'ram', 'ant', 'bee', 'cow', 'elk']
CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/animals.jsonl"}}}}
output_type: multiple_choice
test_split: test
fewshot_split: test
doc_to_text: "Which animal is number {{{{number}}}}?"
doc_to_target: "{{{{label}}}}"
doc_to_choice: ["cat", "a dog", "owl"]
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WORD = """
task: tiny_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/animals.jsonl"}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{number}}}}:"
doc_to_target: "{{{{animal}}}}"
generation_kwargs: {{until: ["e"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope='module')
def run(finished_run):
  return load_run(finished_run[1])


@pytest.fixture(scope='module')
def model(run):
  return HarnessModel(run, batch_size=4)


@pytest.fixture(scope='module')
def tasks(tmp_path_factory):
  """A folder with two tasks and their data."""
  folder = tmp_path_factory.mktemp('tasks')
  lines = [{'number': n, 'animal': animal, 'label': n % 3} for n, animal in enumerate(ANIMALS)]
  (folder / 'animals.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  (folder / 'choice.yaml').write_text(CHOICE.format(folder=folder))
  (folder / 'word.yaml').write_text(WORD.format(folder=folder))
  return folder


def instances(kind: str, *arguments: tuple) -> list[Instance]:
  return [Instance(kind, {}, given, index) for index, given in enumerate(arguments)]


def logits(run, tokens: list[int]) -> np.ndarray:
  """Of the full forward pass of one text in bytes, (T, V) in float64."""
  padded = jnp.array(
    [tokens + [0] * (64 - len(tokens))]
  )  # one shape for all: what comes later changes nothing
  return np.asarray(_apply(run.model)(run.variables, padded).logits[0, : len(tokens)], np.float64)


@functools.cache
def _apply(made):
  return jax.jit(functools.partial(made.apply, routing='threshold'))


def total(run, context: bytes, rest: bytes) -> float:
  """Log-likelihood of `rest`, every byte a token; an empty context is the token that ends documents."""
  tokens = [*(context or [256]), *rest]
  scores_TV = log_softmax(logits(run, tokens[:-1]), axis=-1)
  places = np.arange(len(tokens) - len(rest) - 1, len(tokens) - 1)
  return scores_TV[places, list(rest)].sum()


def test_log_likelihoods(run, model):
  given = [('the boats', ' came in'), ('', 'the'), ('a harbour ', 'wall')]
  found = model.loglikelihood(instances('loglikelihood', *given), disable_tqdm=True)
  given[2] = ('a harbour', ' wall')  # a space at the end of the context belongs to the word after it
  for (context, rest), (score, _) in zip(given, found, strict=True):
    assert score == pytest.approx(total(run, context.encode(), rest.encode()), abs=1e-3)


@pytest.fixture(scope='module')
def merging(run):
  """A harness model whose tokenizer has the words 'ret' and 'return', and drops what it does not know."""
  vocab = {
    END_OF_TEXT: 0,
    'r': 1,
    'e': 2,
    't': 3,
    'u': 4,
    'n': 5,
    're': 6,
    'ret': 7,
    'ur': 8,
    'urn': 9,
    'return': 10,
  }
  merges = [('r', 'e'), ('re', 't'), ('u', 'r'), ('ur', 'n'), ('ret', 'urn')]
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
  backend.add_special_tokens([END_OF_TEXT])
  made = HarnessModel(run, batch_size=4)
  made._tokenizer, made._prefix = Tokenizer(backend, END_OF_TEXT, None), 0
  return made


@pytest.mark.parametrize(
  ('context', 'continuation', 'expected'),
  [
    ('ne', 't', ([5, 2], [3])),
    ('ret', 'urn', ([0], [10])),  # one token, which would count as certain
    ('eret', 'urn', ([2], [10])),
    ('nr', 'et', ([5], [7])),
    ('ne', '', ([5, 2], [])),
    (' ', 'ret', ([0], [7])),  # whitespace alone is no context
  ],
)
def test_every_character_of_a_continuation_counts(merging, context, continuation, expected):
  assert merging._encode_pair(context, continuation) == expected


def test_a_continuation_that_merges_does_not_win_by_it(run, merging):
  found = merging.loglikelihood(instances('loglikelihood', ('ret', 'urn'), ('ne', '')), disable_tqdm=True)
  assert found[0] == (pytest.approx(log_softmax(logits(run, [0])[0])[10], abs=1e-3), False)
  assert found[1] == (0.0, True)
  with pytest.raises(
    ConfigError, match="likelihood of 'xyz' after 'ne', which the tokenizer gives no tokens"
  ):
    merging.loglikelihood(instances('loglikelihood', ('ne', 'xyz')), disable_tqdm=True)


def test_rolling_log_likelihood_of_texts_longer_than_the_model(run, model):
  """Each window is full; the last one scores only what the ones before have not."""
  text = ('the boats came in before the storm, ' * 4)[:100].encode()
  (found,) = model.loglikelihood_rolling(instances('rolling', (text.decode(),)), disable_tqdm=True)
  expected = total(run, b'', text[:64]) + total(run, text[35:64], text[64:])
  assert found == pytest.approx(expected, abs=1e-3)
  assert model.loglikelihood_rolling(instances('rolling', ('',)), disable_tqdm=True) == [0.0]


def test_prefix_of_texts_without_context(run, model):
  before = HarnessModel(run, max_len=model.max_length, prefix_token='a')
  (found,) = before.loglikelihood_rolling(instances('rolling', ('the boats',)), disable_tqdm=True)
  assert found == pytest.approx(total(run, b'a', b'the boats'), abs=1e-3)
  with pytest.raises(ConfigError, match='--prefix_token=nothing is not a token of'):
    HarnessModel(run, prefix_token='nothing')


def test_generation_is_greedy_and_ends_before_the_stop(run, model):
  prompt = 'the boats '
  tokens = list(prompt.encode())
  for _ in range(12):
    tokens.append(int(logits(run, tokens)[-1].argmax()))
  free = bytes(tokens[len(prompt) :]).decode('utf-8', 'replace')
  stop = free[6]
  wishes = {'until': [stop], 'max_gen_toks': 12, 'do_sample': False}
  found = model.generate_until(
    instances('generate_until', (prompt, {**wishes, 'until': []}), (prompt, wishes)), disable_tqdm=True
  )
  assert found == [free, free[: free.index(stop)]]


def test_samples_differ_and_can_be_drawn_again(model):
  wishes = {
    'until': [],
    'max_gen_toks': 8,
    'do_sample': True,
    'num_beams': 1,
    'top_k': -1,
    'temperature': 1.0,
  }
  given = instances('generate_until', *[('the ', wishes)] * 4)
  found = model.generate_until(given, disable_tqdm=True)
  assert len(set(found)) == 4
  assert model.generate_until(given, disable_tqdm=True) == found


def test_generation_refuses_what_it_cannot_do(run, model):
  beams = instances('generate_until', ('a', {'until': [], 'num_beams': 4}))
  with pytest.raises(ConfigError, match='num_beams=4 is not supported'):
    model.generate_until(beams, disable_tqdm=True)
  with pytest.raises(ConfigError, match='max_gen_toks=64 leaves no room'):
    model.generate_until(instances('generate_until', ('a', {'max_gen_toks': 64})), disable_tqdm=True)
  with pytest.raises(ConfigError, match='--routing=topk looks at the whole text'):
    HarnessModel(run, routing='topk').generate_until(beams)


def command(*flags):
  program = [sys.executable, '-m', 'mor_jax.evaluate', *flags]
  return subprocess.run(program, capture_output=True, text=True, check=False)


def test_tasks_of_a_folder(run, model, tasks, tmp_path):
  output = tmp_path / 'out.json'
  flags = [f'--checkpoint={run.folder.path}', f'--include_path={tasks}', f'--output={output}', '--limit=6']
  done = command(*flags, '--tasks=tiny_choice,tiny_word', '--batch_size=4', f'--use_cache={tmp_path}/cache')
  assert done.returncode == 0, done.stderr
  result = json.loads(output.read_text())
  answers = []
  for number in range(6):
    question = f'Which animal is number {number}?'.encode()
    scores = [total(run, question, f' {choice}'.encode()) for choice in ('cat', 'a dog', 'owl')]
    answers.append(int(np.argmax(scores)) == number % 3)
  assert result['results']['tiny_choice']['acc,none'] == pytest.approx(np.mean(answers))
  assert result['results']['tiny_word']['exact_match,none'] == 0.0, 'an untrained model knows no animals'
  assert result['n-samples']['tiny_choice'] == {'original': 8, 'effective': 6}
  assert result['config']['model_run'] == str(run.folder.path)
  for text in ('tiny_choice', 'acc_norm', 'exact_match'):
    assert text in done.stdout
  assert 'Table 3' not in done.stdout, 'the paper has none of these'
  assert (tmp_path / 'cache_rank0.db').exists()


def test_examples_before_the_question(tasks, model):
  manager = few_shot.load(['tiny_choice'], str(tasks))
  result = few_shot.run(model, ['tiny_choice'], manager, num_fewshot=2, limit=2)
  assert result['n-shot']['tiny_choice'] == 2
  with pytest.raises(
    ConfigError, match='--num_fewshot=8 of --tasks=tiny_choice is more than there are examples'
  ):
    few_shot.run(model, ['tiny_choice'], few_shot.load(['tiny_choice'], str(tasks)), num_fewshot=8, limit=2)


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--tasks=tiny_choise'], 'tiny_choise is not a task of .* did you mean tiny_choice'),
    (['--tasks=hellaswag'], 'there is no network to fetch data from .* local files in a YAML file'),
  ],
)
def test_tasks_that_cannot_be_run_are_refused_soon(run, tasks, flags, message):
  assert os.environ['HF_HUB_OFFLINE']
  begin = time.monotonic()
  done = command(f'--checkpoint={run.folder.path}', f'--include_path={tasks}', *flags)
  assert done.returncode == 2, done.stderr
  assert re.search(message, done.stderr), done.stderr
  assert 'Traceback' not in done.stderr
  assert time.monotonic() - begin < 60  # 20 s on a machine that does nothing else


def test_a_broken_task_is_refused(tmp_path):
  (tmp_path / 'broken.yaml').write_text('task: broken\ndataset_path: json\noutput_type: multiple_choice\n')
  with pytest.raises(ConfigError, match='--tasks=broken cannot be loaded'):
    few_shot.load(['broken'], str(tmp_path))
  with pytest.raises(ConfigError, match='is not a folder'):
    few_shot.load(['broken'], str(tmp_path / 'nowhere'))
