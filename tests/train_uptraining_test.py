"""Training that begins from a vanilla model, from the command's point of view."""

import dataclasses
import json
import shutil

import entry_points
import jax
import numpy as np
import pytest
import tiny
import tiny_run

from mor_jax import cli, train
from mor_jax.config import Config, ConfigError, DataConfig, with_changes
from mor_jax.data import loader, schedule
from mor_jax.data import tokenizer as tokenizer_lib
from mor_jax.interop import huggingface, pretrained
from mor_jax.model import flops
from mor_jax.runs import metrics, stored
from mor_jax.training import targets as targets_lib


@pytest.fixture(scope='module')
def llama(tmp_path_factory):
  """A vanilla model of four layers in a Llama folder, with the vocabulary of bytes."""
  folder = tmp_path_factory.mktemp('source') / 'llama'
  model, variables = tiny.model(
    kind='vanilla', vocab_size=260, num_layers=4
  )  # three rows more than bytes need
  huggingface.save(folder, model, variables, tokenizer_lib.build(DataConfig(tokenizer='bytes')))
  return folder


@pytest.fixture(scope='module')
def config(llama, tmp_path_factory) -> Config:
  """Settings of a vanilla model that begins from it and trains two steps."""
  shape = dataclasses.asdict(tiny.config(kind='vanilla', num_layers=4)) | {'vocab_size': None}
  cache = str(tmp_path_factory.mktemp('cache'))
  return with_changes(
    tiny_run.CONFIG,
    model=shape,
    data={'max_documents': 40, 'validation_fraction': 0.2, 'cache_dir': cache},
    train={
      'steps': 2,
      'warmup_steps': 1,
      'log_every': 1,
      'eval_every': 0,
      'eval_rows': 12,
      'sample_tokens': 0,
    },
    init={'source': str(llama)},
  )


def test_begins_with_the_loss_of_the_original_and_resumes_without_it(config, llama, tmp_path):
  source = tmp_path / 'llama'
  shutil.copytree(llama, source)
  config = with_changes(config, init={'source': str(source)})
  assert train.main(config, str(tmp_path / 'run')) == 0
  dataset = loader.open_dataset(config.data)
  batch = next(loader.train_batches(dataset, config.data, schedule.of(config.train)))
  model, variables, _ = huggingface.load(source)
  seen = targets_lib.visible_batch(batch, config.data.segment_mask)
  logits = tiny.apply(model)(variables, batch['tokens'], segment_ids=seen['segment_ids']).logits
  logprobs = jax.nn.log_softmax(logits[:, :-1])
  nll = -np.take_along_axis(np.asarray(logprobs), batch['tokens'][:, 1:, None], axis=-1)[..., 0]
  expected = nll[np.asarray(targets_lib.predicted(seen))].mean()
  first, second = metrics.read(tmp_path / 'run' / 'metrics.jsonl')
  np.testing.assert_allclose(first['train/loss'], expected, rtol=1e-5)
  assert second['train/loss'] != first['train/loss']
  stored_config = json.loads((tmp_path / 'run' / 'config.json').read_text())
  assert stored_config['init'] == {'source': str(source), 'method': 'stepwise'}
  assert stored_config['model']['vocab_size'] == 260  # the model's, not the tokenizer's 257

  # As if it had been killed before its first checkpoint: the model comes first then, not random parameters.
  shutil.rmtree(tmp_path / 'run' / 'checkpoints')
  (tmp_path / 'run' / 'checkpoints' / '2.orbax-checkpoint-tmp').mkdir(parents=True)
  (tmp_path / 'run' / 'summary.json').unlink()
  assert train.main(config, str(tmp_path / 'run')) == 0
  assert metrics.read(tmp_path / 'run' / 'metrics.jsonl')[0]['train/loss'] == first['train/loss']

  shutil.rmtree(source)  # a checkpoint comes first, so it is not asked for again
  (tmp_path / 'run' / 'summary.json').unlink()
  longer = with_changes(config, train={'steps': 3})
  assert train.main(longer, str(tmp_path / 'run'), ['train.steps']) == 0
  steps = [record['step'] for record in metrics.read(tmp_path / 'run' / 'metrics.jsonl')]
  assert steps == [1, 2, 3]
  # Its own vanilla checkpoint is a source in turn.
  assert stored.open_run(tmp_path / 'run').config.kind == 'vanilla'


