import itertools
import json
import os
import pathlib
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest
import tiny_run

from mor_jax.config import Config, with_changes
from mor_jax.model import flops
from mor_jax.training.meter import add_up, router_metrics
from mor_jax.training.targets import predicted

LAYER = ('attention', 'attention_norm', 'mlp', 'mlp_norm')
GOLDEN = pathlib.Path(__file__).parent / 'fixtures' / 'golden_loss.json'


def train(steps: int, config: Config = tiny_run.CONFIG) -> list[dict[str, float]]:
  """Metrics of the first steps of the tiny run."""
  run = tiny_run.run(config)
  state, history = run.initial(), []
  for batch in itertools.islice(tiny_run.batches(config), steps):
    state, metrics = run.step(state, batch)
    routing = router_metrics(add_up(None, metrics.pop('counts')))
    history.append({name: float(value) for name, value in metrics.items()} | routing)
  return history


def test_golden_loss_curve():
  """20 steps in float32, recorded with jax 0.10.2 on a CPU; 1e-3 relative allows for other versions."""
  history = train(20)
  golden = json.loads(GOLDEN.read_text())
  for name, values in golden.items():
    np.testing.assert_allclose([metrics[name] for metrics in history], values, rtol=1e-3, err_msg=name)
  assert golden['loss'][-1] < golden['loss'][0] - 1


def test_metrics_are_of_the_whole_batch():
  config = tiny_run.CONFIG
  (metrics,) = train(1)
  assert metrics['loss'] == pytest.approx(np.log(257), abs=0.1), 'an untrained model knows nothing'
  assert metrics['learning_rate'] == pytest.approx(config.train.learning_rate / config.train.warmup_steps)
  modules = [
    'embed',
    'final_norm',
    *(f'{part}.{name}' for part in ('first', 'block', 'last') for name in LAYER),
  ]
  norms = [metrics[f'grad_norm/{name}'] for name in [*modules, 'router']]
  assert np.linalg.norm(norms) == pytest.approx(metrics['grad_norm']), 'of every module, of all its layers'
  selected = config.model.selected_tokens(tiny_run.SEQ_LEN)
  for step, count in enumerate(selected, start=1):
    assert metrics[f'tokens_recursion_{step}'] == pytest.approx(count / tiny_run.SEQ_LEN)


def test_accumulation_makes_the_same_update():
  """Micro-batches sum in another order, so gradients agree to rounding: 1e-6 relative in float32.

  Compared is the first moment of AdamW after one step, which is the clipped gradient times
  (1 - beta1): the parameters themselves move by the sign of the gradient, whatever its size.
  The last rows of the text have padding, so micro-batches differ in numbers of targets and entrants.
  """
  config = tiny_run.CONFIG
  batch = {name: values[-config.train.global_batch :] for name, values in tiny_run.rows().items()}
  targets = predicted(batch).reshape(4, -1).sum(axis=1)
  assert len(set(targets.tolist())) > 1
  results = []
  for accumulation in (1, 4):
    run = tiny_run.run(with_changes(config, train={'accumulation': accumulation}))
    state, metrics = run.step(run.initial(), batch)
    metrics |= router_metrics(add_up(None, metrics.pop('counts')))
    results.append((jax.tree.map(np.asarray, state.opt_state[1][0].mu), metrics))
  (moment, metrics), (split_moment, split_metrics) = results
  for name, value in metrics.items():
    assert float(split_metrics[name]) == pytest.approx(float(value), rel=1e-6), name
  for one, other in zip(jax.tree.leaves(moment), jax.tree.leaves(split_moment), strict=True):
    assert np.linalg.norm(one - other) < 1e-6 * np.linalg.norm(one)


