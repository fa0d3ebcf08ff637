"""Folders for transformers: written whole, read back bit for bit, refused where they cannot be right."""

import ast
import dataclasses
import functools
import json
import math
import pathlib
import shutil
import sys
import tomllib

import entry_points
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from mor_jax.cli import engines
from mor_jax.config import Config, ConfigError, with_changes
from mor_jax.evaluation import calibration
from mor_jax.interop import model_card, published, sources, weights
from mor_jax.interop.weights import HeldWeights
from mor_jax.runs import stored
from mor_jax.runs.restore import load_run
from tests.hub_cases import CHECKED, LENGTH, TEXTS, build, same

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize('name', CHECKED[::2])
def test_there_and_back_is_the_same_bit_for_bit(name, tmp_path):
  config, _, variables = build(name)
  published.write(tmp_path / 'hub', HeldWeights(config, variables), TEXTS, '# a card')
  opened = published.open_folder(tmp_path / 'hub')
  assert opened.weights.config == config
  assert same(variables, weights.tree(opened.weights))
  assert opened.texts.tokenizer.digest == TEXTS.tokenizer.digest
  assert (opened.texts.longest, opened.texts.step) == (LENGTH, 7)


def test_a_folder_has_all_that_others_need(tmp_path):
  config, _, variables = build('expert')
  published.write(tmp_path / 'hub', HeldWeights(config, variables), TEXTS, '# a card')
  modules = {path.name for path in published.MODULES.glob('*.py')}
  assert {path.name for path in (tmp_path / 'hub').iterdir()} == modules | {
    'README.md',
    'config.json',
    'generation_config.json',
    'model.safetensors',
    'tokenizer.json',
    'tokenizer_config.json',
  }
  described = json.loads((tmp_path / 'hub' / 'config.json').read_text())
  for name in described['auto_map'].values():
    module, _, of_class = name.partition('.')
    tree = ast.parse((tmp_path / 'hub' / f'{module}.py').read_text())
    assert of_class in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
  with pytest.raises(ConfigError, match='exists; name a new folder'):
    published.write(tmp_path / 'hub', HeldWeights(config, variables), TEXTS, '# a card')


def test_the_modules_need_only_torch_and_transformers():
  needed = set()
  for path in published.MODULES.glob('*.py'):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        needed |= {alias.name.split('.')[0] for alias in node.names}
      elif isinstance(node, ast.ImportFrom) and not node.level:
        needed.add(node.module.split('.')[0])
  assert needed - sys.stdlib_module_names == {'torch', 'transformers'}


def test_the_modules_are_part_of_the_package():
  setuptools = tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']['setuptools']
  package = ROOT / 'mor_jax'
  found = {path for pattern in setuptools['package-data']['mor_jax'] for path in package.glob(pattern)}
  assert set(published.MODULES.glob('*.py')) <= found


# ---- refusals ----


def test_settings_that_the_modules_do_not_know_are_refused_by_name(monkeypatch, tmp_path):
  with pytest.raises(ConfigError, match=r'model\.random_router=True chooses by noise'):
    published.check(build('random')[0])
  config = build('expert')[0]
  monkeypatch.setattr(published, 'KNOWN', published.KNOWN - {'gating', 'router_alpha', 'kv'})
  with pytest.raises(ConfigError, match=r'model\.router_alpha=0\.8.* do not know'):
    published.write(tmp_path / 'hub', HeldWeights(config, {}), TEXTS, '')
  with pytest.raises(ConfigError, match='rope_scaling=spiral'):
    published.check(dataclasses.replace(build('vanilla')[0], rope_scaling='spiral'))
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'mor': None}, 'was not written by python -m mor_jax.convert --to=transformers'),
    ({'model_type': 'llama'}, 'was not written by'),
    ({'mor': {'kind': 'mor', 'depth': 3}}, r'model\.depth'),
    ({'calibrations': [{'capacities': 3}]}, r'config\.json cannot be read'),
    ({'max_position_embeddings': 'long'}, r'max_position_embeddings=.long. \(must be a whole number'),
  ],
)
def test_a_folder_that_was_changed_is_refused(change, message, hub):
  path = hub / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(ConfigError, match=message):
    published.open_folder(hub)


