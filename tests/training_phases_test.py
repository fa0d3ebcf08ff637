"""What changes in the course of a training: capacities, router state, groups of parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_run

from mor_jax.config import with_changes
from mor_jax.model import flops
from mor_jax.training import budget, optimizer, phases
from mor_jax.training.stairs import MOST_PROGRAMS

CONFIG = tiny_run.CONFIG


def train(config, steps):
  """States after each of the first steps, and the metrics."""
  run, batches = tiny_run.run(config), tiny_run.batches(config)
  state, states, metrics = run.initial(), [], []
  for _ in range(steps):
    state, values = run.step(state, next(batches))
    states.append(jax.device_get(state))
    metrics.append(jax.device_get(values))
  return states, metrics


def test_capacities_fall_in_at_most_eight_sizes():
  config = with_changes(CONFIG, model={'capacity_warmup_steps': 70})
  plan = phases.plan(config)
  assert [first for first, _ in plan] == [0, 10, 20, 30, 40, 50, 60, 70]
  capacities = np.array([phase.model.step_capacities for _, phase in plan])
  assert (capacities[:, 0] == 1).all()
  t = np.array([5, 15, 25, 35, 45, 55, 65])  # the middles of the stairs, by the published formula
  np.testing.assert_allclose(capacities[:-1, 1], 0.5 + 0.5 * 0.5 * (1 + np.cos(np.pi * t / 70)))
  assert plan[-1][1] == config
  assert phases.plan(CONFIG) == [(0, CONFIG)]
  assert [first for first, _ in phases.plan(with_changes(CONFIG, model={'capacity_warmup_steps': 2}))] == [
    0,
    1,
    2,
  ]


def test_a_warm_up_costs_what_its_steps_cost():
  """In a budget too, which pays for fewer steps than without one."""
  config = with_changes(CONFIG, model={'capacity_warmup_steps': 70}, train={'steps': 100})
  length, plan = config.data.seq_len, phases.plan(config)
  each = [flops.paper_flops_per_token(phase.model, length) for _, phase in plan]
  mean = sum(each[:-1]) * 0.1 + each[-1] * 0.3
  assert budget.paper_flops_per_token(config) == pytest.approx(mean)
  whole = 100 * config.train.global_batch * length * mean
  paid = budget.with_budgeted_steps(with_changes(config, train={'flops_budget': whole, 'steps': 7}))
  assert paid.train.steps == 100
  without = with_changes(config, model={'capacity_warmup_steps': 0}, train={'flops_budget': whole})
  assert budget.with_budgeted_steps(without).train.steps > 102


def test_capacities_and_batch_together_take_at_most_eight_sizes():
  ramp = {'global_batch': 64, 'accumulation': 16, 'ramp_batch': 8, 'ramp_steps': 12, 'steps': 200}
  config = with_changes(CONFIG, model={'capacity_warmup_steps': 10}, train=ramp)
  plan = phases.plan(config)
  assert len(plan) <= MOST_PROGRAMS
  assert [first for first, _ in plan] == sorted({0, 4, 8, 12, 2, 5, 7, 10})
  rows = {first: (phase.train.global_batch, phase.train.accumulation) for first, phase in plan}
  assert [rows[first] for first in (0, 4, 8, 12)] == [(8, 2), (16, 4), (32, 8), (64, 16)]
  assert rows[2] == (8, 2)
  capacities = [phase.model.step_capacities[1] for _, phase in plan]
  assert capacities == sorted(capacities, reverse=True)
  assert capacities[-1] == config.model.step_capacities[1]


def test_programs_that_a_resumed_run_is_past_are_not_compiled():
  plan = [(0, 'a'), (5, 'b'), (9, 'c')]
  assert [phase for _, phase in phases.remaining(plan, 4)] == ['a', 'b', 'c']
  assert [phase for _, phase in phases.remaining(plan, 5)] == ['b', 'c']
  assert [phase for _, phase in phases.remaining(plan, 100)] == ['c']


def test_each_step_runs_the_program_of_its_phase():
  programs = [
    phases.Program(first, CONFIG, lambda state, batch, first=first: (state, first), 0.0, is_only=False)
    for first in (0, 3, 5)
  ]
  step = phases.PhasedStep(programs, done=0)
  assert [step(None, None)[1] for _ in range(7)] == [0, 0, 0, 3, 3, 5, 5]
  resumed = phases.PhasedStep(programs, done=4)
  assert [resumed(None, None)[1] for _ in range(2)] == [3, 5]


def test_balance_warmup_sends_every_token_all_the_way_and_then_the_bias_follows_the_load():
  model = {'router': 'token_choice', 'balancing': 'loss_free', 'balance_warmup_steps': 2}
  states, metrics = train(with_changes(CONFIG, model=model), steps=4)
  chosen = np.array([values['counts']['chosen_R'] for values in metrics])
  assert (chosen[:2, 0] == 0).all()
  assert (chosen[2:, 0] > 0).all(), 'after the warm-up tokens choose for themselves'
  np.testing.assert_array_equal(states[1].routing['bias'], 0)
  np.testing.assert_allclose(states[2].routing['bias'], 0.001 * np.sign(chosen[2].mean() - chosen[2]))


def test_moving_threshold_is_updated_once_a_step_whatever_the_micro_batches():
  model = {'selection': 'ema_threshold', 'causality': 'none'}
  config = with_changes(CONFIG, model=model, train={'seed': 1})
  whole, _ = train(config, steps=2)
  split, _ = train(with_changes(config, train={'accumulation': 4}), steps=2)
  assert whole[1].routing['updates'].tolist() == [0, 2]
  np.testing.assert_allclose(whole[1].routing['threshold'], split[1].routing['threshold'], rtol=1e-4)
  assert abs(whole[1].routing['threshold'][1]) > 1e-4


@pytest.mark.parametrize(
  ('name', 'model', 'rate'),
  [('aux_router', {'causality': 'aux_router'}, 10.0), ('router', {'router_target': 'benefit'}, 1.0)],
)
def test_routers_that_learn_apart_are_a_group_of_their_own(name, model, rate):
  """With a learning rate, and a clipping that the rest of the model neither feels nor causes."""
  params = {'block': {'kernel': jnp.ones(3)}, name: {'output': {'kernel': jnp.ones(3)}}}
  grads = {'block': {'kernel': jnp.full(3, 0.1)}, name: {'output': {'kernel': jnp.full(3, 1e6)}}}
  train_config = with_changes(CONFIG, train={'weight_decay': 0.0, 'clip_norm': 1e3}).train
  both = optimizer.make_optimizer(train_config, tiny.config(**model))
  updates, _ = both.update(grads, both.init(params), params)
  alone = optimizer.make_optimizer(train_config)
  main = {'block': params['block']}
  expected, _ = alone.update({'block': grads['block']}, alone.init(main), main)
  np.testing.assert_allclose(updates['block']['kernel'], expected['block']['kernel'], rtol=1e-6)
  ratio = updates[name]['output']['kernel'] / updates['block']['kernel']
  np.testing.assert_allclose(ratio, rate, rtol=1e-5)


@pytest.mark.parametrize('change', [{'causality': 'none'}, {'router': 'token_choice', 'balancing': 'none'}])
def test_a_random_router_is_drawn_anew_in_every_step(change):
  states, metrics = train(with_changes(CONFIG, model={'random_router': True, **change}), steps=2)
  assert 'router' not in states[0].params
  first, second = (values['counts']['last_step_selected_T'] for values in metrics)
  assert (first != second).any()
