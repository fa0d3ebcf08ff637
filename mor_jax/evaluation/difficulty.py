"""Loss, accuracy and depth by difficulty, for data whose tokens say how hard they are (`data/synthetic.py`)."""

from typing import Any

import numpy as np

from mor_jax.data import loader


def kinds(dataset: loader.Dataset, max_rows: int | None = None) -> int:
  """One more than the largest difficulty in the validation rows; 0: the data do not know any."""
  if 'difficulty' not in dataset.extras:
    return 0
  rows = dataset.rows('validation')
  count = len(rows) if max_rows is None else min(max_rows, len(rows))
  return 1 + max(int(rows[index]['difficulty'].max()) for index in range(count))


def summarize(sums: dict[str, np.ndarray]) -> dict[str, Any]:
  """'by_difficulty', for every difficulty that occurs: scored tokens, loss, accuracy, mean depth; and their
  'rank_correlation' with the depth, Spearman's over all scored tokens (None where one of them never varies).

  Args:
    sums: 'difficulty' of `nll.make_nll_step`.
  """
  entries = []
  counts_KR1 = sums['depth_KR1']
  for difficulty, targets in enumerate(sums['targets']):
    if targets:
      depths_R1 = counts_KR1[difficulty]
      entries.append(
        {
          'difficulty': difficulty,
          'predicted_tokens': int(targets),
          'nll': float(sums['nll'][difficulty] / targets),
          'accuracy': float(sums['correct'][difficulty] / targets),
          'mean_depth': float(depths_R1 @ np.arange(len(depths_R1)) / targets),
        }
      )
  return {'by_difficulty': entries, 'rank_correlation': rank_correlation(counts_KR1)}


def rank_correlation(counts_KL: np.ndarray) -> float | None:
  """Spearman's rank correlation of two variables from the number of cases of every pair of values.

  Equal values share the mean of their ranks. None if one of the two has one value only.
  """
  cases = counts_KL.sum()
  if not cases:
    return None
  centred = []
  for counts in (counts_KL.sum(axis=1), counts_KL.sum(axis=0)):
    centred.append(np.cumsum(counts) - counts / 2 - cases / 2)
  ranks_K, ranks_L = centred
  spread = (ranks_K**2 @ counts_KL.sum(axis=1)) * (ranks_L**2 @ counts_KL.sum(axis=0))
  return float(ranks_K @ counts_KL @ ranks_L / np.sqrt(spread)) if spread > 0 else None
