"""Depth of tokens: the model's own choices, words put together from tokens, positions averaged."""

import dataclasses

import numpy as np
import pytest
import tiny

from mor_jax.config import Config, DataConfig, with_changes
from mor_jax.data import tokenizer as tokenizer_lib
from mor_jax.data.token_texts import token_texts
from mor_jax.evaluation import depth


@pytest.fixture(scope='module')
def bytes_tokenizer():
  return tokenizer_lib.build(DataConfig(tokenizer='bytes'))


def row_of(tokenizer, text: str, depths: list[int]) -> depth.RoutedRow:
  tokens_T = np.array(tokenizer.encode(text))
  return depth.RoutedRow(tokens_T, np.ones_like(tokens_T), np.array(depths), np.zeros((3, len(tokens_T))))


def test_a_word_is_as_deep_as_its_tokens_on_average(bytes_tokenizer):
  row = row_of(bytes_tokenizer, 'the cat, 42', [1, 1, 1, 3, 2, 3, 1, 3, 1, 2, 1])
  assert [(word.text, word.depth, word.kind) for word in depth.words(bytes_tokenizer, row)] == [
    ('the', 1.0, 'function word'),
    ('cat', 2.0, 'content word'),
    (',', 3.0, 'punctuation'),
    ('42', 1.5, 'number'),
  ]


def test_words_do_not_reach_over_documents(bytes_tokenizer):
  tokens_T = np.array(bytes_tokenizer.encode('abcd'))
  row = depth.RoutedRow(tokens_T, np.array([1, 1, 2, 2]), np.array([1, 1, 3, 3]), np.zeros((3, 4)))
  assert [(word.text, word.depth) for word in depth.words(bytes_tokenizer, row)] == [('ab', 1.0), ('cd', 3.0)]


def test_a_character_of_several_tokens_belongs_to_the_last(bytes_tokenizer):
  text = 'né€😀!'
  tokens_T = np.array(bytes_tokenizer.encode(text))
  texts = token_texts(bytes_tokenizer, tokens_T)
  assert len(texts) == len(tokens_T)
  assert [piece for piece in texts if piece] == list(text)
  assert texts[1:3] == ['', 'é']


def test_text_cut_within_a_character_keeps_a_text_for_every_token(bytes_tokenizer):
  tokens_T = np.array(bytes_tokenizer.encode('a€')[:-1])
  texts = token_texts(bytes_tokenizer, tokens_T)
  assert len(texts) == len(tokens_T)
  assert ''.join(texts).startswith('a')


def test_means_by_place_leave_padding_out():
  rows = [
    depth.RoutedRow(np.zeros(4, int), np.array([1, 1, 1, 1]), np.array([1, 1, 3, 3]), np.zeros((3, 4))),
    depth.RoutedRow(np.zeros(4, int), np.array([1, 1, 0, 0]), np.array([3, 1, 0, 0]), np.zeros((3, 4))),
  ]
  places, means = depth.depth_by_position(rows, bins=2)
  np.testing.assert_allclose(places, [0.5, 2.5])
  np.testing.assert_allclose(means, [1.5, 3.0])


def test_rows_are_routed_as_the_model_routes_them():
  model, variables = tiny.model(kind='mor', num_recursions=2)
  config = with_changes(Config(), model=dataclasses.asdict(model.config), data={'seq_len': 16})
  tokens_BT = np.asarray(tiny.tokens(2, 16))
  segments_BT = np.array([[1] * 16, [0] * 16], np.int32)
  batch = {'tokens': tokens_BT, 'segment_ids': segments_BT, 'positions': np.tile(np.arange(16), (2, 1))}
  (row,) = depth.route_rows(config, variables, [batch])  # the row of padding is left out
  output = tiny.apply(model, 'threshold')(variables, tokens_BT, segment_ids=segments_BT)
  np.testing.assert_array_equal(row.depth_T, output.routing.depth_BT[0])
  offered_RT = ~np.isnan(row.scores_RT)
  np.testing.assert_array_equal(offered_RT, output.routing.entered_RBT[:, 0])
  assert 0 <= row.scores_RT[offered_RT].min() < row.scores_RT[offered_RT].max() <= config.model.gate_scale


def test_a_model_without_router_is_refused():
  with pytest.raises(ValueError, match='no router'):
    depth.route_rows(with_changes(Config(), model={'kind': 'recursive'}), {}, [])
