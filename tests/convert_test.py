"""mor_jax.convert: whole folders in and out, nothing left of what could not be converted."""

import dataclasses
import functools
import json
import pathlib
import shutil

import chex
import entry_points
import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny

from mor_jax.config import Config, ConfigError, DataConfig, with_changes
from mor_jax.data import tokenizer as tokenizer_lib
from mor_jax.interop import huggingface, official, tensors
from mor_jax.interop.weights import HeldWeights
from mor_jax.model.transformer import Transformer
from mor_jax.reporting import runs
from mor_jax.runs import stored
from mor_jax.runs.restore import load_run
from mor_jax.runs.run_folder import RunFolder

FIXTURES = pathlib.Path(__file__).parent / 'fixtures' / 'official_mor'
NAMES = sorted(path.stem for path in FIXTURES.glob('*.json'))


@pytest.fixture(scope='module')
def tokenizer():
  return tokenizer_lib.build(DataConfig(tokenizer='bytes'))


@pytest.fixture
def run_convert():
  """Runs the program with flags, the others at their defaults; raises as it does."""
  return functools.partial(entry_points.run, 'mor_jax.convert')


def same_weights(one, other):
  ours, theirs = ({path.name: path for path in folder.glob('*.safetensors')} for folder in (one, other))
  assert sorted(ours) == sorted(theirs)
  for name, path in ours.items():
    first, second = (safetensors.numpy.load_file(file) for file in (path, theirs[name]))
    assert sorted(first) == sorted(second)
    for key, value in first.items():
      assert value.dtype == second[key].dtype
      assert value.tobytes() == second[key].tobytes(), key


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_llama_becomes_a_run_and_llama_again(run_convert, tokenizer, tmp_path, monkeypatch, capsys, dtype):
  monkeypatch.setattr(tensors, 'SHARD_BYTES', 30_000)
  model, variables = tiny.model(kind='vanilla', vocab_size=257, num_layers=3, dtype=dtype)
  stored_variables = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), variables)
  huggingface.save(tmp_path / 'llama', model, stored_variables, tokenizer)
  run_convert(checkpoint=tmp_path / 'llama', output=tmp_path / 'run')
  assert 'as a run folder, to' in capsys.readouterr().out.replace('\n', ' ')

  run = load_run(tmp_path / 'run')  # as evaluate and generate do
  assert (run.config.model, run.step) == (model.config, 0)
  expected = jax.tree.map(lambda leaf: leaf.astype(np.float32), stored_variables)
  chex.assert_trees_all_equal_dtypes(run.variables, expected)
  chex.assert_trees_all_equal(run.variables, expected)

  run_convert(checkpoint=tmp_path / 'run', output=tmp_path / 'again')
  same_weights(tmp_path / 'again', tmp_path / 'llama')
  for name in ('config.json', 'tokenizer.json', 'tokenizer_config.json'):
    assert (tmp_path / 'again' / name).read_text() == (tmp_path / 'llama' / name).read_text()
  run_convert(checkpoint=tmp_path / 'run', output=tmp_path / 'wide', dtype='float32')
  assert huggingface.open_folder(tmp_path / 'wide')[0].dtypes['params/final_norm/scale'] == np.float32


@pytest.mark.parametrize('name', NAMES)
def test_the_authors_weights_become_a_run_and_themselves_again(run_convert, tokenizer, tmp_path, name):
  settings = json.loads((FIXTURES / f'{name}.json').read_text()) | {'vocab': 192}
  original = safetensors.numpy.load_file(FIXTURES / f'{name}.weights.safetensors')
  # Their vocabularies are smaller than the 257 of bytes, so rows are repeated.
  for head in ('lm_head.weight', 'model.embed_tokens.weight'):
    if head in original:
      original[head] = np.resize(original[head], (300, original[head].shape[1]))
  safetensors.numpy.save_file(original, tmp_path / 'theirs.safetensors')
  (tmp_path / 'settings.json').write_text(json.dumps(settings | {'vocab': 300}))
  tokenizer.save(tmp_path / 'tokenizer.json')
  run_convert(
    checkpoint=tmp_path / 'theirs.safetensors', settings=tmp_path / 'settings.json', output=tmp_path / 'run'
  )
  run_convert(checkpoint=tmp_path / 'run', output=tmp_path / 'out')
  written = safetensors.numpy.load_file(tmp_path / 'out' / 'model.safetensors')
  assert sorted(written) == sorted(original)
  assert all(written[key].tobytes() == value.tobytes() for key, value in original.items())
  run_convert(checkpoint=tmp_path / 'out', output=tmp_path / 'run2')  # described by its own config.json
  assert stored.open_run(tmp_path / 'run2').config == stored.open_run(tmp_path / 'run').config