def test_an_update_that_is_not_finite_halts_for_good():
  """Steps that were on their way change nothing either, though their own numbers are fine."""
  run, batches = tiny_run.run(), tiny_run.batches()
  sound = run.step(run.initial(), next(batches))[0]
  broken = sound.replace(params=jax.tree.map(lambda leaf: leaf * 1e30, sound.params))
  before = jax.tree.map(np.asarray, broken)
  halted, metrics = run.step(broken, next(batches))
  assert not np.isfinite(metrics['loss'])
  assert bool(metrics['halted'])
  _assert_same(halted, before.replace(halted=np.array(True)))
  mended = halted.replace(params=jax.tree.map(lambda leaf: np.asarray(leaf) / 1e30, halted.params))
  before = jax.tree.map(np.asarray, mended)
  later, metrics = run.step(run.placed(mended), next(batches))
  assert np.isfinite(metrics['loss'])
  assert bool(metrics['halted'])
  _assert_same(later, before)


def test_skips_as_many_updates_as_allowed():
  """A skipped batch leaves everything but the step as it was; the optimiser never hears of it."""
  run = tiny_run.run(with_changes(tiny_run.CONFIG, train={'on_nonfinite': 'skip', 'max_skipped': 1}))
  batch = next(tiny_run.batches())
  sound = run.initial()
  broken = sound.replace(params=jax.tree.map(lambda leaf: leaf * 1e30, sound.params))
  before = jax.tree.map(np.asarray, broken)
  once, metrics = run.step(broken, batch)
  assert (int(metrics['skipped']), bool(metrics['halted'])) == (1, False)
  _assert_same(once, before.replace(step=np.int32(1), skipped=np.int32(1)))
  twice, metrics = run.step(once, batch)
  assert (int(metrics['skipped']), bool(metrics['halted'])) == (1, True)
  assert int(twice.step) == 1

  mended = run.initial().replace(step=jax.numpy.int32(1), skipped=jax.numpy.int32(1))
  _, metrics = run.step(run.placed(mended), batch)
  warmup = tiny_run.CONFIG.train.warmup_steps
  assert metrics['learning_rate'] == pytest.approx(tiny_run.CONFIG.train.learning_rate / warmup)


def _assert_same(state, expected) -> None:
  chex.assert_trees_all_equal(state, expected)


def test_a_step_that_would_be_compiled_again_is_refused():
  """A batch of another length, as a loader's mistake would make it, stops the run instead of slowing every step."""
  run = tiny_run.run(with_changes(tiny_run.CONFIG, train={'seed': 2}))
  state, batch = run.initial(), next(tiny_run.batches())
  state, _ = run.step(state, batch)
  with pytest.raises(AssertionError, match=r'train_step.* is traced > 1 times'):
    run.step(state, {name: rows[:, :32] for name, rows in batch.items()})


def test_initial_parameters_follow_the_seed():
  first = tiny_run.run().initial().params
  again = tiny_run.run().initial().params
  other = tiny_run.run(with_changes(tiny_run.CONFIG, train={'seed': 1})).initial().params
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


@pytest.mark.slow
def test_rows_may_be_split_over_devices():
  """4 CPU devices in a process of their own make the losses of one device, with accumulation (float32)."""
  config = with_changes(tiny_run.CONFIG, train={'accumulation': 2})
  script = f"""
import sys
sys.path[:0] = {[str(GOLDEN.parents[1]), str(GOLDEN.parents[2])]}
import tiny_run, training_step_test
from mor_jax.config import with_changes
from mor_jax.parallel import mesh
tiny_run.MESH = mesh.make_mesh()
assert tiny_run.MESH.shape['replica'] == 4
config = with_changes(tiny_run.CONFIG, train={{'accumulation': 2}})
print([metrics['loss'] for metrics in training_step_test.train(5, config)])
"""
  environment = os.environ | {'XLA_FLAGS': '--xla_force_host_platform_device_count=4'}
  done = subprocess.run([sys.executable, '-c', script], env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  expected = [metrics['loss'] for metrics in train(5, config)]
  np.testing.assert_allclose(json.loads(done.stdout), expected, rtol=1e-5)
