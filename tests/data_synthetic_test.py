"""Tasks of known difficulty: their answers worked out anew, their splits, and what is refused."""

import dataclasses
import functools

import numpy as np
import pytest

from mor_jax.config import ConfigError, DataConfig, resolve
from mor_jax.data import dataset as dataset_lib
from mor_jax.data import loader, packing, schedule, synthetic, written

LENGTHS = {
  'chase': 29,
  'chase,hidden=true': 33,
  'automaton': 33,
  'permutations': 40,
  'permutations,swaps=true': 40,
  'chains': 40,
  'copy': 40,
}


@functools.cache
def opened(task: str, seq_len: int | None = None) -> synthetic.SyntheticDataset:
  data = DataConfig(source=f'synthetic:{task}', seq_len=seq_len or LENGTHS[task])
  return loader.open_dataset(data)


def questions(dataset, split, count=20):
  """(words up to a scored token, its word, its difficulty) of some rows, every document for itself."""
  rows = dataset.rows(split)
  words = {index: word for word, index in dataset.source.vocabulary.items()}
  for index in range(count):
    row = rows[index]
    for place in np.flatnonzero(row['loss_mask']):
      inside = np.flatnonzero(row['segment_ids'] == row['segment_ids'][place])
      before = [words[i] for i in row['tokens'][inside[0] : place]]
      yield before, words[row['targets'][place]], row['difficulty'][place]


def chase(before):
  """(answer, steps) of the last question, from the facts and the meanings of letters alone."""
  facts = dict(word.split('>') for word in before if word[0] == 'n' and '>' in word)
  steps, node = before[-1].split(':')
  meanings = dict(word.split('>') for word in before if word[0] != 'n' and '>' in word)
  steps = int(meanings.get(steps, steps))
  for _ in range(steps):
    node = facts[node]
  return f'={node}', steps


def automaton(before):
  """(state, letters read) of the last question, from the transitions alone."""
  word, state = before[-1].split(':')
  rules = dict(one.split('>') for one in before if '>' in one)
  for letter in word:
    state = rules[letter + state]
  return f'={state}', len(word)


def permutations(before):
  place, *moves = before[:-1]
  for move in moves:
    place = f'p{move[1 + int(place[1])]}'
  return place, len(moves)


def chains(before):
  value, *operations = before[:-1]
  for operation in operations:
    value = f'{value}{operation}'
    value = eval(value) % 7
  return str(value), len(operations)


def copy(before):
  told = before[: before.index(':')]
  return told[len(before) - len(told) - 1], 0


SOLVERS = {
  'chase': chase,
  'chase,hidden=true': chase,
  'automaton': automaton,
  'permutations': permutations,
  'permutations,swaps=true': permutations,
  'chains': chains,
  'copy': copy,
}


@pytest.mark.parametrize('task', SOLVERS)
@pytest.mark.parametrize('split', ['train', 'validation'])
def test_answers_and_difficulties_are_those_of_the_text(task, split):
  found = list(questions(opened(task), split))
  assert len(found) > 50
  for before, answer, difficulty in found:
    assert SOLVERS[task](before) == (answer, difficulty), before


@pytest.mark.parametrize('task', SOLVERS)
def test_no_example_is_longer_than_the_longest(task):
  source = opened(task).source
  lengths = {len(source.task.example(np.random.default_rng(seed)).words) for seed in range(60)}
  assert (min(lengths), max(lengths)) == source.lengths


def test_every_number_of_steps_is_asked_equally_often_and_no_answer_is_told():
  dataset = opened('chase')
  for index in range(5):
    row = dataset.rows('train')[index]
    assert np.bincount(row['difficulty'][row['loss_mask'] > 0]).tolist() == [0, 4, 4, 4, 4]
    answers = {number for word, number in dataset.source.vocabulary.items() if word.startswith('=')}
    assert not answers & set(row['tokens'].tolist())
  assert dataset.tokenizer.vocab_size == 12 * (1 + 12 + 4 + 1)


def test_validation_examples_never_occur_in_training():
  """With few mappings (24 of five nodes), a split by chance would have all of them in both."""
  dataset = opened('chase,nodes=5,hops=3,questions=2', 16)

  def mappings(split):
    words = {index: word for word, index in dataset.source.vocabulary.items()}
    rows = (dataset.rows(split)[index] for index in range(40))
    documents = (row['tokens'][row['segment_ids'] == 1] for row in rows)
    return {frozenset(words[i] for i in document if '>n' in words[i]) for document in documents}

  assert len(mappings('train')) > 12
  assert not mappings('train') & mappings('validation')


def test_rows_are_a_function_of_their_index_and_of_the_seed():
  same, other = opened('chains'), opened('chains,seed=1', 40)
  rows = same.rows('train')
  np.testing.assert_equal(rows[7], opened.__wrapped__('chains').rows('train')[7])
  assert not np.array_equal(rows[7]['tokens'], rows[8]['tokens'])
  assert not np.array_equal(rows[7]['tokens'], other.rows('train')[7]['tokens'])
  assert len(rows) == synthetic.ENDLESS
  assert len(same.rows('validation')) == 256


