import dataclasses
import json
import re

import pytest

from mor_jax import config as config_lib
from mor_jax.config import Config, ConfigError, resolve, with_changes
from mor_jax.config.model import SHARING_SCHEMES


def test_default_is_valid_and_survives_json():
  config = with_changes(
    Config(), model={'capacities': (1.0, 0.25), 'vocab_size': 300}, data={'cache_dir': '/a'}
  )
  assert resolve(json.loads(json.dumps(config.to_dict()))) == config
  assert resolve(config_lib.default()) == Config()


def test_config_files_cannot_invent_settings():
  settings = config_lib.default()
  with pytest.raises(AttributeError, match='num_recursions'):
    settings.model.num_recursion = 3
  settings.model.vocab_size = 300  # optional settings take a value and lose it again
  settings.model.vocab_size = None
  assert resolve(settings) == Config()


def test_configs_never_change():
  with pytest.raises(dataclasses.FrozenInstanceError):
    Config().model.num_layers = 3


def test_every_setting_is_explained():
  text = config_lib.describe()
  for name in config_lib.settings():
    assert re.search(rf'--config\.{re.escape(name)}=.*\(.+\)\n      \w', text), name


# ---- what the settings stand for ----


@pytest.mark.parametrize(
  ('num_layers', 'num_recursions', 'sharing', 'shared', 'unique'),
  [  # first four: the partitions of the published runs
    (32, 2, 'middle_cycle', 15, 17),
    (32, 3, 'middle_cycle', 10, 12),
    (34, 4, 'middle_cycle', 8, 10),
    (26, 3, 'middle_cycle', 8, 10),
    (30, 3, 'cycle', 10, 10),
  ],
)
def test_partition_of_layers(num_layers, num_recursions, sharing, shared, unique):
  shape = {'num_layers': num_layers, 'num_recursions': num_recursions, 'sharing': sharing}
  model = with_changes(Config(), model=shape).model
  assert (model.shared_depth, model.num_unique_layers) == (shared, unique)


def test_selected_tokens():
  def selected(**model):
    return with_changes(Config(), model={'num_layers': 32, **model}).model.selected_tokens(2048)

  assert selected(num_recursions=3) == (2048, 1365, 682)  # the published run of three recursions
  assert selected(num_recursions=2, capacities=(0.5, 0.0001)) == (1024, 1)
  assert selected(kind='recursive', num_recursions=3) == (2048, 2048, 2048)
  assert selected(kind='vanilla') == (2048,)


# ---- what is refused ----


