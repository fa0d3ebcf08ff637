import jax
import numpy as np
import pytest
import tiny_run

from mor_jax.training.checkpoint import Checkpoints


@pytest.fixture(scope='module')
def run():
  return tiny_run.run()


def test_state_survives_bit_for_bit_while_training_goes_on(run, tmp_path):
  """The step donates the state's memory right after the asynchronous save has begun."""
  batches = tiny_run.batches()
  state, _ = run.step(run.initial(), next(batches))
  saved = jax.tree.map(lambda leaf: np.array(leaf, copy=True), state)
  with Checkpoints(tmp_path / 'new' / 'checkpoints', keep=2) as checkpoints:
    checkpoints.save(1, state)
    for _ in range(3):
      state, _ = run.step(state, next(batches))
    checkpoints.wait()
    restored = checkpoints.restore(run.abstract)
  assert jax.tree.structure(restored) == jax.tree.structure(saved)
  for leaf, original in zip(jax.tree.leaves(restored), jax.tree.leaves(saved), strict=True):
    np.testing.assert_array_equal(leaf, original)
    assert leaf.dtype == original.dtype
  next_state, _ = run.step(restored, next(batches))
  assert int(next_state.step) == 2


def test_newest_are_kept(run, tmp_path):
  state = run.initial()
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    assert checkpoints.latest_step is None
    for step in (3, 6, 9):
      checkpoints.save(step, state)
    checkpoints.wait()
    assert checkpoints.latest_step == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == ['6', '9']
    assert checkpoints.path(9) == tmp_path / '9'
  with Checkpoints(tmp_path, keep=2) as reopened:
    assert reopened.latest_step == 9