def test_a_bias_of_the_routers_state_is_kept(tokenizer, tmp_path):
  model, variables = tiny.model(
    vocab_size=257, num_recursions=2, router='token_choice', balancing='loss_free'
  )
  variables['routing'] = {'bias': np.array([0.25, -0.5], np.float32)}
  config = with_changes(Config(model=model.config))
  stored.write_model(tmp_path / 'run', config, HeldWeights(model.config, variables), tokenizer, 'memory')
  np.testing.assert_array_equal(load_run(tmp_path / 'run').variables['routing']['bias'], [0.25, -0.5])


@pytest.mark.parametrize('break_it', ['tensor', 'truncated', 'untied', 'vocabulary'])
def test_nothing_is_written_where_something_is_wrong(run_convert, tokenizer, tmp_path, break_it):
  source = tmp_path / 'source'
  if break_it == 'untied':
    official.save(source, *tiny.model(vocab_size=257, kind='recursive', num_recursions=2), tokenizer)
  else:
    size = 100 if break_it == 'vocabulary' else 257
    huggingface.save(source, *tiny.model(kind='vanilla', vocab_size=size, num_layers=3), tokenizer)
  weights = source / 'model.safetensors'
  held = safetensors.numpy.load_file(weights)
  if break_it == 'truncated':
    weights.write_bytes(weights.read_bytes()[:-1])
  elif break_it != 'vocabulary':
    name = 'model.layers.2.self_attn.q_proj.weight'
    held[name] = held[name] + 1 if break_it == 'untied' else held[name][:5]
    safetensors.numpy.save_file(held, weights)
  message = {
    'tensor': r'layers\.2\.self_attn\.q_proj\.weight has shape',
    'truncated': 'may be truncated',
    'untied': r'layers\.2\.self_attn\.q_proj\.weight and model\.layers\.4',
    'vocabulary': 'only 100 embeddings',
  }[break_it]
  with pytest.raises(ConfigError, match=message):
    run_convert(checkpoint=source, output=tmp_path / 'run')
  assert [path.name for path in tmp_path.iterdir()] == ['source']


def test_what_cannot_be_meant_is_refused(run_convert, tmp_path):
  with pytest.raises(ConfigError, match='--output is missing'):
    run_convert(checkpoint=tmp_path)
  with pytest.raises(ConfigError, match='exists; name a new folder'):
    run_convert(checkpoint=tmp_path, output=tmp_path)
  with pytest.raises(ConfigError, match='nowhere does not exist'):
    run_convert(checkpoint=tmp_path / 'nowhere', output=tmp_path / 'run')
  with pytest.raises(ConfigError, match=r'it has no config\.json'):
    run_convert(checkpoint=tmp_path, output=tmp_path / 'run')
  with pytest.raises(ConfigError, match='which needs --settings'):
    run_convert(checkpoint=FIXTURES / f'{NAMES[0]}.weights.safetensors', output=tmp_path / 'run')


def test_a_converted_model_is_no_training_to_resume(tokenizer, tmp_path):
  model, variables = tiny.model(kind='vanilla', vocab_size=257)
  config = with_changes(Config(model=model.config))
  stored.write_model(tmp_path / 'run', config, HeldWeights(model.config, variables), tokenizer, 'memory')
  with pytest.raises(ConfigError, match=r'holds a converted model, not a training; .*--init_from='):
    RunFolder(tmp_path / 'run').check(config)
  with pytest.raises(ConfigError, match='holds a converted model, not a training: there are no curves'):
    runs.read([str(tmp_path / 'run')])


def as_format_1(folder: pathlib.Path, model, variables, tokenizer) -> None:
  """A run folder as it was before formats had numbers: one stack of all unique layers."""
  params = dict(variables['params'])
  first, block, last = (params.pop(name, None) for name in ('first', 'block', 'last'))
  if first is not None:
    block = jax.tree.map(
      lambda one, many, other: np.concatenate([one[None], many, other[None]]), first, block, last
    )
  held = HeldWeights(model.config, {**variables, 'params': {**params, 'layers': block}})
  config = with_changes(Config(name='old', model=model.config), data={'tokenizer': 'bytes'})
  stored.write_model(folder, config, held, tokenizer, 'a test', step=7)
  (folder / 'calibrations.json').write_text('[]')
  path = folder / 'config.json'
  settings = json.loads(path.read_text())
  assert settings.pop('format') == 2
  settings['checkpoint']['folder'] = str(folder / 'checkpoints')
  path.write_text(json.dumps(settings))


@pytest.mark.parametrize(
  'change',
  [
    {'kind': 'vanilla'},
    {'kind': 'recursive', 'sharing': 'cycle'},
    {'selection': 'ema_threshold', 'lora_rank': 2, 'tie_embeddings': False},
    {'kind': 'vanilla', 'kv': 'shared', 'num_recursions': 2},
  ],
)
def test_a_run_of_the_former_format_is_refused_and_converted(
  run_convert, tokenizer, tmp_path, change, capsys
):
  model, variables = tiny.model(vocab_size=257, **change)
  variables = jax.tree.map(np.asarray, variables)
  old, new = tmp_path / 'old', tmp_path / 'new'
  as_format_1(old, model, variables, tokenizer)
  for use in (load_run, stored.open_run):
    with pytest.raises(ConfigError, match=rf'{old} holds a run of format 1, .* --checkpoint={old} --output='):
      use(old)
  run_convert(checkpoint=old, output=new)
  assert 'as a run folder of format 2 (without the state of the optimiser)' in capsys.readouterr().out
  shutil.rmtree(old)
  run = load_run(new)
  assert (run.config.model, run.step) == (model.config, 7)
  assert run.folder.calibrations.exists()
  chex.assert_trees_all_equal(run.variables, variables)