@pytest.mark.parametrize(
  ('setting', 'value', 'message'),
  [
    ('model.kind', 'moe', "model.kind='moe' is not one of vanilla, recursive, mor"),
    ('model.num_layers', 0, 'model.num_layers=0 is not allowed: must be from 1 to 10,000'),
    ('model.num_layers', 2_000_000, 'must be from 1 to 10,000'),
    ('model.d_model', 2**40, 'must be from 1 to'),
    ('data.seed', 2**32, r'from 0 to 2\*\*32'),
    ('train.seed', -1, r'from 0 to 2\*\*32'),
    ('name', '..', 'the name of a folder'),
    ('model.num_layers', 2, 'needs at least 3 layers'),
    ('model.num_layers', 33, 'does not divide the 31 shared layers'),
    ('model.d_model', 961, 'is not a multiple of model.num_heads=15'),
    ('model.num_kv_heads', 4, 'use one of 1, 3, 5, 15'),
    ('model.head_dim', 63, 'even head width'),
    ('model.vocab_size', 1, 'must be from 2 to'),
    ('train.max_skipped', 0, r'must be >= 1 \(on_nonfinite=halt skips none\)'),
    ('train.spike_zscore', -1.0, 'must be >= 0'),
    ('train.hang_seconds', -1.0, 'must be >= 0'),
    ('model.sharing', 'sequence', 'use cycle or middle_cycle'),
    ('model.capacities', (1.0,), 'has 1 entries; model.num_recursions=2'),
    ('model.capacities', (0.5, 0.6), 'rises'),
    ('model.capacities', (1.0, 0.0), 'above 0 and at most 1'),
    ('model.capacities', (1.5, 0.5), 'above 0 and at most 1'),
    ('model.init_std', -0.1, 'must be >= 0'),
    ('model.threshold_slack', 0.0, 'must be > 0'),
    ('data.seq_len', 1, 'data.seq_len=1 is not allowed: must be >= 2'),
    ('data.vocab_size', 256, r'>= \d+: 256 bytes'),
    ('data.validation_fraction', 1.0, r'in \(0, 1\)'),
    ('data.max_documents', 1, 'to have both splits'),
    ('data.prefetch', -1, '>= 0'),
    ('train.steps', 0, '>= 1'),
    ('train.steps', 100, 'train.warmup_steps=500 is more than train.steps=100'),
    ('train.accumulation', 3, 'does not divide train.global_batch=1024'),
    ('train.learning_rate', 0.0, '> 0'),
    ('train.learning_rate', float('inf'), 'must be a finite number'),
    ('train.beta2', 1.0, r'in \[0, 1\)'),
    ('train.decay_fraction', 1.1, r'in \[0, 1\]'),
    ('train.eval_rows', 0, '>= 1'),
    ('train.sample_temperature', -1.0, '>= 0'),
    ('checkpoint.every_steps', 0, '>= 1'),
    ('checkpoint.keep', 0, '>= 1'),
    ('checkpoint.max_unsaved_steps', 999, 'at least checkpoint.every_steps=1000, or none'),
    ('name', '', 'the name of a folder'),
    ('name', 'a/b', 'without "/"'),
    ('train.steps', 10.0, 'train.steps=10.0 must be int'),
    ('train.steps', True, 'train.steps=True must be int'),
    ('train.steps', None, 'train.steps=None must be int'),
    ('train.learning_rate', '3e-3', "train.learning_rate='3e-3' must be float"),
    ('train.learning_rate', True, 'train.learning_rate=True must be float'),
    ('data.segment_mask', 1, 'data.segment_mask=1 must be bool'),
    ('model.capacities', 0.5, 'model.capacities=0.5 must be a tuple'),
    ('model.capacities', (1.0, 'half'), "model.capacities='half' must be float"),
    ('train.step', 1, r'unknown setting train\.step; did you mean train\.steps\?'),
    ('optimizer', 'sgd', 'unknown setting optimizer'),
  ],
)
def test_refuses(setting, value, message):
  raw = Config().to_dict()
  *sections, name = setting.split('.')
  (raw[sections[0]] if sections else raw)[name] = value
  with pytest.raises(ConfigError, match=message) as error:
    resolve(raw)
  assert name in str(error.value)
  assert '\n' not in str(error.value)


def test_whole_numbers_serve_as_rates():
  raw = Config().to_dict()
  raw['train']['weight_decay'] = 0
  raw['model']['capacities'] = [1, 1]
  config = resolve(raw)
  assert type(config.train.weight_decay) is float
  assert [type(c) for c in config.model.capacities] == [float, float]


def test_a_section_must_be_a_section():
  with pytest.raises(ConfigError, match="model='small' must be a group"):
    resolve({'model': 'small'})


def test_an_end_for_hangs_needs_a_limit():
  with pytest.raises(ConfigError, match=r'train\.exit_on_hang=True needs a limit: set train\.hang_seconds'):
    with_changes(Config(), train={'hang_seconds': 0.0, 'exit_on_hang': True})


@pytest.mark.parametrize('sharing', SHARING_SCHEMES)
@pytest.mark.parametrize('kind', ['recursive', 'mor'])
def test_what_a_refusal_recommends_works(kind, sharing):
  if kind == 'mor' and sharing.endswith('sequence'):
    return
  for num_layers in range(3, 20):
    for num_recursions in range(2, 6):
      shape = {
        'kind': kind,
        'sharing': sharing,
        'num_layers': num_layers,
        'num_recursions': num_recursions,
      }
      try:
        with_changes(Config(), model=shape)
      except ConfigError as error:
        depths, recursions = re.search(
          r'set model.num_layers to (.+), or model.num_recursions to one of (.+)', str(error)
        ).groups()
        for depth in depths.split(' or '):
          assert abs(int(depth) - num_layers) < num_recursions
          with_changes(Config(), model=shape | {'num_layers': int(depth)})
        for count in recursions.split(', '):
          with_changes(Config(), model=shape | {'num_recursions': int(count)})
