"""Training a part of the parameters, and other parts in turn."""

import itertools
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run

from mor_jax import train
from mor_jax.config import ConfigError, with_changes
from mor_jax.data import schedule
from mor_jax.model import flops
from mor_jax.parallel import device_memory
from mor_jax.parallel import mesh as mesh_lib
from mor_jax.planning import ahead_of_time
from mor_jax.planning.executed import executed_flops
from mor_jax.planning.memory import train_memory
from mor_jax.runs import metrics as metrics_lib
from mor_jax.runs import restore
from mor_jax.training import handover, phases, trainable
from mor_jax.training.optimizer import make_optimizer
from mor_jax.training.step import abstract_batch, make_train_step, split_batch
from mor_jax.units import byte_count

DECAYING = with_changes(tiny_run.CONFIG, train={'weight_decay': 10.0, 'accumulation': 2})
COUNTERS = 2 * 4  # of Adam and of the schedule


def by_path(params) -> dict[str, np.ndarray]:
  leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(params))
  return {'/'.join(entry.key for entry in path): leaf for path, leaf in leaves}


def moments(state, kind: str = 'mu') -> dict[str, np.ndarray]:
  """The first (mu) or second (nu) moments of a state by path, whatever group they are in."""
  return moments_of(state.opt_state, kind)


def moments_of(opt_state, kind: str = 'mu') -> dict[str, np.ndarray]:
  """The same of an optimiser's state."""
  found = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(opt_state)):
    attributes = [getattr(entry, 'name', None) for entry in path]
    if kind in attributes:
      found['/'.join(entry.key for entry in path[attributes.index(kind) + 1 :])] = leaf
  return found


def after_steps(config, steps: int = 2):
  """The initial parameters, the state after some steps, and the metrics of the last."""
  run, batches = tiny_run.run(config), tiny_run.batches(config)
  state = run.initial()
  before, metrics = by_path(state.params), {}
  for batch in itertools.islice(batches, steps):
    state, metrics = run.step(state, batch)
  return before, state, metrics


# ---- a part ----


@pytest.mark.parametrize(
  ('name', 'begins'),
  [
    ('routers', ('router/',)),
    pytest.param('block', ('block/',), marks=pytest.mark.slow),
    pytest.param(
      'routers, ^last/.*norm,embed',
      ('router/', 'last/attention_norm', 'last/mlp_norm', 'embed'),
      marks=pytest.mark.slow,
    ),
  ],
)
def test_what_is_frozen_stays_bit_for_bit_and_has_no_moments(name, begins):
  """Under a weight decay that would shrink every matrix by a tenth."""
  config = with_changes(DECAYING, train={'trainable': name})
  before, state, metrics = after_steps(config)
  after = by_path(state.params)
  assert before.keys() == after.keys()
  trained = {path for path in before if path.startswith(begins)}
  assert trained
  moved = {path for path in before if not np.array_equal(before[path], after[path])}
  assert moved == trained
  assert moments(state).keys() == moments(state, 'nu').keys() == trained

  size = sum(before[path].size for path in trained)
  assert trainable.count_parameters(config.model, name) == size
  assert device_memory.bytes_on_a_device(state.opt_state) == 8 * size + COUNTERS
  whole = device_memory.bytes_on_a_device(tiny_run.run(DECAYING).abstract.opt_state)
  assert whole == 8 * sum(leaf.size for leaf in before.values()) + COUNTERS
  estimate = train_memory(config, 4)
  assert estimate.state == 4 * flops.count_parameters(config.model).total + 8 * size
  assert estimate.gradients == 2 * 4 * size

  modules = {key.removeprefix('grad_norm/').replace('.', '/') for key in metrics if '/' in key}
  assert all(module.startswith(tuple(begin.rstrip('/') for begin in begins)) for module in modules)
  norms = [float(metrics[key]) for key in metrics if key.startswith('grad_norm/')]
  assert np.linalg.norm(norms) == pytest.approx(float(metrics['grad_norm']))


