"""The paper's runs: what configs/135m.py to 1p7b.py resolve to, against its tables."""

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mor_jax.config import Config, ConfigError, resolve
from mor_jax.model import flops
from mor_jax.planning.memory import train_memory
from mor_jax.training.budget import with_budgeted_steps

CONFIGS = Path(__file__).parents[1] / 'configs'
SIZES = ('135m', '360m', '730m', '1p7b')
VARIANTS = ('mor', 'recursive', 'vanilla')
FILES = {size: runpy.run_path(str(CONFIGS / f'{size}.py')) for size in SIZES}


def load(size: str, variant: str = 'mor', overrides: dict[str, Any] | None = None) -> Config:
  """The config with its steps; settings are overridden by dotted name, as flags do."""
  settings = FILES[size]['get_config'](variant)
  settings.update_from_flattened_dict(overrides or {})
  return with_budgeted_steps(resolve(settings))


def tokens(config: Config) -> int:
  return config.train.steps * config.train.global_batch * config.data.seq_len


@pytest.mark.parametrize('size', SIZES)
def test_all_variants_resolve(size):
  get_config = FILES[size]['get_config']
  assert resolve(get_config()) == resolve(get_config('mor'))
  names = set()
  for variant in VARIANTS:
    for recursions in (1, 2, 3, 4):
      config = load(size, variant, {'model.num_recursions': recursions})
      assert config.model.kind == variant
      assert config.train.warmup_steps < config.train.steps / 50
      names.add(config.name)
  assert names == {f'{size}-vanilla'} | {
    f'{size}-{kind}-r{r}' for kind in ('mor', 'recursive') for r in (1, 2, 3, 4)
  }


def test_unknown_variant_is_refused():
  with pytest.raises(ConfigError, match=r'configs/730m\.py:big does not exist; use one of mor, recursive'):
    FILES['730m']['get_config']('big')


@pytest.mark.parametrize(
  ('size', 'recursions', 'block', 'depth'),
  [
    ('135m', 2, 14, 30),
    ('135m', 3, 10, 32),
    ('360m', 2, 15, 32),
    ('360m', 3, 10, 32),
    ('360m', 4, 8, 34),
    ('730m', 3, 8, 26),
    ('1p7b', 2, 11, 24),
    ('1p7b', 3, 8, 26),
  ],
)
def test_depth_follows_the_recursions(size, recursions, block, depth):
  """Partitions 1 + block + 1 that the paper trains (Tables 9 and 10, released configs)."""
  model = load(size, 'recursive', {'model.num_recursions': recursions}).model
  assert (model.shared_depth, model.num_layers) == (block, depth)


def test_depth_can_be_overridden():
  model = load('360m', 'mor', {'model.num_recursions': 4, 'model.num_layers': 30}).model
  assert (model.num_recursions, model.num_layers) == (4, 30)
  with pytest.raises(ConfigError, match=r'set model\.num_layers to 30 or 34'):
    load('360m', 'mor', {'model.num_recursions': 4, 'model.num_layers': 32})


@pytest.mark.parametrize(
  ('size', 'variant', 'recursions', 'printed'),
  [
    ('135m', 'vanilla', 1, '106M'),
    ('135m', 'mor', 2, '57M'),
    ('360m', 'vanilla', 1, '315M'),
    ('360m', 'mor', 2, '167M'),
    ('360m', 'mor', 3, '118M'),
    ('360m', 'recursive', 4, '98M'),
    ('730m', 'vanilla', 1, '654M'),
    ('730m', 'mor', 3, '252M'),
    ('1p7b', 'vanilla', 1, '1.61B'),
    ('1p7b', 'mor', 2, '0.87B'),
    ('1p7b', 'recursive', 3, '0.67B'),
  ],
)
def test_parameters_as_printed(size, variant, recursions, printed):
  """Non-embedding parameters of the paper's Tables 3, 6, 7 and 9."""
  count = flops.count_parameters(
    load(size, variant, {'model.num_recursions': recursions}).model
  ).non_embedding
  assert (f'{count / 1e6:.0f}M' if printed.endswith('M') else f'{count / 1e9:.2f}B') == printed


@pytest.mark.parametrize(('size', 'millions'), [('135m', 28), ('360m', 47), ('730m', 75), ('1p7b', 101)])
def test_embedding_as_printed(size, millions):
  """Table 6: one matrix of 49152 rows, so input and output share it."""
  assert round(flops.count_parameters(load(size).model).embedding / 1e6) == millions


