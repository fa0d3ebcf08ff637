"""Unigram and bigram entropy of a split: the best loss of a model with no context or one token of context."""

from collections.abc import Iterable

import numpy as np

from mor_jax.training.targets import predicted


def ngram_entropies(rows: Iterable[dict[str, np.ndarray]], vocab_size: int) -> tuple[float, float]:
  """Empirical entropies of the tokens of `rows`, in nats per predicted token.

  As in the language-model loss, only pairs of tokens in the same segment count. The counts come
  from the rows themselves (plug-in entropies), so no unigram or bigram model has a lower loss on
  them, not even one fitted to them.

  Args:
    rows: 'tokens' and 'segment_ids' of shape (..., T), for instance `PreparedDataset.rows(split)`.
    vocab_size: size V of the vocabulary.

  Returns:
    (H(target), H(target | previous token)).

  Raises:
    ValueError: no row has two tokens in the same segment.
  """
  pairs = np.concatenate([_pairs(row, vocab_size) for row in rows])
  if not pairs.size:
    raise ValueError('no row has two tokens in the same segment, so nothing is predicted')
  joint = _entropy(pairs)
  return _entropy(pairs % vocab_size), joint - _entropy(pairs // vocab_size)


def _pairs(row: dict[str, np.ndarray], vocab_size: int) -> np.ndarray:
  """(previous token) * V + target for every predicted token."""
  tokens_T, counted = row['tokens'], predicted(row)
  before, target = tokens_T[..., :-1][counted], tokens_T[..., 1:][counted]
  return before.astype(np.int64) * vocab_size + target


def _entropy(symbols: np.ndarray) -> float:
  _, counts = np.unique(symbols, return_counts=True)
  probabilities = counts / counts.sum()
  return float(-np.sum(probabilities * np.log(probabilities)))