ADAPTED = {'lora_rank': 4, 'lora_sharing': 'one', 'lora_layers': 'all'}


def as_run(folder, tokenizer, trainable='all', **change):
  """A run folder with a model of random weights; the model and its logits of a few tokens."""
  model, variables = tiny.model(vocab_size=257, num_recursions=2, **change)
  config = with_changes(Config(name='adapted', model=model.config), train={'trainable': trainable})
  stored.write_model(folder, config, HeldWeights(model.config, variables), tokenizer, 'a test', step=5)
  return model, tiny.apply(model)(variables, tiny.tokens(2, 12)).logits


@pytest.mark.parametrize(
  'change',
  [{'kind': 'vanilla', 'kv': 'shared'}, pytest.param({'share_norms': False}, marks=pytest.mark.slow)],
)
def test_low_rank_changes_are_merged_into_another_run_folder(
  run_convert, tokenizer, tmp_path, change, capsys
):
  model, expected = as_run(tmp_path / 'run', tokenizer, 'lora', **ADAPTED, **change)
  run_convert(checkpoint=tmp_path / 'run', output=tmp_path / 'merged', merge_lora=True)
  assert 'with its low-rank changes merged' in ' '.join(capsys.readouterr().out.split())
  run = load_run(tmp_path / 'merged')
  assert (run.config.model.lora_rank, run.config.train.trainable, run.step) == (0, 'all', 5)
  assert 'lora' not in run.variables['params']
  got = tiny.apply(run.model)(run.variables, tiny.tokens(2, 12)).logits
  np.testing.assert_allclose(got, expected, atol=1e-5)
  with pytest.raises(ConfigError, match=r'model\.lora_rank=0, so there is nothing to merge'):
    run_convert(checkpoint=tmp_path / 'merged', output=tmp_path / 'again', merge_lora=True)
  assert model.config.lora_rank == 4


@pytest.mark.slow
def test_low_rank_changes_are_merged_into_exported_weights(run_convert, tokenizer, tmp_path):
  _, expected = as_run(tmp_path / 'vanilla', tokenizer, kind='vanilla', **ADAPTED)
  run_convert(checkpoint=tmp_path / 'vanilla', output=tmp_path / 'llama')
  model, variables, _ = huggingface.load(tmp_path / 'llama')
  assert model.config.lora_rank == 0
  got = tiny.apply(Transformer(dataclasses.replace(model.config, dtype='float32')))(
    variables, tiny.tokens(2, 12)
  )
  np.testing.assert_allclose(got.logits, expected, atol=1e-5)

  _, expected = as_run(tmp_path / 'mor', tokenizer, **ADAPTED)
  run_convert(checkpoint=tmp_path / 'mor', output=tmp_path / 'theirs')
  model, variables = official.load(tmp_path / 'theirs')
  assert model.config.lora_rank == 0
  np.testing.assert_allclose(tiny.apply(model)(variables, tiny.tokens(2, 12)).logits, expected, atol=1e-5)


def test_what_recursions_have_of_their_own_is_not_merged(run_convert, tokenizer, tmp_path):
  as_run(tmp_path / 'run', tokenizer, lora_rank=4, lora_layers='all')
  with pytest.raises(
    ConfigError, match=r'cannot be merged into kernels .* --config\.model\.lora_sharing=one'
  ):
    run_convert(checkpoint=tmp_path / 'run', output=tmp_path / 'merged', merge_lora=True)
  with pytest.raises(ConfigError, match='a model with lora_sharing=own'):
    run_convert(checkpoint=tmp_path / 'run', output=tmp_path / 'theirs')
  huggingface.save(tmp_path / 'llama', *tiny.model(kind='vanilla', vocab_size=257), tokenizer)
  with pytest.raises(ConfigError, match='--merge_lora is for the folder of a run'):
    run_convert(checkpoint=tmp_path / 'llama', output=tmp_path / 'merged', merge_lora=True)
  assert sorted(path.name for path in tmp_path.iterdir()) == ['llama', 'run']


def test_a_run_of_a_later_format_is_refused(tokenizer, tmp_path):
  model, variables = tiny.model(vocab_size=257)
  config = with_changes(Config(name='new', model=model.config), data={'tokenizer': 'bytes'})
  stored.write_model(tmp_path / 'run', config, HeldWeights(model.config, variables), tokenizer, 'a test')
  path = tmp_path / 'run' / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | {'format': 3}))
  with pytest.raises(ConfigError, match='format 3, made by a newer mor_jax than this, which reads format 2'):
    load_run(tmp_path / 'run')
