"""Benchmarks of training steps: which models they compare, and the arithmetic of their tables."""

import entry_points
import pytest
from absl.testing import flagsaver

from mor_jax.config import ConfigError
from mor_jax.errors import RunError


@pytest.fixture
def train_step():
  return entry_points.load('benchmarks.train_step')


@pytest.fixture
def peers():
  return entry_points.load('benchmarks.peers')


def test_every_model_has_a_vanilla_model_of_its_depth(train_step):
  with flagsaver.flagsaver(layers=8, width=64):
    base = train_step.training.base_config(kind='vanilla')
  found = train_step.contenders_of(base, ['mor R=2', 'mor R=3, shared KV', 'mor R=4'])
  assert list(found) == ['vanilla', 'vanilla, 10 layers', 'mor R=2', 'mor R=3, shared KV', 'mor R=4']
  for name, (vanilla, config) in found.items():
    assert config.model.num_layers == found[vanilla][1].model.num_layers, name
    assert (config.model.kind == 'vanilla') == (name == vanilla)
  assert found['mor R=4'][1].model.num_layers == 10
  assert found['mor R=3, shared KV'][1].model.kv == 'shared'
  with pytest.raises(ConfigError, match='--models=mor R=9 is not one of'):
    train_step.contenders_of(base, ['mor R=9'])


def test_sizes_are_the_shapes_of_the_configs(train_step):
  with flagsaver.flagsaver(size='360m', rows=2):
    config = train_step.training.base_config(kind='vanilla')
  model, train = config.model, config.train
  assert (model.num_layers, model.d_model, model.num_kv_heads, model.dtype) == (32, 960, 5, 'bfloat16')
  assert (train.global_batch, train.accumulation, config.data.seq_len) == (2, 1, 2048)


def test_delivered_is_time_ratio_over_executed_flops(train_step):
  one = {
    'tokens': 1000,
    'executed_flops': 8e9,
    'model_flops_per_token': 4e6,
    'paper_flops_per_token': 2e6,
    'temporary_bytes': 4e6,
    'peak_bytes': 10e6,
  }
  figures = {
    'vanilla': one | {'seconds': 2.0},
    'mor': one | {'seconds': 1.2, 'executed_flops': 6e9, 'paper_flops_per_token': 1e6, 'peak_bytes': 5e6},
  }
  # A slow round slows both; the ratio of medians would be 1.2 / 2 = 0.6 here, that of neighbours is 0.6, 0.3, 0.6.
  seconds = {'vanilla': [2.0, 4.0, 2.0], 'mor': [1.2, 1.2, 1.2]}
  bases = dict.fromkeys(figures, 'vanilla')
  vanilla, mor = train_step.table_rows(figures, seconds, bases, 'NVIDIA H200')
  cells = dict(zip(train_step.COLUMNS, mor, strict=True))
  assert (cells['time ratio'], cells['executed'], cells['delivered']) == ('0.600', '0.750', '0.80')
  assert (cells['paper'], cells['peak ratio'], cells['tokens/s']) == ('0.500', '0.50', '833')
  assert dict(zip(train_step.COLUMNS, vanilla, strict=True))['delivered'] == '1.00'
  (row, _) = train_step.table_rows(figures, seconds, bases, 'cpu')
  assert dict(zip(train_step.COLUMNS, row, strict=True))['MFU'] == '-'


def test_peers_table_compares_neighbouring_steps_with_the_faster_way_of_pytorch(peers):
  turns = [
    {name: {'seconds': seconds} for name, seconds in zip(('mor_jax', 'eager', 'compiled'), turn, strict=True)}
    for turn in ((1.0, 1.9, 1.5), (2.0, 2.1, 2.0), (1.0, 1.3, 1.2))
  ]
  about = {'mor_jax': {'device': 'NVIDIA H200'}, 'eager': {}, 'compiled': {'note': 'because'}}
  rows = peers.table_rows(turns, about, tokens=500, work=494.5e12)
  ours, eager, compiled = (dict(zip(peers.COLUMNS, row, strict=True)) for row in rows)
  assert compiled['side'] == 'transformers, compiled (because)'
  assert (ours['speed'], ours['smallest to largest'], ours['MFU']) == ('1.20', '1.00 to 1.50', '50%')
  assert (eager['speed'], compiled['speed']) == ('0.92', '1.00')


def test_sides_that_train_different_models_are_not_compared(peers):
  same = [{'mor_jax': {'loss': 8.0}, 'eager': {'loss': 8.0004}}]
  peers.check_losses(same, 1e-4)
  for loss in (8.01, float('nan')):
    with pytest.raises(RunError, match='do not train the same model: at step 2 the loss of eager'):
      peers.check_losses([*same, {'mor_jax': {'loss': 8.0}, 'eager': {'loss': loss}}], 1e-4)


def test_flags_that_cannot_work_are_refused(peers):
  with flagsaver.flagsaver(rounds=0), pytest.raises(ConfigError, match='--rounds=0'):
    peers.main()
  with flagsaver.flagsaver(against=['jitted']), pytest.raises(ConfigError, match='--against=jitted'):
    peers.main()