def test_what_does_not_fit_ends_before_anything_is_written(config, llama, tmp_path):
  other = with_changes(config, data={'tokenizer': 'bpe', 'vocab_size': 258})
  with pytest.raises(
    ConfigError, match=r'data\.tokenizer=bpe is not the tokenizer of init\.source=.*tokenizer\.json'
  ):
    train.main(other, str(tmp_path / 'run'))
  with pytest.raises(ConfigError, match=r'model\.mlp_dim=64 cannot begin from init\.source'):
    train.main(with_changes(config, model={'mlp_dim': 64}), str(tmp_path / 'run'))
  with pytest.raises(ConfigError, match=r'init\.source=.*nowhere: .* it has no config\.json'):
    train.main(with_changes(config, init={'source': str(tmp_path / 'nowhere')}), str(tmp_path / 'run'))
  assert not (tmp_path / 'run').exists()


def test_the_flag_is_the_setting(config, llama):
  none = with_changes(config, init={'source': None})
  assert pretrained.with_source(none, str(llama)).init.source == str(llama)
  assert pretrained.with_source(config, str(llama)) == config
  assert pretrained.with_source(none, None) == none
  upper = with_changes(
    none, init={'method': 'upper'}
  )  # the flag names the model after the settings were read
  assert pretrained.with_source(upper, str(llama)).init.method == 'upper'
  with pytest.raises(ConfigError, match=r'init\.method=upper has no model to take layers from'):
    pretrained.with_source(upper, None)
  with pytest.raises(ConfigError, match='differ; give one of them'):
    pretrained.with_source(config, 'elsewhere')
  assert 'init_from' in entry_points.load('mor_jax.train').FLAGS
  same = with_changes(none, data={'tokenizer': 'source'})
  assert pretrained.with_source(same, str(llama)).data.tokenizer == str(llama / 'tokenizer.json')
  with pytest.raises(ConfigError, match=r'data\.tokenizer=source .* not set: give --init_from'):
    pretrained.with_source(same, None)


@pytest.mark.parametrize('variant', ['mor', pytest.param('recursive', marks=pytest.mark.slow)])
def test_the_tiny_recipe_trains(config, tmp_path, variant):
  changes = {
    'model.d_model': 32,
    'model.num_layers': 6,
    'model.mlp_dim': 48,
    'model.init_std': 0.1,
    'model.capacity_warmup_steps': 0,
    'data.seq_len': 64,
    'data.cache_dir': config.data.cache_dir,
    'data.max_documents': 40,
    'data.validation_fraction': 0.2,
    'train.steps': 4,
    'train.warmup_steps': 1,
    'train.eval_rows': 4,
    'train.sample_tokens': 0,
    'train.log_every': 1,
  }
  if variant == 'mor':
    changes |= {'distill.weight': 1.0, 'distill.top_k': 20}
  recipe = cli.load_config(f'configs/uptrain_tiny.py:{variant}', changes)
  model, variables = tiny.model(kind='vanilla', vocab_size=257)
  huggingface.save(tmp_path / 'llama', model, variables, tokenizer_lib.build(DataConfig(tokenizer='bytes')))
  assert train.main(pretrained.with_source(recipe, str(tmp_path / 'llama')), str(tmp_path / 'run')) == 0
  records = metrics.read(tmp_path / 'run' / 'metrics.jsonl')
  assert records[-1]['train/loss'] < records[0]['train/loss']
  assert 'validation/nll' in records[-1]
  assert ('train/distill_loss' in records[-1]) == (variant == 'mor')


@pytest.mark.parametrize('variant', ['mor', 'recursive', 'vanilla'])
def test_the_recipe_of_smollm2_is_that_models_shape(variant):
  for recursions, layers in ((2, 30), (3, 32), (4, 30)):
    config = cli.load_config(
      f'configs/uptrain_smollm2_135m.py:{variant}', {'model.num_recursions': recursions}
    )
    assert config.model.num_layers == (30 if variant == 'vanilla' else layers)
    embedding = config.model.vocab_size * config.model.d_model
    per_layer = 576 * (576 * 2 + 192 * 2) + 3 * 576 * 1536 + 2 * 576
    count = flops.count_parameters(config.model)
    assert count.total - count.non_embedding == embedding
    if variant == 'vanilla':
      assert count.total == 134_515_008 == embedding + 30 * per_layer + 576  # as published