@pytest.mark.slow
def test_gradients_are_those_of_training_everything():
  """Read from the first moment after a step, which is (1 - beta1) times the clipped gradient; float32."""
  _, whole, all_metrics = after_steps(tiny_run.CONFIG, 1)
  _, part, metrics = after_steps(with_changes(DECAYING, train={'trainable': 'block'}), 1)
  expected, clip = moments(whole), tiny_run.CONFIG.train.clip_norm
  scales = [min(1.0, clip / float(values['grad_norm'])) for values in (all_metrics, metrics)]
  assert scales[0] < scales[1] == 1, 'what is frozen does not count for the clipping'
  for path, moment in moments(part).items():
    np.testing.assert_allclose(
      moment / scales[1], expected[path] / scales[0], rtol=1e-3, atol=1e-8, err_msg=path
    )


def test_clipping_is_by_the_norm_of_what_is_trained():
  params = {'a': {'kernel': jnp.ones(3)}, 'b': {'kernel': jnp.ones(4)}}
  changes = {'trainable': '^a/', 'clip_norm': 0.5, 'beta1': 0.0}
  optimizer = make_optimizer(with_changes(tiny_run.CONFIG, train=changes).train)
  grads = {'a': {'kernel': jnp.full(3, 2.0)}}
  updates, state = optimizer.update(grads, optimizer.init(params), params)
  assert updates.keys() == {'a'}
  np.testing.assert_allclose(optax.tree.norm(optax.tree.get(state, 'mu')), 0.5, rtol=1e-6)


@pytest.mark.parametrize(
  ('name', 'model'), [('aux_router', {'causality': 'aux_router'}), ('router', {'router_target': 'benefit'})]
)
def test_routers_that_are_a_group_of_their_own_are_trained_alone_or_not_at_all(name, model):
  params = {'block': {'kernel': jnp.ones(3)}, name: {'output': {'kernel': jnp.ones(3)}}}
  for what, expected in (('routers', name), ('block', 'block')):
    config = with_changes(tiny_run.CONFIG, model=model, train={'trainable': what})
    optimizer = make_optimizer(config.train, config.model)
    state = optimizer.init(params)
    grads, _ = trainable.split(what, params)
    updates, state = optimizer.update(grads, state, params)
    assert updates.keys() == {expected}
    assert [path.split('/')[0] for path in moments_of(state)] == [expected]


def test_gradients_of_what_is_frozen_are_not_computed():
  """Of a layer's product three times its FLOPs are left two, forward and back through the stream."""

  def step_flops(name):
    config = with_changes(tiny_run.CONFIG, train={'trainable': name})
    run = tiny_run.run(config)
    step = make_train_step(run.model, config, make_optimizer(config.train, config.model), tiny_run.MESH)
    return executed_flops(step.trace(run.abstract, abstract_batch(config, tiny_run.MESH)).jaxpr)

  assert step_flops('routers') < 0.75 * step_flops('all')


LARGEST_BETWEEN = with_changes(tiny_run.CONFIG, train={'stages': 'routers:0.5;block:0.25;final_norm'})


def test_memory_is_that_of_the_stage_that_trains_most():
  assert handover.largest(LARGEST_BETWEEN) == (10, 'block')
  # Two moments, a count of steps for each of two stages, and that of the schedule.
  size = 8 * trainable.count_parameters(tiny_run.CONFIG.model, 'block') + 3 * 4
  shown = handover.describe(LARGEST_BETWEEN, tiny_run.MESH)
  assert 'from step 1 routers (64 parameters), from step 11 block (9.28 k parameters), from' in shown
  assert f'optimiser state {byte_count(size)} a device (of block, the most)' in shown


@pytest.mark.slow
def test_the_planner_knows_what_is_trained():
  config = LARGEST_BETWEEN
  program = ahead_of_time.compile_step(config, tiny_run.MESH, fast=True)
  assert program.config.train.trainable == 'block'
  assert program.optimizer_bytes == 8 * trainable.count_parameters(config.model, 'block') + COUNTERS