def test_tensors_that_do_not_fit_are_named(hub):
  path = hub / 'config.json'
  described = json.loads(path.read_text())
  described['mor']['router_head'] = 'mlp'
  path.write_text(json.dumps(described))
  with pytest.raises(ConfigError, match=r'tensor model\.router\.0\.hidden\.weight is missing'):
    published.open_folder(hub)


# ---- the program ----


run_convert = functools.partial(entry_points.run, 'mor_jax.convert')


@pytest.fixture(scope='module')
def stored_run(tmp_path_factory):
  """A run folder with what calibrate would have written."""
  config, _, variables = build('expert')
  data = {'seq_len': LENGTH, 'tokenizer': 'tokenizer.json', 'source': 'files:/home/me/texts/*.txt'}
  config = with_changes(Config(name='small', model=config), data=data)
  folder = tmp_path_factory.mktemp('runs') / 'run'
  stored.write_model(folder, config, HeldWeights(config.model, variables), TEXTS.tokenizer, 'a test', step=7)
  for step, capacities in ((7, (1.0, 0.5, 0.2)), (3, (1.0, 0.4, 0.2))):
    entry = calibration.Calibration(capacities, (0.0, 0.25, -0.5), step, 16)
    calibration.store(folder / 'calibrations.json', entry)
  return folder


@pytest.fixture
def run_folder(stored_run, tmp_path):
  """A copy of the run, to be changed."""
  return pathlib.Path(shutil.copytree(stored_run, tmp_path / 'run'))


@pytest.fixture
def hub(stored_run, tmp_path):
  """The run, published."""
  config, _, variables = build('expert')
  entries = calibration.read(stored_run / 'calibrations.json')[:1]
  texts = dataclasses.replace(TEXTS, calibrations=tuple(entries))
  published.write(tmp_path / 'hub', HeldWeights(config, variables), texts, '# a card')
  return tmp_path / 'hub'


def test_a_run_is_published_and_comes_back(stored_run, tmp_path):
  run_convert(checkpoint=stored_run, to='transformers', output=tmp_path / 'hub')
  run_convert(checkpoint=tmp_path / 'hub', to='mor', output=tmp_path / 'back')
  before, after = load_run(stored_run), load_run(tmp_path / 'back')
  assert after.config.model == before.config.model
  assert (after.step, after.config.data.seq_len) == (7, LENGTH)
  assert same(before.variables, after.variables)
  (entry,) = calibration.read(tmp_path / 'back' / 'calibrations.json')
  assert entry == calibration.read(stored_run / 'calibrations.json')[0], 'that of an older step is left out'


def test_targets_that_cannot_be_are_refused(stored_run, hub, tmp_path):
  for source, to, message in (
    (stored_run, 'mor', 'is a run folder already'),
    (stored_run, 'llama', 'only vanilla models can'),
    (hub, 'transformers', 'is no run folder'),
    (hub, 'llama', 'is no run folder'),
  ):
    with pytest.raises(ConfigError, match=message):
      run_convert(checkpoint=source, to=to, output=tmp_path / 'other')
  assert not (tmp_path / 'other').exists()
  with pytest.raises(ConfigError, match='says itself which model it holds'):
    run_convert(checkpoint=hub, settings='mine.json', output=tmp_path / 'other')


def test_programs_open_the_folder_as_they_open_a_run(hub):
  _, _, variables = build('expert')
  opened, tokenizer, conventions = sources.open_model(hub, '--init_from')
  assert tokenizer.digest == TEXTS.tokenizer.digest
  assert conventions.ends == (60,)
  assert same(variables, weights.tree(opened))
  entry_points.load('mor_jax.generate')
  with flagsaver.flagsaver():
    flags.FLAGS(['generate', f'--checkpoint={hub}', '--capacities=1.0,0.5,0.2'])
    config, calibrated = engines.calibrated(engines.load(engines.make_mesh()))
  assert config.model.capacities == (1.0, 0.5, 0.2)
  np.testing.assert_allclose(calibrated['routing']['threshold'], (0.0, 0.25, -0.5))


