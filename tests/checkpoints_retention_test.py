"""Which checkpoints may go."""

import pytest

from mor_jax.checkpoints.retention import to_remove
from mor_jax.config import CheckpointConfig

LOSSES = {10: 3.0, 20: 1.0, 30: None, 40: 2.0, 50: None}


@pytest.mark.parametrize(
  ('settings', 'removed'),
  [
    ({'keep': 2}, [10, 20, 30]),
    ({'keep': 9}, []),
    ({'keep': 1, 'keep_every': 20}, [10, 30]),
    ({'keep': 1, 'keep_best': 1}, [10, 30, 40]),
    ({'keep': 1, 'keep_best': 2}, [10, 30]),
    ({'keep': 2, 'keep_every': 30, 'keep_best': 1}, [10]),
  ],
)
def test_what_is_neither_new_nor_asked_for_goes(settings, removed):
  assert to_remove(CheckpointConfig(**settings), LOSSES) == removed


def test_nothing_to_keep():
  assert to_remove(CheckpointConfig(), {}) == []