@pytest.mark.parametrize(
  ('size', 'budget', 'printed'),
  [
    ('135m', 2e18, (6.5, 6.1, 9.2)),
    ('135m', 5e18, (16.1, 15.1, 23.1)),
    ('135m', 16.5e18, (53.3, 50.0, 76.2)),
    ('360m', 2e18, (2.4, 2.4, 3.6)),
    ('360m', 5e18, (6.0, 6.0, 9.0)),
    ('360m', 16.5e18, (19.8, 19.8, 29.7)),
    ('730m', 2e18, (1.2, 1.2, 1.8)),
    ('730m', 5e18, (3.1, 3.1, 4.5)),
    ('730m', 16.5e18, (10.1, 10.1, 14.9)),
    ('1p7b', 2e18, (0.6, 0.5, 0.8)),
    ('1p7b', 5e18, (1.5, 1.3, 2.0)),
    ('1p7b', 16.5e18, (4.8, 4.5, 6.5)),
  ],
)
def test_tokens_as_printed(size, budget, printed):
  """Billions of tokens of vanilla, recursive and MoR with three recursions (Table 9)."""
  runs = (load(size, variant, {'train.flops_budget': budget}) for variant in ('vanilla', 'recursive', 'mor'))
  assert tuple(round(tokens(run) / 1e9, 1) for run in runs) == printed


@pytest.mark.parametrize(
  ('variant', 'recursions', 'printed'), [('vanilla', 1, 20), ('mor', 2, 26), ('mor', 3, 27)]
)
def test_tokens_of_the_largest_budget(variant, recursions, printed):
  """Table 7: 1.7B for 68.5e18 FLOPs, in billions."""
  run = load('1p7b', variant, {'model.num_recursions': recursions, 'train.flops_budget': 68.5e18})
  assert round(tokens(run) / 1e9) == printed


@pytest.mark.parametrize(
  ('variant', 'overrides', 'warmup', 'decay'),
  [
    ('vanilla', {}, 57, 1888),
    ('recursive', {}, 57, 1888),
    ('recursive', {'model.num_recursions': 4}, 57, 1777),
    ('mor', {'model.num_recursions': 2}, 86, 2524),
    ('mor', {'model.num_recursions': 3}, 86, 2832),
    ('mor', {'model.router': 'token_choice'}, 86, 2832),
    ('mor', {'model.num_recursions': 4}, 86, 2843),
    ('mor', {'model.kv': 'shared'}, 86, 2934),
  ],
)
def test_schedule_of_the_released_runs(variant, overrides, warmup, decay):
  """Steps of warm-up and of decay that the authors' 360M config files state."""
  train = load('360m', variant, overrides).train
  assert (train.warmup_steps, round(train.decay_fraction * train.steps)) == (warmup, decay)


@pytest.mark.parametrize('size', SIZES)
def test_docstring_tells_what_will_run(size):
  """Parameters, steps and tokens of every row; memory of every device."""
  text = FILES[size]['__doc__']
  pattern = (
    r'^  (mor|recursive|vanilla)(?: R=(\d))?( \w+)? +(\d+) M +([\d.e]+) +([\d,]+) +([\d.]+) B +\d\.\d{4}$'
  )
  rows = re.findall(pattern, text, re.M)
  assert len(rows) >= 9
  assert len(re.findall(r' B +\d\.\d{4}$', text, re.M)) == len(rows), 'every row must be understood'
  for variant, recursions, other, millions, budget, steps, billions in rows:
    overrides = {'model.num_recursions': int(recursions or 1), 'train.flops_budget': float(budget)}
    overrides |= {'': {}, ' shared': {'model.kv': 'shared'}, ' token': {'model.router': 'token_choice'}}[
      other
    ]
    run = load(size, variant, overrides)
    assert round(flops.count_parameters(run.model).non_embedding / 1e6) == int(millions)
    assert f'{run.train.steps:,}' == steps
    assert f'{tokens(run) / 1e9:.2f}' == billions

  memory = re.findall(r'\(\d+ GB\) +(\d+) rows? +([\d.]+) GB +([\d.]+) GB +([\d.]+) GB', text)
  assert len(memory) == 3
  for rows_at_once, *gigabytes in memory:
    estimates = [train_memory(load(size, variant), int(rows_at_once)).total / 1e9 for variant in VARIANTS]
    assert gigabytes == [f'{estimate:.1f}' for estimate in estimates]


def test_flags_reach_depth_and_steps():
  """The whole way from the command line, to where the warm-up is found too long for the budget."""
  command = [sys.executable, '-m', 'mor_jax.train', '--config=configs/360m.py', '--workdir=/dev/null/run']
  flags = ['--config.model.num_recursions=4', '--config.train.warmup_steps=20000']
  done = subprocess.run(command + flags, cwd=CONFIGS.parent, capture_output=True, text=True, check=False)
  assert done.returncode == 2
  assert 'is more than the 14216 steps that train.flops_budget=1.65e+19 pays for' in done.stderr