@pytest.mark.parametrize(
  ('model', 'changes', 'problem'),
  [
    ({}, {'trainable': 'query['}, r"'query\[' is no regular expression"),
    ({}, {'trainable': 'block,'}, 'has an empty entry'),
    ({}, {'trainable': 'lora'}, r'model.lora_rank=0; set --config.model.lora_rank=16'),
    ({'kind': 'recursive'}, {'trainable': 'routers'}, 'a model of model.kind=recursive does not have'),
    ({'random_router': True, 'causality': 'none'}, {'trainable': 'routers'}, 'of model.random_router=True'),
    ({}, {'trainable': 'block', 'stages': 'routers:0.1;all'}, 'both say what is trained'),
    ({}, {'stages': 'routers'}, 'must have two stages or more'),
    ({}, {'stages': 'routers:0.1;all:0.9'}, 'the last without a share'),
    ({}, {'stages': 'routers;all'}, "'routers' has no share of the steps"),
    ({}, {'stages': 'routers:0.6;block:0.4;all'}, 'must add up to less than 1'),
    ({}, {'stages': 'routers:-0.1;all'}, 'not above 0'),
    ({}, {'stages': 'routers:0.1;lora'}, r'train.stages=routers:0.1;lora trains low-rank changes'),
  ],
)
def test_what_cannot_be_meant_is_refused(model, changes, problem):
  with pytest.raises(ConfigError, match=problem):
    with_changes(tiny_run.CONFIG, model=model, train=changes)


def test_a_pattern_that_finds_nothing_and_a_stage_without_a_step_are_refused():
  unknown_vocabulary = with_changes(tiny_run.CONFIG, model={'vocab_size': None})
  trainable.check(with_changes(unknown_vocabulary, train={'trainable': '^(?:first|last)/,router'}))
  with pytest.raises(
    ConfigError, match=r'blok matches no parameter; use all, .*block/attention/key/kernel, '
  ):
    trainable.check(with_changes(unknown_vocabulary, train={'trainable': 'router,blok'}))
  with pytest.raises(ConfigError, match=r'train.stages=heads:0.5;all: heads matches no'):
    trainable.check(with_changes(unknown_vocabulary, train={'stages': 'heads:0.5;all'}))
  with pytest.raises(ConfigError, match=r'gives routers none of the train.steps=20 steps'):
    trainable.check(with_changes(unknown_vocabulary, train={'stages': 'routers:0.01;all'}))


# ---- in turn ----

STEPS = 6
STAGED = with_changes(
  tiny_run.CONFIG,
  train={
    'steps': STEPS,
    'warmup_steps': 1,
    'decay_fraction': 0.0,
    'weight_decay': 0.0,
    'stages': 'routers,last/:0.5;routers,block',
    'accumulation': 2,
    'ramp_batch': 4,
    'ramp_steps': 4,
  },
)


def go_on(config, state, done: int) -> list:
  """States on the host after each further step, by the programs that a run compiles which has done some steps."""
  abstract = handover.abstract_after(config, tiny_run.MESH, done)
  programs = list(phases.compile_remaining(config, tiny_run.MESH, abstract, None, done))
  step, order, states = phases.PhasedStep(programs, done), schedule.of(config.train), []
  sharding = mesh_lib.micro_batch_sharding(tiny_run.MESH)
  state = jax.tree.map(lambda leaf, spec: jax.device_put(leaf, spec.sharding), state, abstract)
  for number in range(done, STEPS):
    rows = {name: values[: order.rows(number)] for name, values in tiny_run.rows().items()}
    state, _ = step(state, mesh_lib.put(split_batch(rows, order.micro_batches(number)), sharding))
    states.append(jax.device_get(state))
  return states


def uninterrupted(config) -> list:
  return go_on(config, jax.device_get(handover.initializer_after(config, tiny_run.MESH, 0)(jnp.uint32(0))), 0)


@pytest.fixture(scope='module')
def staged() -> list:
  """States after each step of a training in two stages, whose batch doubles between."""
  assert [first for first, _ in phases.plan(STAGED)] == [0, 3, 4]
  return uninterrupted(STAGED)


@pytest.mark.slow
def test_what_begins_later_begins_with_moments_of_zero_and_the_right_correction(staged):
  begun = [set(moments(state)) for state in staged]
  assert {path.split('/')[0] for path in begun[2]} == {'router', 'last'}
  assert {path.split('/')[0] for path in begun[3]} == {'router', 'block'}
  assert begun[2] == begun[0]
  assert begun[3] == begun[5]

  # Adam's first step is the learning rate in every number, however large its gradient: both moments are of one step.
  old, new, second = by_path(staged[2].params), by_path(staged[3].params), moments(staged[3], 'nu')
  for path in begun[3] - begun[2]:
    large = second[path] > 5e-14  # where epsilon does not count
    assert large.any()
    moved = np.abs(new[path] - old[path])[large]
    np.testing.assert_allclose(moved, STAGED.train.learning_rate, rtol=2e-2, err_msg=path)
  (router,) = begun[2] & begun[3]
  kept = moments(staged[2], 'nu')[router]
  assert (kept > 0).all()
  assert (second[router] >= STAGED.train.beta2 * kept).all(), 'what goes on keeps its moments'
  (moved,) = np.unique(np.abs(new[router] - old[router]) > 0.99 * STAGED.train.learning_rate).tolist()[:1]
  assert not moved, 'and its correction'
  for path in {*old} - begun[3]:
    np.testing.assert_array_equal(old[path], by_path(staged[5].params)[path], err_msg=path)


