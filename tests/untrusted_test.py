"""Checkpoints, datasets and configs from elsewhere are data: they run no code, and what they hold is read or named."""

import ast
import contextlib
import json
import pathlib
import pickle
import shutil
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mor_jax.config import Config, ConfigError, DataConfig
from mor_jax.data import dataset, foreign, shards, tokenizer
from mor_jax.evaluation import calibration
from mor_jax.interop import folders, official
from mor_jax.runs import metrics
from mor_jax.runs.restore import load_run
from mor_jax.runs.run_folder import RunFolder
from mor_jax.training.watch import goodput

PACKAGE = pathlib.Path(__file__).parents[1] / 'mor_jax'
RUNS_CODE = {'pickle', 'cloudpickle', 'dill', 'joblib', 'shelve', 'marshal', 'runpy'}
CALLS_CODE = {'eval', 'exec', 'compile', '__import__'}
AGREES = {'allow_pickle', 'trust_remote_code'}
TRUSTED = {('cli/flags.py', 'runpy')}  # --config is Python, and said to be trusted


def dangers(source: str) -> set[str]:
  """Ways to run code that comes with data: modules, functions, arguments."""
  found = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      found |= RUNS_CODE & {alias.name.partition('.')[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.module:
      found |= RUNS_CODE & {node.module.partition('.')[0]}
    if isinstance(node, ast.Call):
      if isinstance(node.func, ast.Name):
        found |= CALLS_CODE & {node.func.id}
      if ast.unparse(node.func) == 'torch.load' and 'weights_only=True' not in ast.unparse(node):
        found |= {'torch.load'}
      agreed = [keyword for keyword in node.keywords if getattr(keyword.value, 'value', True) is not False]
      found |= AGREES & {keyword.arg for keyword in agreed}
  return found


@pytest.mark.parametrize(
  'line',
  [
    'import pickle',
    'from pickle import loads',
    'eval(text)',
    'np.load(path, allow_pickle=True)',
    'load_dataset(name, trust_remote_code=trust)',
    'torch.load(path)',
  ],
)
def test_dangers_are_found(line):
  assert dangers(line)
  assert not dangers(
    'np.load(path, allow_pickle=False)\ntorch.load(path, weights_only=True)\nre.compile(text)'
  )


def test_nothing_that_reads_data_can_run_it():
  files = sorted(PACKAGE.rglob('*.py'))
  found = {
    (path.relative_to(PACKAGE).as_posix(), danger) for path in files for danger in dangers(path.read_text())
  }
  assert found == TRUSTED


class _Hook:
  """Notes what is unpickled; audit hooks cannot be removed, so there is one that can be switched on."""

  active, unpickled = False, []

  def __call__(self, event, arguments):
    if self.active and event == 'pickle.find_class':
      self.unpickled.append(arguments)


@pytest.fixture(scope='module')
def hook():
  hook = _Hook()
  sys.addaudithook(hook)
  yield hook
  hook.active = False


def test_a_run_and_its_dataset_are_read_without_unpickling(finished_run, hook, tmp_path):
  config, folder = finished_run
  hook.active = True
  pickle.loads(pickle.dumps(Attack(tmp_path)), fix_imports=False)
  assert hook.unpickled.pop(), 'the hook works'
  assert load_run(folder).step == 20
  assert len(dataset.open_dataset(dataset.dataset_folder(config.data)).rows('train')[0]['tokens'])
  assert hook.unpickled == []
  hook.active = False


class Attack:
  """Makes a file when it is unpickled."""

  def __init__(self, folder):
    self._path = str(folder / 'ran')

  def __reduce__(self):
    return (open, (self._path, 'w'))


@pytest.fixture
def folder(finished_run, tmp_path):
  """A copy of a prepared dataset."""
  return shutil.copytree(dataset.dataset_folder(finished_run[0].data), tmp_path / 'dataset')


def test_nothing_in_a_dataset_is_code(folder, tmp_path):
  for path in sorted(path for path in folder.rglob('*') if path.is_file()):
    content = path.read_bytes()
    payload = pickle.dumps(Attack(tmp_path))
    path.write_bytes(payload + b' ' * (len(content) - len(payload)))
    try:
      dataset.open_dataset(folder)
      shards.Rows(folder, 'train')[0]
    except Exception:  # refusing it is as good as ignoring it
      pass
    assert not (tmp_path / 'ran').exists(), path.name
    path.write_bytes(content)
  assert len(dataset.open_dataset(folder).rows('train')[0]['tokens'])


@pytest.mark.parametrize('key', ['pythonClassName', 'python_class_name', 'type'])
def test_a_dataset_does_not_choose_what_is_imported(folder, tmp_path, monkeypatch, key):
  """TFDS imports the module of a feature's class; here it lies beside the rows, where a user unpacked them."""
  (folder / 'evil.py').write_text(f'open({str(tmp_path / "ran")!r}, "w")')
  monkeypatch.syspath_prepend(folder.parent)
  text = (folder / 'features.json').read_text()
  own = '"pythonClassName": "tensorflow_datasets.core.features.tensor_feature.Tensor"'
  assert own in text
  (folder / 'features.json').write_text(text.replace(own, f'"{key}": "dataset.evil.Tensor"', 1))
  with pytest.raises(ConfigError, match=r'features\.json names the class dataset\.evil\.Tensor'):
    shards.Rows(folder, 'train')
  assert not (tmp_path / 'ran').exists()


def test_other_features_are_fine(folder):
  foreign.check_features(folder)
  foreign.check_features(folder / 'nowhere')
  (folder / 'features.json').write_text('{')
  with pytest.raises(ConfigError, match='cannot be read'):
    foreign.check_features(folder)


def test_a_stored_config_is_data(finished_run, tmp_path):
  run = shutil.copytree(finished_run[1], tmp_path / 'run')
  stored = json.loads((run / 'config.json').read_text())
  stored['model']['kind'] = f"__import__('os').mkdir({str(tmp_path / 'ran')!r})"
  (run / 'config.json').write_text(json.dumps(stored))
  with pytest.raises(ConfigError, match=r'config\.json cannot be read'):
    load_run(run)
  assert not (tmp_path / 'ran').exists()


# ---- files that may hold anything: read, or refused in a sentence ----

ANYTHING = st.recursive(
  st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
  max_leaves=5,
)
THEIRS = {'vocab': 300, 'd': 32, 'ff': 48, 'L': 6, 'h': 4, 'kv': 2, 'Nr': 2, 'sharing': 'cycle'}
ROUTED = [
  'type',
  'router',
  'gating',
  'temp',
  'z',
  'cap',
  'func',
  'alpha',
  'sampling',
  'tfunc',
  'bal',
  'tie',
  'theta',
]


@settings(deadline=None, max_examples=200)
@given(
  change=st.dictionaries(st.sampled_from([*THEIRS, *ROUTED]), ANYTHING, max_size=4),
  kind=st.sampled_from(['expert', 'token', 'none']),
)
def test_any_settings_of_the_authors_give_a_model_or_a_sentence(change, kind):
  with contextlib.suppress(ConfigError):
    official.model_config({**THEIRS, 'type': kind, **change})


@settings(deadline=None, max_examples=200)
@given(content=st.one_of(ANYTHING.map(json.dumps), st.text(max_size=30), st.just('[' * 200_000)))
def test_any_json_of_a_run_gives_a_config_or_a_sentence(tmp_path_factory, content):
  folder = tmp_path_factory.getbasetemp() / 'any'
  folder.mkdir(exist_ok=True)
  (folder / 'config.json').write_text(content, encoding='utf-8')
  for read in (RunFolder(folder).read_config, lambda: folders.read_config(folder)):
    with contextlib.suppress(ConfigError):
      read()


@settings(deadline=None, max_examples=150)
@given(
  name=st.sampled_from(['summary', 'data', 'conventions', 'calibrations', 'metrics', 'goodput']),
  content=st.one_of(ANYTHING.map(json.dumps), st.text(max_size=30), st.just('[' * 200_000)),
)
def test_any_file_in_a_run_folder_is_read_or_named(tmp_path_factory, name, content):
  folder = tmp_path_factory.getbasetemp() / 'run of any'
  folder.mkdir(exist_ok=True)
  for path in folder.iterdir():
    path.unlink()
  run, made = RunFolder(folder), tokenizer.build(DataConfig(tokenizer='bytes'))
  path = folder / f'{name}.json{"l" if name == "metrics" else ""}'
  path.write_text(content, encoding='utf-8')
  reader = {
    'summary': lambda: run.is_finished(Config()),
    'data': run.read_data,
    'conventions': lambda: run.conventions(Config(), made),
    'calibrations': lambda: calibration.read(run.calibrations),
    'metrics': lambda: metrics.read(run.metrics),
    'goodput': lambda: goodput.Ledger(run.goodput).seconds(),
  }[name]
  with contextlib.suppress(ConfigError):
    reader()


TOKENIZER = json.loads(tokenizer.build(DataConfig(tokenizer='bytes'))._backend.to_str())


@settings(deadline=None, max_examples=150)
@given(part=st.sampled_from([*TOKENIZER, 'vocab', 'merges', 'type']), value=ANYTHING)
def test_any_tokenizer_is_used_or_named(tmp_path_factory, part, value):
  path = tmp_path_factory.getbasetemp() / 'any tokenizer.json'
  inner = {**TOKENIZER['model'], part: value}
  path.write_text(json.dumps({**TOKENIZER, **({part: value} if part in TOKENIZER else {'model': inner})}))
  try:
    made = tokenizer.build(DataConfig(tokenizer=str(path)))
  except ConfigError:
    return
  made.encode('any text')
