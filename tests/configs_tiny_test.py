import json
import runpy
from pathlib import Path

import pytest

from mor_jax import train
from mor_jax.config import ConfigError, resolve, with_changes
from mor_jax.model import flops

TINY = Path(__file__).parents[1] / 'configs' / 'tiny.py'
get_config = runpy.run_path(str(TINY))['get_config']


def test_variants_are_comparable():
  """The three differ in kind alone, and the MoR has 3 to 8 million parameters."""
  configs = {variant: resolve(get_config(variant)) for variant in ('mor', 'recursive', 'vanilla')}
  for variant, config in configs.items():
    assert config.model.kind == variant
    assert config.name == f'tiny-{variant}'
    assert with_changes(config, model={'kind': 'mor'}).to_dict() | {'name': ''} == configs[
      'mor'
    ].to_dict() | {'name': ''}
  parameters = flops.count_parameters(with_changes(configs['mor'], model={'vocab_size': 257}).model)
  assert 3e6 < parameters.total < 8e6
  assert resolve(get_config()) == configs['mor']


def test_unknown_variant_is_refused():
  with pytest.raises(
    ConfigError, match=r'configs/tiny\.py:big does not exist; use one of mor, recursive, vanilla'
  ):
    get_config('big')


@pytest.mark.slow
def test_tiny_run_learns(tmp_path):
  """In two thirds of its steps."""
  config = with_changes(
    resolve(get_config()), data={'cache_dir': str(tmp_path / 'cache')}, train={'steps': 600}
  )
  train.main(config, str(tmp_path / 'run'))
  summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
  assert summary['validation/nll'] < summary['validation/bigram_entropy'] - 0.2
  assert summary['validation/dead_token_ratio'] < 0.05
  depths = [summary[f'validation/depth_share_{depth}'] for depth in (1, 2, 3)]
  assert min(depths) > 0.2
