"""N-gram entropies against cases that can be worked out by hand."""

import math

import numpy as np
import pytest

from mor_jax.evaluation.ngram import ngram_entropies


def row(tokens, segments=None):
  tokens = np.array(tokens, np.int32)
  return {
    'tokens': tokens,
    'segment_ids': np.ones_like(tokens) if segments is None else np.array(segments, np.int32),
  }


def test_a_cycle_is_uniform_but_certain():
  unigram, bigram = ngram_entropies([row([0, 1, 2, 3] * 4 + [0])], vocab_size=4)
  assert unigram == pytest.approx(math.log(4), abs=1e-12)
  assert bigram == pytest.approx(0, abs=1e-12)


def test_independent_bits():
  unigram, bigram = ngram_entropies([row([0, 0, 1, 1, 0])], vocab_size=2)  # each of 00, 01, 11, 10 once
  assert unigram == pytest.approx(math.log(2), abs=1e-12)
  assert bigram == pytest.approx(math.log(2), abs=1e-12)


def test_uneven_counts_over_several_rows():
  # Pairs: 0->0 twice, 0->1 once, 1->2 once. Targets: 0 twice, 1, 2.
  unigram, bigram = ngram_entropies([row([0, 0, 0, 1]), row([1, 2])], vocab_size=50_000)
  assert unigram == pytest.approx(1.5 * math.log(2), abs=1e-12)
  assert bigram == pytest.approx(3 / 4 * (math.log(3) - 2 / 3 * math.log(2)), abs=1e-12)


def test_padding_and_first_tokens_of_segments_are_not_predicted():
  tokens, segments = [0, 1, 5, 0, 1, 7, 7, 7], [1, 1, 2, 3, 3, 0, 0, 0]
  assert ngram_entropies([row(tokens, segments)], vocab_size=8) == (0, 0)  # 0->1, twice


def test_nothing_predicted_is_an_error():
  with pytest.raises(ValueError, match='nothing is predicted'):
    ngram_entropies([row([1, 2], [1, 2])], vocab_size=4)
