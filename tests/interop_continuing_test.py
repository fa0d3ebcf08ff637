"""Beginning from a run of the same model: everything comes along, and other models are refused."""

import dataclasses

import chex
import jax
import numpy as np
import pytest
import tiny
import tiny_run
from flax import traverse_util

from mor_jax.config import ConfigError, with_changes
from mor_jax.interop import pretrained, weights
from mor_jax.interop.continuing import SameModel
from mor_jax.interop.weights import HeldWeights
from mor_jax.training.state import begin_from

EMA = {'selection': 'ema_threshold', 'num_recursions': 2}


def other_weights(state) -> dict:
  """Variables of the same shapes, of other values."""
  rng = np.random.default_rng(3)
  return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), state.variables)


def test_the_state_begins_with_all_of_the_model_and_a_fresh_optimiser():
  run = tiny_run.run()
  theirs = other_weights(run.initial())
  fresh, state = (
    run.initial(),
    begin_from(run.initial(), SameModel(run.config.model, HeldWeights(run.config.model, theirs))),
  )
  chex.assert_trees_all_equal(jax.device_get(state.variables), theirs)
  chex.assert_trees_all_equal(state.opt_state, fresh.opt_state)
  assert int(state.step) == 0
  run.step(state, next(tiny_run.batches()))  # the compiled step takes it


def test_what_routers_keep_comes_along():
  made, variables = tiny.model(**EMA)
  variables = jax.tree.map(lambda leaf: np.asarray(leaf) + 1, variables)
  assert set(variables['routing']) == {'threshold', 'updates'}
  chex.assert_trees_all_equal(
    weights.tree(SameModel(made.config, HeldWeights(made.config, variables))), variables
  )


def test_low_rank_changes_may_be_added():
  made, variables = tiny.model(num_recursions=2)
  config = dataclasses.replace(made.config, lora_rank=2, capacities=(1.0, 0.25))
  begun = traverse_util.flatten_dict(
    weights.tree(SameModel(config, HeldWeights(made.config, variables))), sep='/'
  )
  assert not [path for path in begun if 'lora' in path]
  assert len(begun) == len(jax.tree.leaves(variables))


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (
      {'num_recursions': 3, 'num_layers': 8},
      r'model\.num_recursions=3 cannot begin .*--config\.model\.num_recursions=2',
    ),
    ({'gating': 'residual'}, r'model\.gating=residual cannot begin from init\.source'),
    ({'kind': 'recursive'}, r'model\.kind=recursive cannot begin'),
  ],
)
def test_other_models_are_refused(change, message):
  made, variables = tiny.model(num_recursions=2)
  config = tiny.config(**{'num_recursions': 2, **change})
  with pytest.raises(ConfigError, match=message):
    SameModel(config, HeldWeights(made.config, variables))


def test_layers_cannot_be_picked_of_it():
  made, variables = tiny.model(num_recursions=2)
  config = with_changes(tiny_run.CONFIG, init={'method': 'upper'})
  opened = pretrained.Pretrained('init.source', 'a run', HeldWeights(made.config, variables), None, None)
  with pytest.raises(ConfigError, match=r'init\.method=upper picks layers of a vanilla model'):
    pretrained.initial_weights(config, opened)
