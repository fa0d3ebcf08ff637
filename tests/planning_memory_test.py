"""The memory estimate against the sizes of real states, and what it must show."""

import json
from pathlib import Path

import jax
import pytest
import tiny_run

from mor_jax.config import Config, with_changes
from mor_jax.planning.memory import train_memory


def test_state_is_the_size_of_the_train_state():
  state = tiny_run.run().abstract
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state.params, state.opt_state)))
  counters = 4 * 2  # the optimiser's two counts of steps
  assert train_memory(tiny_run.CONFIG, 1).state == size - counters


@pytest.mark.parametrize('kind', ['vanilla', 'mor'])
def test_estimate_is_close_to_what_the_tpu_compiler_allots(kind):
  """Against the compiled steps of benchmarks/memory.py: 360M, remat full, 8 rows."""
  kept = Path(__file__).parents[1] / 'benchmarks' / 'results' / 'memory.json'
  label = '360m, full, auto, none, ' + {'vanilla': 'vanilla', 'mor': 'mor R=2'}[kind]
  compiled = json.loads(kept.read_text())['programs'][label]['peak_bytes']
  config = with_changes(Config(), model={'vocab_size': 49152, 'kind': kind}, train={'accumulation': 1})
  assert train_memory(config, 8).total == pytest.approx(compiled, rel=0.05)


def test_mor_needs_less_than_vanilla():
  """Parameters, gradients and activations all do."""
  vocabulary = {'vocab_size': 49152}
  mor = train_memory(with_changes(Config(), model=vocabulary), 8)
  vanilla = train_memory(with_changes(Config(), model=vocabulary | {'kind': 'vanilla'}), 8)
  assert mor.state < vanilla.state
  assert mor.gradients < vanilla.gradients
  assert mor.activations < vanilla.activations


def test_accumulation_keeps_a_second_gradient():
  once = train_memory(tiny_run.CONFIG, 4)
  twice = train_memory(with_changes(tiny_run.CONFIG, train={'accumulation': 2}), 4)
  assert twice.total - once.total == once.gradients
