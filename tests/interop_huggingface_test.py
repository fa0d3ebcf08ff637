"""Llama checkpoints: bit for bit there and back, opened by transformers, and refused by name where they cannot be read."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from mor_jax.config import ConfigError, DataConfig
from mor_jax.data import tokenizer as tokenizer_lib
from mor_jax.interop import families, huggingface, names, tensors

LLAMA3 = {'rope_scaling': 'llama3', 'rope_scaling_factor': 8.0, 'rope_original_length': 64}


@pytest.fixture(scope='module')
def tokenizer():
  return tokenizer_lib.build(DataConfig(tokenizer='bytes'))


def vanilla(**change):
  return tiny.model(kind='vanilla', vocab_size=257, num_layers=3, **change)


@pytest.fixture
def folder(tokenizer, tmp_path):
  """A checkpoint of a small model."""
  huggingface.save(tmp_path / 'llama', *vanilla(), tokenizer)
  return tmp_path / 'llama'


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize(
  'change', [{}, {'tie_embeddings': False, 'head_dim': 16, 'rope_theta': 5e5} | LLAMA3]
)
def test_there_and_back_is_the_same_bit_for_bit(tokenizer, tmp_path, monkeypatch, dtype, change):
  model, variables = vanilla(dtype=dtype, **change)
  variables = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), variables)
  monkeypatch.setattr(tensors, 'SHARD_BYTES', 20_000)  # several files
  huggingface.save(tmp_path / 'llama', model, variables, tokenizer)
  assert len(list((tmp_path / 'llama').glob('*.safetensors'))) > 2
  loaded, ours, vocabulary = huggingface.load(tmp_path / 'llama')
  assert loaded.config == model.config
  assert vocabulary.digest == tokenizer.digest
  assert vocabulary.end_of_text == tokenizer.end_of_text
  assert jax.tree.structure(ours) == jax.tree.structure(variables)
  for path, leaf in jax.tree_util.tree_leaves_with_path(ours):
    expected = variables
    for entry in path:
      expected = expected[entry.key]
    assert leaf.dtype == expected.dtype
    assert leaf.tobytes() == np.asarray(expected).tobytes(), jax.tree_util.keystr(path)


def test_other_kinds_of_model_and_existing_folders_are_refused(tokenizer, folder):
  with pytest.raises(ConfigError, match='only vanilla models can'):
    huggingface.save(folder.with_name('other'), *tiny.model(kind='mor', num_recursions=2), tokenizer)
  with pytest.raises(ConfigError, match='exists; name a new folder'):
    huggingface.save(folder, *vanilla(), tokenizer)
  assert sorted(path.name for path in folder.parent.iterdir()) == ['llama']


def change_config(folder, **change):
  config = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps(config | change))


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'model_type': 'gpt2'}, r"model_type='gpt2' \(must be one of llama, mistral"),
    ({'attention_bias': True}, r'self_attn\.q_proj\.bias is missing'),
    ({'rope_scaling': {'rope_type': 'llama3', 'factor': 8.0}}, "rope scaling 'llama3' lacks low_freq_factor"),
    ({'rope_scaling': {'type': 'longrope', 'factor': 2.0}}, "rope scaling 'longrope'"),
    ({'quantization_config': {'bits': 4}}, 'quantised weights cannot be read'),
    ({'rope_parameters': {'rope_type': 'yarn', 'rope_theta': 9.0}}, "rope scaling 'yarn' lacks factor"),
    ({'vocab_size': 200}, r'embed_tokens\.weight has shape'),
    ({'num_hidden_layers': 4}, r'model\.layers\.3\.input_layernorm\.weight is missing'),
    ({'num_hidden_layers': 2}, r'model\.layers\.2\.input_layernorm\.weight has no place'),
    ({'intermediate_size': 40}, r'gate_proj\.weight has shape \(48, 32\), the settings ask for \(40, 32\)'),
  ],
)
def test_what_does_not_fit_is_listed_by_name(folder, change, message):
  change_config(folder, **change)
  with pytest.raises(ConfigError, match=message):
    huggingface.load(folder)


def test_damaged_and_missing_files_are_named(folder, tmp_path):
  weights = folder / 'model.safetensors'
  content = weights.read_bytes()
  weights.write_bytes(content[:-10])
  with pytest.raises(ConfigError, match=r'model\.safetensors cannot be read .* truncated'):
    huggingface.load(folder)
  weights.unlink()
  with pytest.raises(ConfigError, match=r'has no weights: neither model\.safetensors'):
    huggingface.load(folder)
  with pytest.raises(ConfigError, match=r'has no config\.json'):
    huggingface.load(tmp_path)


def test_a_tokenizer_of_another_model_is_refused(folder):
  tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
  tensors['model.embed_tokens.weight'] = tensors['model.embed_tokens.weight'][:100]
  safetensors.numpy.save_file(tensors, folder / 'model.safetensors')
  change_config(folder, vocab_size=100)
  with pytest.raises(ConfigError, match='has 257 entries with ids up to 256, the model only 100'):
    huggingface.load(folder)


def change_tensors(folder, **change):
  """Rewrites the weights with tensors replaced, or left out where they are None."""
  path = folder / 'model.safetensors'
  changed = safetensors.numpy.load_file(path) | change
  safetensors.numpy.save_file({name: array for name, array in changed.items() if array is not None}, path)


def test_everything_wrong_is_listed_at_once(folder):
  change_tensors(
    folder,
    **{
      'model.norm.weight': None,
      'model.layers.1.mlp.up_proj.weight': np.zeros((3, 4), np.float32),
      'model.layers.0.self_attn.q_proj.weight': np.zeros((32, 32), np.int8),
      'model.layers.0.self_attn.q_proj.bias': np.zeros(32, np.float32),
    },
  )
  (folder / 'tokenizer.json').write_text('{}')
  with pytest.raises(ConfigError) as error:
    huggingface.load(folder)
  for problem in (
    'tensor model.norm.weight is missing',
    'model.layers.1.mlp.up_proj.weight has shape (3, 4), the settings ask for (48, 32)',
    'model.layers.0.self_attn.q_proj.weight is stored as I8',
    'model.layers.0.self_attn.q_proj.bias has no place in the model',
    'is not a tokenizer.json',
  ):
    assert problem in str(error.value)


def test_a_head_stored_beside_tied_embeddings_counts_where_it_differs(folder):
  embedding = safetensors.numpy.load_file(folder / 'model.safetensors')['model.embed_tokens.weight']
  change_tensors(
    folder, **{'lm_head.weight': embedding, 'model.layers.0.self_attn.rotary_emb.inv_freq': embedding[0]}
  )
  huggingface.load(folder)
  assert huggingface.load(folder)[0].config.tie_embeddings
  change_tensors(folder, **{'lm_head.weight': embedding + 1})
  model, variables, _ = huggingface.load(folder)
  assert not model.config.tie_embeddings, 'transformers opens it untied'
  np.testing.assert_array_equal(variables['params']['head']['kernel'], embedding.T + 1)


def test_weights_without_a_tokenizer_are_read(folder):
  (folder / 'tokenizer.json').unlink()
  assert huggingface.load(folder)[2] is None


def test_an_index_of_something_else_beside_the_weights_is_passed_over(folder):
  (folder / 'model.safetensors.index.json').write_text('{"weight_map": {"other": "other.safetensors"}}')
  huggingface.load(folder)


@pytest.mark.parametrize('files', [['../model.safetensors'], [3], [], ['.'], [None, 'a'], ['a\0']])
def test_an_index_that_names_no_files_of_its_folder_is_refused(folder, files):
  (folder / 'model.safetensors').unlink()
  index = {'weight_map': {f'tensor {i}': name for i, name in enumerate(files)}}
  (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
  with pytest.raises(ConfigError, match=r'index\.json cannot be read'):
    huggingface.load(folder)


def test_what_is_null_or_missing_has_its_default(folder):
  expected = huggingface.load(folder)[0].config
  config = json.loads((folder / 'config.json').read_text())
  for name in ('rms_norm_eps', 'initializer_range'):
    del config[name]
  (folder / 'config.json').write_text(json.dumps(config | dict.fromkeys(['attention_bias', 'hidden_act'])))
  assert huggingface.load(folder)[0].config == dataclasses.replace(expected, norm_epsilon=1e-6, init_std=0.02)


ANYTHING = st.recursive(
  st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
  max_leaves=5,
)
KNOWN = [
  'vocab_size',
  'hidden_size',
  'intermediate_size',
  'num_hidden_layers',
  'num_attention_heads',
  'num_key_value_heads',
  'head_dim',
  'rms_norm_eps',
  'rope_theta',
  'rope_scaling',
  'rope_parameters',
  'tie_word_embeddings',
  'initializer_range',
  'torch_dtype',
  'dtype',
  'max_position_embeddings',
  'eos_token_id',
  'hidden_act',
  'attention_bias',
  'quantization_config',
  'partial_rotary_factor',
  'model_type',
  'sliding_window',
  'use_sliding_window',
  'max_window_layers',
  'layer_types',
  'no_rope_layers',
  'no_rope_layer_interval',
]
ROPE = st.dictionaries(
  st.sampled_from(
    ['rope_type', 'type', 'factor', 'rope_theta', 'original_max_position_embeddings', 'mscale', 'truncate']
  ),
  ANYTHING | st.sampled_from(['llama3', 'linear', 'default', 'yarn', 'dynamic']),
)


@settings(deadline=None, max_examples=200)
@given(
  kind=st.sampled_from(sorted(families.FAMILIES)),
  change=st.dictionaries(st.sampled_from(KNOWN), ANYTHING | ROPE, max_size=4),
)
def test_any_config_gives_a_model_or_a_sentence(kind, change):
  config = huggingface.llama_config(tiny.config(kind='vanilla'), None, np.dtype('float32'))
  config |= {'model_type': kind, 'use_sliding_window': True, 'sliding_window': 8} | change
  try:
    made = huggingface.model_config(config, 'somewhere')
  except ConfigError:
    return
  names.llama(made)


def test_index_and_files_must_agree(tokenizer, tmp_path, monkeypatch):
  monkeypatch.setattr(tensors, 'SHARD_BYTES', 20_000)
  huggingface.save(tmp_path / 'llama', *vanilla(), tokenizer)
  path = tmp_path / 'llama' / 'model.safetensors.index.json'
  index = json.loads(path.read_text())
  index['weight_map']['ghost.weight'] = index['weight_map'].pop('model.norm.weight')
  path.write_text(json.dumps(index))
  with pytest.raises(ConfigError, match=r'ghost\.weight is not in model.*model\.norm\.weight is not in'):
    huggingface.load(tmp_path / 'llama')
  next((tmp_path / 'llama').glob('model-00002*')).unlink()
  with pytest.raises(ConfigError, match='lacks the files model-00002'):
    huggingface.load(tmp_path / 'llama')


@pytest.mark.torch
@pytest.mark.parametrize(
  'change',
  [
    {},
    {'tie_embeddings': False, 'num_kv_heads': 4, 'norm_epsilon': 1e-3},
    {'rope_scaling': 'linear', 'rope_scaling_factor': 3.0},
    LLAMA3 | {'head_dim': 16, 'rope_high_frequency_factor': 5.0},
  ],
)
def test_transformers_opens_it_and_computes_the_same(tokenizer, tmp_path, change):
  import torch
  import transformers

  model, variables = vanilla(**change)
  huggingface.save(tmp_path / 'llama', model, variables, tokenizer)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'llama').float().eval()
  vocabulary = transformers.AutoTokenizer.from_pretrained(tmp_path / 'llama')
  ids = vocabulary('Call me Ishmael. Åß…')['input_ids']
  assert ids == tokenizer.encode('Call me Ishmael. Åß…')
  with torch.no_grad():
    expected = theirs(torch.tensor([ids])).logits.numpy()
  logits = tiny.apply(model)(variables, jnp.array([ids], jnp.int32)).logits
  np.testing.assert_allclose(logits, expected, atol=1e-4)