@pytest.mark.parametrize(
  'done', [3, pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_a_run_that_goes_on_at_a_border_or_within_a_stage_is_the_same_run(staged, done):
  again = go_on(STAGED, staged[done - 1], done)
  chex.assert_trees_all_equal(again[-1], staged[-1])


@pytest.mark.slow
def test_stages_go_with_all_else_that_changes_in_a_training():
  """Recursions that grow, capacities that fall, a router in a group of its own, an updated threshold."""
  model = {'capacity_warmup_steps': 2, 'causality': 'aux_router', 'lora_rank': 2}
  changes = {'growth': (0.3,), 'stages': 'routers:0.5;lora,router:0.2;all', 'weight_decay': 0.1}
  config = with_changes(STAGED, model=model, train=changes)
  states = uninterrupted(config)
  for done in (2, 3, 4, 5):
    chex.assert_trees_all_equal(go_on(config, states[done - 1], done)[-1], states[-1])


@pytest.mark.slow
def test_a_run_says_what_it_trains_goes_on_at_the_border_and_may_be_told_to_train_other_things(
  tmp_path, capsys
):
  data = {'max_documents': 40, 'validation_fraction': 0.2, 'cache_dir': str(tmp_path / 'cache')}
  steps = {'log_every': 1, 'eval_every': 0, 'eval_rows': 12, 'sample_tokens': 0, 'steps': STEPS}
  saves = {'every_steps': 1, 'keep': 10}
  config = with_changes(STAGED, model={'vocab_size': None}, data=data, train=steps, checkpoint=saves)
  assert train.main(config, str(tmp_path / 'whole')) == 0
  shown = ' '.join(capsys.readouterr().out.split())
  assert 'trained from step 1 routers,last/ (9.34 k parameters), from step 4 routers,block (9.34 k' in shown
  assert 'parameters); optimiser state 74.8 kB a device (of routers,last/, the most)' in shown
  assert 'from step 4 4 rows, routers,block trained, optimiser state 74.8 kB' in shown

  cut = Path(shutil.copytree(tmp_path / 'whole', tmp_path / 'cut'))
  for step in (4, 5, 6):
    shutil.rmtree(cut / 'checkpoints' / str(step))
  (cut / 'summary.json').unlink()
  changed = Path(shutil.copytree(cut, tmp_path / 'changed'))
  assert train.main(config, str(cut)) == 0
  one, other = (restore.load_run(tmp_path / name).variables for name in ('whole', 'cut'))
  chex.assert_trees_all_equal(one, other)
  losses = [
    [record['train/loss'] for record in metrics_lib.read(tmp_path / name / 'metrics.jsonl')]
    for name in ('whole', 'cut')
  ]
  assert losses[0] == losses[1]

  different = with_changes(config, train={'stages': None, 'trainable': 'embed'})
  with pytest.raises(ConfigError, match=r'--allow_change=train.trainable,train.stages'):
    train.main(different, str(changed))
  capsys.readouterr()
  assert train.main(different, str(changed), ['train.trainable', 'train.stages']) == 0
  assert 'other parameters are trained than before: the moments' in ' '.join(capsys.readouterr().out.split())
  third, last = (by_path(restore.load_run(changed, step).variables['params']) for step in (3, 6))
  assert {path for path in third if not np.array_equal(third[path], last[path])} == {'embed/embedding'}
  rates = [record['train/learning_rate'] for record in metrics_lib.read(changed / 'metrics.jsonl')]
  assert rates == [
    record['train/learning_rate'] for record in metrics_lib.read(tmp_path / 'whole' / 'metrics.jsonl')
  ]
