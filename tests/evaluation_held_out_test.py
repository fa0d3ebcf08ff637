"""Losses under both routings, by recursion limit and by position, against logits worked out by hand."""

import functools
import math
import types

import jax
import numpy as np
import pytest
import tiny_run
from scipy.special import log_softmax

from mor_jax.config import Config, ConfigError, with_changes
from mor_jax.data import dataset as dataset_lib
from mor_jax.data import tokenizer as tokenizer_lib
from mor_jax.data.manifest import SplitCounts
from mor_jax.evaluation import held_out, nll
from mor_jax.model.transformer import Transformer

ROWS = 6


def variables_of(config: Config) -> dict:
  """Drawn at random, so that routers decide either way."""
  model = Transformer(config.model)
  shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 4), np.int32))
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape, scale=0.2).astype(leaf.dtype), shapes)


def batch() -> dict[str, np.ndarray]:
  return {name: rows[-ROWS:] for name, rows in tiny_run.rows().items()}  # the last one has padding


@functools.cache
def logits_of(config: Config, routing: str, limit: int) -> tuple[np.ndarray, object]:
  rows = batch()
  apply = jax.jit(functools.partial(Transformer(config.model).apply, routing=routing, max_recursions=limit))
  given = {'segment_ids': rows['segment_ids'], 'positions': rows['positions']}
  output = apply(variables_of(config), rows['tokens'], **given)
  return np.asarray(output.logits, np.float64), output.routing


def by_hand(config: Config, routing: str, limit: int) -> tuple[np.ndarray, np.ndarray]:
  """(log-likelihood of every predicted token, how many tokens of its document come before it)."""
  rows = batch()
  logits_BTV, _ = logits_of(config, routing, limit)
  found, before = [], []
  for row, (tokens, segments) in enumerate(zip(rows['tokens'], rows['segment_ids'], strict=True)):
    for place in range(1, len(tokens)):
      if segments[place] == segments[place - 1] != 0:
        found.append(log_softmax(logits_BTV[row, place - 1])[tokens[place]])
        before.append(int(rows['positions'][row, place]))
  return np.array(found), np.array(before)


def totals(config: Config, routing: str, limit: int) -> dict:
  step = nll.make_nll_step(Transformer(config.model), config, tiny_run.MESH, routing, limit, by_position=True)
  return nll.totals(step, variables_of(config), [batch()], tiny_run.MESH)


@pytest.mark.parametrize(
  ('routing', 'limit', 'model'),
  [
    ('topk', 2, {}),
    ('threshold', 2, {}),
    ('threshold', 1, {}),
    ('topk', 1, {'kind': 'recursive'}),
    ('topk', 1, {'router': 'token_choice', 'kv': 'shared', 'token_capacity_factor': 1.0}),
  ],
)
def test_losses_are_those_of_the_logits(routing, limit, model):
  config = with_changes(tiny_run.CONFIG, model=model, train={'loss_chunk': 50})
  log_likelihood, before = by_hand(config, routing, limit)
  sums = totals(config, routing, limit)
  split = SplitCounts(documents=1, bytes=300, tokens=100, targets=99, rows=ROWS, cut=0)
  summary = held_out.summarize(sums, split)
  expected = -log_likelihood.mean()
  assert summary['nll'] == pytest.approx(expected, rel=1e-5)
  assert summary['perplexity'] == pytest.approx(math.exp(expected), rel=1e-4)
  assert summary['bits_per_byte'] == pytest.approx(expected / math.log(2) / 3, rel=1e-5)
  assert summary['predicted_tokens'] == len(log_likelihood)
  bins = held_out.by_position(sums['position'])
  assert sum(entry['predicted_tokens'] for entry in bins) == len(log_likelihood)
  for entry in bins:
    inside = (before >= entry['first']) & (before <= entry['last'])
    assert entry['predicted_tokens'] == inside.sum()
    assert entry['nll'] == pytest.approx(-log_likelihood[inside].mean(), rel=1e-4)
  routed = logits_of(config, routing, limit)[1]
  if routed is not None:
    real_BT = batch()['segment_ids'] > 0
    assert summary['mean_depth'] == pytest.approx(np.asarray(routed.depth_BT)[real_BT].mean(), rel=1e-5)
    first = bins[0]
    there_BT = real_BT & (batch()['positions'] >= first['first']) & (batch()['positions'] <= first['last'])
    assert first['mean_depth'] == pytest.approx(np.asarray(routed.depth_BT)[there_BT].mean(), rel=1e-5)
    assert np.asarray(routed.depth_BT).max() <= limit


