import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run

from mor_jax.config import TrainConfig
from mor_jax.training import optimizer as optimizer_lib

TRAIN = TrainConfig(
  steps=100, warmup_steps=10, decay_fraction=0.2, learning_rate=1e-2, final_learning_rate=1e-3
)


def _rates(train: TrainConfig) -> np.ndarray:
  schedule = optimizer_lib.learning_rate_schedule(train)
  return np.array([float(schedule(count)) for count in range(train.steps)])


def test_wsd_warms_up_stays_and_decays():
  rates = _rates(TRAIN)
  np.testing.assert_allclose(rates[:10], 1e-3 * np.arange(1, 11), rtol=1e-5)
  np.testing.assert_allclose(rates[9:80], 1e-2, rtol=1e-5)
  np.testing.assert_allclose(np.diff(rates[79:]), -(1e-2 - 1e-3) / 20, rtol=1e-3)
  assert rates[-1] == pytest.approx(1e-3, rel=1e-5)


def test_cosine_warms_up_and_falls_to_the_end():
  rates = _rates(dataclasses.replace(TRAIN, schedule='cosine'))
  np.testing.assert_allclose(rates[:10], 1e-3 * np.arange(1, 11), rtol=1e-5)
  assert rates[54] == pytest.approx((1e-2 + 1e-3) / 2, rel=1e-5)  # halfway between steps 10 and 100
  assert rates[-1] == pytest.approx(1e-3, rel=1e-5)


@pytest.mark.parametrize(
  'changes',
  [
    {'warmup_steps': 0},
    {'decay_fraction': 0.0},
    {'decay_fraction': 1.0},
    {'warmup_steps': 100},
    {'steps': 1, 'warmup_steps': 0},
    {'steps': 1, 'warmup_steps': 1, 'schedule': 'cosine'},
  ],
)
def test_extreme_schedules_stay_between_zero_and_the_peak(changes):
  rates = _rates(dataclasses.replace(TRAIN, **changes))
  assert (rates > 0).all()
  assert (rates <= 1e-2 * (1 + 1e-6)).all()


def test_decay_is_decoupled_and_spares_norm_scales():
  """With gradients of zero, only the decay moves parameters: by learning rate x decay."""
  train = dataclasses.replace(TRAIN, weight_decay=0.5, warmup_steps=0, decay_fraction=0.0)
  params = tiny_run.run().initial().params
  optimizer = optimizer_lib.make_optimizer(train)
  updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
  changed = optax.apply_updates(params, updates)
  factors = {
    path: float(np.max(np.abs(new)) / np.max(np.abs(old)))
    for (path, old), (_, new) in zip(_leaves(params), _leaves(changed), strict=True)
  }
  spared = {path for path, factor in factors.items() if factor == 1}
  assert spared == {path for path in factors if path.endswith('scale')}
  assert len(spared) >= 3
  for path, factor in factors.items():
    if path not in spared:
      assert factor == pytest.approx(1 - 1e-2 * 0.5, rel=1e-5), path


def test_gradient_is_clipped_by_its_global_norm():
  """AdamW forgets the scale of a constant gradient, so the clipped norm is read from its first moment."""
  params = {'a': {'kernel': jnp.ones(3)}, 'b': {'kernel': jnp.ones(4)}}
  grads = {'a': {'kernel': jnp.full(3, 2.0)}, 'b': {'kernel': jnp.full(4, 1.0)}}  # norm 4
  optimizer = optimizer_lib.make_optimizer(dataclasses.replace(TRAIN, clip_norm=0.5, beta1=0.0))
  _, state = optimizer.update(grads, optimizer.init(params), params)
  moment = optax.tree.get(state, 'mu')
  np.testing.assert_allclose(moment['a']['kernel'], 2.0 * 0.5 / 4, rtol=1e-6)
  np.testing.assert_allclose(moment['b']['kernel'], 1.0 * 0.5 / 4, rtol=1e-6)


def _leaves(tree):
  return [
    ('/'.join(key.key for key in path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  ]