def test_batches_resume_and_have_what_a_training_needs():
  dataset = opened('chase')
  data = DataConfig(source='synthetic:chase', seq_len=29)
  order = schedule.constant(4)
  batches = loader.train_batches(dataset, data, order)
  first, second = next(batches), next(batches)
  assert set(first) == {*packing.ROW_ARRAYS, 'targets', 'loss_mask'} == set(loader.train_arrays(dataset))
  assert not np.array_equal(first['tokens'], second['tokens'])
  np.testing.assert_equal(next(loader.train_batches(dataset, data, order, start_step=1)), second)
  last = list(loader.validation_batches(dataset, 100))[-1]
  assert last['difficulty'].shape == (100, 29)
  assert not last['loss_mask'][56:].any()  # filled up to a whole batch
  assert not last['segment_ids'][56:].any()


def test_filler_is_mixed_in():
  dataset = opened('chase,nodes=5,hops=2,questions=2,copy=0.5', 64)
  difficulties = {difficulty for *_, difficulty in questions(dataset, 'train')}
  assert difficulties == {0, 1, 2}


@pytest.mark.parametrize(
  ('source', 'problem'),
  [
    ('sort', "'sort' is not one of the tasks chase, automaton, permutations, chains, copy"),
    ('chase,depth=3', "'depth=3' is no setting of chase; it has copy, hidden, hops, nodes"),
    ('chase,hops', "'hops' is no setting of chase"),
    ('chase,hops=many', r'hops=many must be a number \(int\)'),
    ('chase,hidden=1', 'hidden=1 must be true or false'),
    ('chase,nodes=4', 'hops=4 must be fewer than nodes=4'),
    ('chains,modulus=2', 'modulus=2 must be at least 3'),
    ('automaton,hops=20', 'make .* words to read; at most 1000 may be'),
    ('chains,copy=1', r'copy=1.0 must be in \[0, 1\)'),
    ('chains,rows=0', 'rows=0 must be at least 1'),
    ('chase,nodes=3,hops=2,questions=1', 'so few different examples that none of them is left'),
    ('chase', 'data.seq_len=16 is too short .* up to 29 tokens; set data.seq_len=29'),
  ],
)
def test_what_makes_no_task_is_refused(source, problem):
  with pytest.raises(ConfigError, match=problem):
    loader.open_dataset(DataConfig(source=f'synthetic:{source}', seq_len=16))


def test_a_stream_of_a_task_is_refused():
  with pytest.raises(ConfigError, match='these rows need no live path'):
    resolve({'data': {'source': 'synthetic:chase', 'live': True, 'tokenizer': 'bytes'}})


# ---- loss masks of prepared data ----


def masked_rows(count=4, length=12):
  rng = np.random.default_rng(0)
  for _ in range(count):
    mask_T = rng.integers(0, 2, length)
    yield packing.Row(rng.integers(2, 18, length), np.array([5, 4]), mask_T)


def test_rows_with_a_loss_mask_are_prepared_and_read(tmp_path):
  tokenizer = opened('copy').tokenizer
  written.write(tmp_path / 'chats', tokenizer, {'train': masked_rows(), 'validation': masked_rows(2)})
  path = str(tmp_path / 'tokenizer.json')
  tokenizer.save(path)
  data = DataConfig(source=f'prepared:{tmp_path}/chats', seq_len=12, tokenizer=path)
  dataset = loader.open_dataset(data)
  assert loader.train_arrays(dataset) == (*packing.ROW_ARRAYS, 'loss_mask')
  for row, expected in zip(dataset.rows('train'), masked_rows(), strict=True):
    np.testing.assert_equal(row, packing.unpack(expected))
  counts = dataset.manifest.splits['train']
  scored = [
    row['loss_mask'][1:9] * (row['segment_ids'][1:9] == row['segment_ids'][:8])
    for row in dataset.rows('train')
  ]
  assert counts.targets == np.sum(scored)
  assert (counts.rows, counts.documents, counts.tokens) == (4, 8, 36)


@pytest.mark.parametrize(
  ('change', 'problem'),
  [
    ({'loss_mask_T': None}, 'either all rows have a loss mask of 12 entries, or none'),
    ({'tokens_T': np.full(12, 99)}, 'ids from 99 to 99; those of the tokenizer are below 19'),
    ({'tokens_T': np.full(13, 3)}, 'has 13 tokens'),
    ({'segment_lengths': np.array([9, 9])}, '18 of them in segments'),
  ],
)
def test_rows_that_do_not_fit_are_refused_and_leave_nothing(tmp_path, change, problem):
  rows = list(masked_rows())
  rows[2] = dataclasses.replace(rows[2], **change)
  with pytest.raises(ConfigError, match=f'row 2 of train.*{problem}'):
    written.write(tmp_path / 'd', opened('copy').tokenizer, {'train': rows, 'validation': masked_rows()})
  with pytest.raises(ConfigError, match='no rows for the split validation'):
    written.write(tmp_path / 'd', opened('copy').tokenizer, {'train': masked_rows(), 'validation': []})
  assert not list(tmp_path.iterdir())
  with pytest.raises(ConfigError, match='no prepared dataset'):
    dataset_lib.open_dataset(tmp_path / 'd')