@pytest.mark.parametrize('router', ['expert_choice', 'token_choice'])
def test_a_limit_is_a_model_whose_later_recursions_nobody_takes(router):
  """Against the whole model with thresholds, or a choice of depth, that nothing passes at the last step."""
  config = with_changes(tiny_run.CONFIG, model={'router': router, 'num_recursions': 2, 'selection': 'top_k'})
  variables = variables_of(config)
  rows = batch()
  apply = jax.jit(Transformer(config.model).apply, static_argnames=('routing', 'max_recursions'))
  given = {'segment_ids': rows['segment_ids'], 'routing': 'threshold'}
  limited = apply(variables, rows['tokens'], max_recursions=1, **given)
  if router == 'expert_choice':
    closed = {**variables, 'routing': {'threshold': np.array([0.0, np.inf], np.float32)}}
    expected = apply(closed, rows['tokens'], **given)
    np.testing.assert_allclose(limited.logits, expected.logits, atol=1e-4)
  whole = apply(variables, rows['tokens'], **given)
  assert (np.asarray(whole.routing.depth_BT) == 2).any()
  assert np.abs(whole.logits - limited.logits).max() > 0.01
  real_BT = rows['segment_ids'] > 0
  assert set(np.asarray(limited.routing.depth_BT)[real_BT].tolist()) <= {0, 1}


def test_limits_that_do_not_exist_are_refused():
  run = tiny_run.run()
  tokens = np.zeros((1, 4), np.int32)
  for limit in (0, 3):
    with pytest.raises(ValueError, match='max_recursions'):
      run.model.apply(run.initial().variables, tokens, max_recursions=limit)
  sequence = with_changes(tiny_run.CONFIG, model={'kind': 'recursive', 'sharing': 'middle_sequence'})
  with pytest.raises(ValueError, match='max_recursions'):
    Transformer(sequence.model).apply(run.initial().variables, tokens, max_recursions=1)


def test_ways_to_run_models():
  model = tiny_run.CONFIG.model
  assert [(way.routing, way.max_recursions) for way in held_out.ways(model)] == [
    ('topk', 1),
    ('topk', 2),
    ('threshold', 1),
    ('threshold', 2),
  ]
  for changes, expected in (
    ({'kind': 'vanilla'}, [('topk', 1)]),
    ({'kind': 'recursive'}, [('topk', 1), ('topk', 2)]),
    ({'kind': 'recursive', 'sharing': 'middle_sequence'}, [('topk', 2)]),
  ):
    found = held_out.ways(with_changes(tiny_run.CONFIG, model=changes).model)
    assert [(way.routing, way.max_recursions) for way in found] == expected


@pytest.mark.parametrize('length', [2, 3, 16, 60, 64, 2048])
def test_bins_of_positions_cover_the_row_once(length):
  edges = held_out.position_edges(length)
  assert edges[0] == 1
  assert edges[-1] == length
  assert (np.diff(edges) > 0).all()
  assert len(edges) < 20


def test_data_of_another_tokenizer_is_refused(finished_run, tmp_path):
  _, folder = finished_run
  run = types.SimpleNamespace(
    config=tiny_run.CONFIG, folder=types.SimpleNamespace(tokenizer=folder / 'tokenizer.json')
  )
  for number, text in enumerate(('the quick brown fox ', 'jumps over ', 'the lazy dog ', 'and sleeps ')):
    (tmp_path / f'{number}.txt').write_text(text * 100)
  data = {'source': f'files:{tmp_path}/*.txt', 'validation_fraction': 0.5, 'seq_len': 16}
  data['cache_dir'] = str(tmp_path / 'cache')
  other = dataset_lib.prepare(
    with_changes(tiny_run.CONFIG, data={**data, 'tokenizer': 'bpe', 'vocab_size': 300}).data
  )
  with pytest.raises(ConfigError, match='another tokenizer than the run'):
    held_out.open_data(run, str(other.folder))
  same = dataset_lib.prepare(with_changes(tiny_run.CONFIG, data=data).data)
  for name in (str(same.folder), f'prepared:{same.folder}'):
    assert held_out.open_data(run, name).folder == same.folder
  run.config = with_changes(tiny_run.CONFIG, data=data)
  made = held_out.open_data(run, data['source'])
  assert made.tokenizer.digest == tokenizer_lib.Tokenizer.load(run.folder.tokenizer).digest
  with pytest.raises(ConfigError, match='there is no prepared dataset'):
    held_out.open_data(run, 'prepared:nowhere')


def test_all_of_the_named_text_is_measured(tmp_path):
  """Many documents, and a single one, which a training would cut in two; whatever the run's own limits are."""
  data = {
    'cache_dir': str(tmp_path / 'cache'),
    'max_documents': 2,
    'validation_fraction': 0.01,
    'seq_len': 16,
  }
  config = with_changes(tiny_run.CONFIG, data=data)
  folder = types.SimpleNamespace(tokenizer=tmp_path / 'tokenizer.json')
  tokenizer_lib.build(config.data).save(folder.tokenizer)
  run = types.SimpleNamespace(config=config, folder=folder)
  lines = [f'{{"text": "boat number {number} came in"}}' for number in range(40)]
  (tmp_path / 'many.jsonl').write_text('\n'.join(lines))
  (tmp_path / 'one.txt').write_text('the boats came in before the storm ' * 3)
  for name, documents in (('many.jsonl', 40), ('one.txt', 1)):
    found = held_out.open_data(run, f'files:{tmp_path}/{name}').manifest.splits
    assert (found['validation'].documents, found['train'].documents) == (documents, 0)
  (tmp_path / 'short.txt').write_text('a boat')
  with pytest.raises(
    ConfigError, match=r'more than the 7 tokens of the validation split.* lower data.seq_len$'
  ):
    held_out.open_data(run, f'files:{tmp_path}/short.txt')
