"""Sizes of the batches of a tick: the flow that is played is that of the engine, and the cheapest sizes are taken."""

import dataclasses

import numpy as np
import pytest

from mor_jax.config import ConfigError
from mor_jax.inference import balance, costs
from mor_jax.inference.balance import Costs
from mor_jax.inference.scheduler import Scheduler
from mor_jax.inference.ticks import Batches
from tests import tiny, tiny_engine

EVEN = (1.0, 2 / 3, 1 / 3)  # every depth equally often
MODEL = {'num_layers': 5, 'num_recursions': 3, 'router_alpha': 0.8}


@pytest.mark.parametrize(
  'batches',
  [Batches(8, 2), *(pytest.param(one, marks=pytest.mark.slow) for one in (Batches(8, 8), Batches(4, 4)))],
)
def test_the_flow_is_that_of_the_engine(batches):
  """Passes for each token, over 1,500 tokens of an engine whose queue does not end."""
  made, variables = tiny.model(seed=9, **MODEL)
  lanes = {'lanes': batches.block, 'boundary_lanes': batches.boundary}
  scheduler = Scheduler(tiny_engine.engine(made, variables, slots=8, slack=3.0, **lanes))
  requests = tiny_engine.requests((1,) * 32, max_new_tokens=63, temperature=1.0)
  results = [scheduler.submit(request) for request in requests]
  while sum(bool(result.finish) for result in results) < 24:
    scheduler.step()
  done = scheduler.statistics
  depths = np.concatenate([result.depths for result in results])
  entering = tuple(float((depths > step).mean()) for step in range(3))
  found = balance.flow(batches, 8, entering)
  assert done.ticks / done.tokens == pytest.approx(found.ticks, rel=0.06)
  assert done.boundaries / done.tokens == pytest.approx(found.boundaries, rel=0.06)


def test_with_as_many_lanes_as_slots_both_batches_are_full():
  """The least that there can be: depth over lanes, and one over lanes."""
  found = balance.flow(Batches(24, 8), 32, EVEN)
  assert found.ticks == pytest.approx(2 / 24, rel=0.01)
  assert found.boundaries == pytest.approx(1 / 8, rel=0.05)


@pytest.mark.parametrize(
  ('of', 'expected'),
  [
    (Costs(0.0, 1.0, 0.0, 1.0), lambda chosen, slots: chosen.block + chosen.boundary <= slots + 2),
    (Costs(100.0, 0.0, 0.0, 1.0), lambda chosen, slots: chosen.block == slots),
    (Costs(1.0, 0.3, 0.2, 0.1), lambda chosen, slots: slots < chosen.block + chosen.boundary < 1.5 * slots),
    (Costs(0.0, 1.0, 100.0, 0.0), lambda chosen, slots: chosen.boundary > slots // 2),
  ],
)
def test_what_costs_once_is_shared_and_what_costs_by_lane_is_full(of, expected):
  chosen = balance.choose(of, 32, EVEN)
  assert expected(chosen, 32), chosen
  taken = balance.seconds(of, chosen, balance.flow(chosen, 32, EVEN))
  others = [Batches(block, boundary) for block in (8, 16, 32) for boundary in (8, 16, 32)]
  assert all(taken <= balance.seconds(of, one, balance.flow(one, 32, EVEN)) for one in others)


def test_given_sizes_stay():
  of = Costs(1.0, 1.0, 1.0, 1.0)
  assert balance.choose(of, 32, EVEN, block=7).block == 7
  assert balance.choose(of, 32, EVEN, boundary=5).boundary == 5
  assert balance.choose(of, 64, EVEN, multiple=8).block % 8 == 0


def test_measured_sizes_change_no_text(monkeypatch):
  made, variables = tiny.model(seed=9, **MODEL)
  requests = tiny_engine.requests((1, 9, 4, 20, 2, 7), max_new_tokens=20)
  monkeypatch.setattr(costs, 'SECONDS', 0.02)
  found, measure = [], costs.measure
  monkeypatch.setattr(costs, 'measure', lambda *options: found.append(measure(*options)) or found[-1])
  engine = tiny_engine.engine(made, variables, slots=6, measure=True)
  given = tiny_engine.engine(made, variables, slots=6, measure=True, lanes=5, boundary_lanes=1)
  assert given.batches == Batches(5, 1)
  (of,) = found
  assert all(np.isfinite(value) and value >= 0 for value in dataclasses.astuple(of))
  assert of.of_block(6) > 0
  texts = [[result.tokens for result in Scheduler(one).run(requests)] for one in (engine, given)]
  assert texts[0] == texts[1]


def test_what_cannot_be_measured_is_refused():
  made, variables = tiny.model(seed=9, **MODEL)
  with pytest.raises(ConfigError, match='measure_batches=True cannot be used with batch_invariant'):
    tiny_engine.engine(made, variables, measure=True, batch_invariant=True)
  cycle, variables = tiny.model(sharing='cycle', num_recursions=3)
  with pytest.raises(ConfigError, match=r'measure_batches=True cannot be used with model.sharing=cycle'):
    tiny_engine.engine(cycle, variables, measure=True)
