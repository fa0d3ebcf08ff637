import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from mor_jax.training import loss as loss_lib
from mor_jax.training import targets as targets_lib


def _batch(rows: slice = slice(0, 8)) -> dict[str, np.ndarray]:
  return {name: values[rows] for name, values in tiny_run.rows().items()}


def test_nll_is_that_of_a_loop_over_documents():
  """A model of uniform noise, against a loop over the documents that shares no code with the loss."""
  batch = _batch(slice(-4, None))
  logits_BTV = np.random.default_rng(0).normal(size=(4, tiny_run.SEQ_LEN, 257)).astype(np.float32)
  expected, targets = 0.0, 0
  for row in range(4):
    for t in range(1, tiny_run.SEQ_LEN):
      segment = batch['segment_ids'][row, t]
      if segment != 0 and segment == batch['segment_ids'][row, t - 1]:
        scores = logits_BTV[row, t - 1].astype(np.float64)
        expected += np.log(np.exp(scores).sum()) - scores[batch['tokens'][row, t]]
        targets += 1
  found = loss_lib.next_token_nll(jnp.asarray(logits_BTV), jnp.eye(257), batch)  # the head does nothing
  assert float(found) == pytest.approx(expected, rel=1e-6)
  assert int(targets_lib.predicted(batch).sum()) == targets
  assert targets < 4 * (tiny_run.SEQ_LEN - 1), 'the rows must have padding or several documents'


def test_padding_changes_nothing():
  """What stands in padding, and how much of it there is, does not reach loss or gradient."""
  batch = _batch(slice(-2, None))
  assert (batch['segment_ids'] == 0).any()
  padding = {name: np.zeros_like(values) for name, values in batch.items()}
  more_rows = {name: np.concatenate([batch[name], padding[name]]) for name in batch}
  other_tokens = batch | {'tokens': np.where(batch['segment_ids'] == 0, 7, batch['tokens'])}
  expected = _loss_and_gradient(batch, micro_batches=1)
  _assert_close(_loss_and_gradient(more_rows, micro_batches=2), expected, 1e-6)
  _assert_close(_loss_and_gradient(other_tokens, micro_batches=1), expected, 1e-6)


def test_without_segment_mask_a_row_is_one_document():
  batch = next(
    {name: values[row : row + 1] for name, values in tiny_run.rows().items()}
    for row, segments in enumerate(tiny_run.rows()['segment_ids'])
    if segments.max() > 1
  )
  seen = targets_lib.visible_batch(batch, segment_mask=False)
  length = int((batch['segment_ids'] > 0).sum())
  assert int(targets_lib.predicted(seen).sum()) == length - 1
  np.testing.assert_array_equal(seen['positions'][0], np.arange(tiny_run.SEQ_LEN))
  assert targets_lib.visible_batch(batch, segment_mask=True) == batch


@functools.cache
def _gradient():
  run = tiny_run.run()
  config = dataclasses.replace(run.config.model, aux_loss_weight=1.0)  # so that an error in it is seen
  return config, jax.jit(jax.value_and_grad(loss_lib.make_loss(run.model.apply, config), has_aux=True))


def _loss_and_gradient(batch, micro_batches):
  """Sum of the shares of the micro-batches."""
  config, gradient = _gradient()
  params = tiny_run.run().initial().params
  batch_ABT = {name: rows.reshape(micro_batches, -1, rows.shape[-1]) for name, rows in batch.items()}
  whole = loss_lib.normalizers(config, jax.tree.map(jnp.asarray, batch_ABT))
  total = None
  for index in range(micro_batches):
    rows = {name: values[index] for name, values in batch_ABT.items()}
    (loss, _), grads = gradient(params, rows, whole, {}, jax.random.key(0))
    total = (loss, grads) if total is None else jax.tree.map(jnp.add, total, (loss, grads))
  return total


def _assert_close(actual, expected, relative):
  """Norm of the difference of every leaf, relative to the leaf's norm (float32)."""
  for path, wanted in jax.tree_util.tree_leaves_with_path(expected):
    found = dict(jax.tree_util.tree_leaves_with_path(actual))[path]
    error = jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted)
    assert error < relative, f'{jax.tree_util.keystr(path)}: {error}'