SUMMARY = {'steps': 7, 'tokens': 5376, 'seconds': 61.0, 'train_flops': 2.5e9, 'validation/nll': 2.5}
SHARES = {'depth_share_0': 0.0, 'depth_share_1': 0.25, 'depth_share_2': 0.3, 'depth_share_3': 0.45}


def measured(loss: float) -> dict:
  return {'nll': loss, 'perplexity': 9.0, 'bits_per_byte': 1.5, 'mean_depth': 2.2, **SHARES}


def test_a_card_says_what_was_measured(run_folder, tmp_path):
  (run_folder / 'summary.json').write_text(json.dumps(SUMMARY))
  evaluation = {'step': 7, 'routing': {'topk': measured(2.25), 'threshold': measured(2.375)}}
  evaluation['gap'] = {'nll': 0.125, 'perplexity': 1.0, 'bits_per_byte': 0.1}
  (run_folder / 'evaluation.json').write_text(json.dumps(evaluation))
  run_convert(checkpoint=run_folder, to='transformers', output=tmp_path / 'hub')
  card = (tmp_path / 'hub' / 'README.md').read_text()
  front = card.split('---\n')[1]
  assert 'library_name: transformers\npipeline_tag: text-generation' in front
  for line in (
    '| top-k routing, as in training | 2.2500 | 9.0000 | 1.5000 |',
    '| threshold routing, causal: that of this folder | 2.3750 | 9.0000 | 1.5000 |',
    '| gap | 0.1250 | 1.0000 | 0.1000 |',
    '| threshold routing | 2.20 | 0.0% | 25.0% | 30.0% | 45.0% |',
    '| tokens | 5,376 |',
    '| training FLOPs | 2.5e+09 |',
    'capacities=[...]',
  ):
    assert line in card
  assert 'not measured' not in card
  assert '/home/me' not in card, 'it says nothing of the folders of this machine'
  assert str(tmp_path) not in card


def test_a_card_names_the_command_for_what_was_not_measured(run_folder, tmp_path):
  (run_folder / 'evaluation.json').write_text(
    '{"step": 3, "routing": {"topk": {"nll": 1.0}}}'
  )  # another step
  run_convert(checkpoint=run_folder, to='transformers', output=tmp_path / 'hub')
  card = (tmp_path / 'hub' / 'README.md').read_text()
  assert '| gap | not measured: `python -m mor_jax.evaluate --checkpoint=run`' in card
  assert 'not known: there is no summary.json of this step' in card
  assert str(tmp_path) not in card


@pytest.mark.slow
def test_a_card_is_about_the_weights_that_are_published(tmp_path):
  """Low-rank changes merged, in another dtype."""
  config, _, variables = build('vanilla adapted')
  whole = with_changes(Config(name='adapted', model=config), data={'seq_len': LENGTH})
  stored.write_model(tmp_path / 'run', whole, HeldWeights(config, variables), TEXTS.tokenizer, 'a test')
  run_convert(checkpoint=tmp_path / 'run', to='transformers', output=tmp_path / 'hub', dtype='bfloat16')
  opened, card = published.open_folder(tmp_path / 'hub'), (tmp_path / 'hub' / 'README.md').read_text()
  assert opened.weights.config.lora_rank == 0
  size = sum(math.prod(shape) for shape in opened.weights.shapes.values())
  assert f'| parameters | {size:,}, of these' in card
  assert '| stored as | bfloat16; computed as float32 in training |' in card


@pytest.mark.parametrize('name', ['vanilla shared sequence', 'recursive relaxed', 'token limited'])
def test_every_kind_of_model_has_a_card(name, tmp_path):
  config, _, variables = build(name)
  config = with_changes(Config(name='small', model=config), data={'seq_len': LENGTH, 'source': 'hf:a/b@main'})
  stored.write_model(
    tmp_path / 'run', config, HeldWeights(config.model, variables), TEXTS.tokenizer, 'a test'
  )
  run = stored.open_run(tmp_path / 'run')
  card = model_card.write(run, run, TEXTS, 'hub')
  assert ('## Depths' in card) == (config.model.kind == 'mor')
  assert f'| kind | {config.model.kind} |' in card
  assert '- "a/b"\n---\n' in card, 'the data are named as the Hub names them'
  assert 'None' not in card
