import itertools
import json
import pathlib

import jax
import numpy as np
import pytest
import tiny_run

from mor_jax.model import flops

GOLDEN = pathlib.Path(__file__).parent / 'fixtures' / 'golden_loss.json'


def _train(config=tiny_run.CONFIG, steps=None, state=None):
  """(last state, metrics of each step) of a run from its beginning or from `state`."""
  run = tiny_run.run(config)
  state = run.initial() if state is None else state
  first = int(state.step)
  history = []
  for batch in itertools.islice(tiny_run.batches(config, first), (steps or config.train.steps) - first):
    state, metrics = run.step(state, batch)
    history.append({name: float(value) for name, value in metrics.items()})
  return state, history


def test_golden_loss_curve():
  """20 steps in float32, recorded with jax 0.10.2 on a CPU; 1e-3 relative allows for other versions."""
  _, history = _train()
  golden = json.loads(GOLDEN.read_text())
  for name, values in golden.items():
    np.testing.assert_allclose([metrics[name] for metrics in history], values, rtol=1e-3, err_msg=name)
  assert golden['loss'][-1] < golden['loss'][0] - 1


def test_metrics_are_of_the_whole_batch():
  config = tiny_run.CONFIG
  _, (metrics,) = _train(steps=1)
  assert metrics['loss'] == pytest.approx(np.log(257), abs=0.1), 'an untrained model knows nothing'
  assert metrics['learning_rate'] == pytest.approx(config.train.learning_rate / config.train.warmup_steps)
  selected = config.model.selected_tokens(tiny_run.SEQ_LEN)
  for step, count in enumerate(selected, start=1):
    assert metrics[f'tokens_recursion_{step}'] == pytest.approx(count / tiny_run.SEQ_LEN)


def test_accumulation_makes_the_same_update():
  """Micro-batches sum in another order, so gradients agree to rounding: 1e-6 relative in float32.

  Compared is the first moment of AdamW after one step, which is the clipped gradient times
  (1 - beta1): the parameters themselves move by the sign of the gradient, whatever its size.
  """
  whole, (whole_metrics,) = _train(steps=1)
  split, (split_metrics,) = _train(tiny_run.CONFIG.replace(train={'accumulation': 4}), steps=1)
  for name, value in whole_metrics.items():
    assert split_metrics[name] == pytest.approx(value, rel=1e-6), name
  for one, other in zip(jax.tree.leaves(_moment(whole)), jax.tree.leaves(_moment(split)), strict=True):
    assert np.linalg.norm(one - other) < 1e-6 * np.linalg.norm(one)


def test_initial_parameters_follow_the_seed():
  first = tiny_run.run().initial().params
  again = tiny_run.run().initial().params
  other = tiny_run.run(tiny_run.CONFIG.replace(train={'seed': 1})).initial().params
  kernel = lambda params: np.asarray(params['embed']['embedding'])  # noqa: E731
  np.testing.assert_array_equal(kernel(first), kernel(again))
  assert not np.allclose(kernel(first), kernel(other))
  sizes = sum(leaf.size for leaf in jax.tree.leaves(first))
  assert sizes == flops.count_parameters(tiny_run.CONFIG.model).total


def test_state_is_donated():
  """The old state's memory is given to the new one; peak memory would be a state more otherwise."""
  run = tiny_run.run()
  state = run.initial()
  run.step(state, next(tiny_run.batches()))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def _moment(state):
  return jax.tree.map(np.asarray, state.opt_state[1][0].mu)
