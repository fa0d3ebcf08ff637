"""Checkpoint folders as they are found: without a tokenizer or with SentencePiece's, of several dtypes, with extras."""

import json
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from mor_jax.config import Config, ConfigError, DataConfig, with_changes
from mor_jax.data import tokenizer as tokenizer_lib
from mor_jax.interop import huggingface, official, pretrained
from mor_jax.interop.weights import HeldWeights
from tests import tiny


@pytest.fixture(scope='module')
def tokenizer():
  return tokenizer_lib.build(DataConfig(tokenizer='bytes'))


def save(folder, tokenizer=None, **change):
  """A checkpoint of a small model, with more embeddings than bytes: the model and its variables."""
  made, variables = tiny.model(**{'kind': 'vanilla', 'vocab_size': 300, 'num_layers': 3, **change})
  huggingface.save(folder, made, variables, tokenizer)
  return made, variables


def change_config(folder, **change):
  path = folder / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | change))


def change_tensors(folder, change):
  """Rewrites the weights by a function of their dictionary."""
  path = folder / 'model.safetensors'
  held = {name: np.array(array) for name, array in safetensors.numpy.load_file(path).items()}
  change(held)
  safetensors.numpy.save_file(held, path)


def test_weights_without_a_tokenizer_begin_a_training_that_has_one(tokenizer, tmp_path):
  save(tmp_path / 'bare')
  config = with_changes(Config(), init={'source': str(tmp_path / 'bare')})
  opened = pretrained.open_source(config)
  assert opened.tokenizer is None
  opened.check_tokenizer(config, tokenizer)
  with pytest.raises(ConfigError, match=r'data\.tokenizer=source: there is no .*/bare/tokenizer\.json'):
    pretrained.with_source(with_changes(config, data={'tokenizer': 'source'}), None)
  save(tmp_path / 'whole', tokenizer_lib.build(DataConfig(tokenizer='bytes', separator='<end>')))
  opened = pretrained.open_source(with_changes(config, init={'source': str(tmp_path / 'whole')}))
  with pytest.raises(ConfigError, match='is not the tokenizer of'):
    opened.check_tokenizer(config, tokenizer)


def test_a_sentencepiece_tokenizer_says_what_it_needs(tmp_path, monkeypatch):
  save(tmp_path / 'llama')
  (tmp_path / 'llama' / 'tokenizer.model').write_bytes(b'\n\x0e\n\x05<unk>')
  monkeypatch.setitem(sys.modules, 'sentencepiece', None)
  message = r'tokenizer\.model cannot be used .* sentencepiece is not installed: pip install transformers'
  with pytest.raises(ConfigError, match=message):
    huggingface.load(tmp_path / 'llama')


def test_embeddings_beyond_the_tokenizer_are_kept(tokenizer, tmp_path):
  save(tmp_path / 'padded', tokenizer)
  model, variables, found = huggingface.load(tmp_path / 'padded')
  assert (model.config.vocab_size, found.vocab_size) == (300, 257)
  assert variables['params']['embed']['embedding'].shape == (300, 32)


def test_several_ends_are_all_kept(tokenizer, tmp_path):
  save(tmp_path / 'llama', tokenizer)
  change_config(tmp_path / 'llama', eos_token_id=[7, 9])
  (tmp_path / 'llama' / 'generation_config.json').write_text(json.dumps({'eos_token_id': [9, 11, 299]}))
  conventions = huggingface.open_folder(tmp_path / 'llama').conventions
  assert conventions.ends == (256, 7, 9, 11)  # 299 is no token


def test_shards_of_several_dtypes_are_read_exactly(tmp_path):
  _, variables = save(tmp_path / 'llama')
  kernel = 'model.layers.{}.mlp.up_proj.weight'

  def mix(held):
    for layer, dtype in enumerate((np.float16, ml_dtypes.bfloat16)):
      held[kernel.format(layer)] = held[kernel.format(layer)].astype(dtype)
    held['model.norm.weight'] = held['model.norm.weight'].astype(ml_dtypes.bfloat16)

  change_tensors(tmp_path / 'llama', mix)
  loaded = huggingface.load(tmp_path / 'llama')[1]['params']
  up, original = (
    loaded['block']['mlp']['up']['kernel'],
    np.asarray(variables['params']['block']['mlp']['up']['kernel']),
  )
  assert up.dtype == np.float32
  for layer, dtype in enumerate((np.float16, ml_dtypes.bfloat16, np.float32)):
    np.testing.assert_array_equal(up[layer], original[layer].astype(dtype).astype(np.float32))
  assert loaded['final_norm']['scale'].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_a_tied_head_that_is_stored_is_the_embedding(tmp_path, dtype):
  """Also in another dtype than that of the embedding, where the numbers are the same."""
  save(tmp_path / 'llama')

  def store_head(held):
    rounded = held['model.embed_tokens.weight'].astype(ml_dtypes.bfloat16)
    held['model.embed_tokens.weight'] = rounded.astype(np.float32)
    held['lm_head.weight'] = rounded.astype(dtype)

  change_tensors(tmp_path / 'llama', store_head)
  model, variables, _ = huggingface.load(tmp_path / 'llama')
  assert model.config.tie_embeddings
  assert variables['params']['embed']['embedding'].dtype == np.float32


def test_buffers_of_rotations_are_passed_over_by_name(tmp_path):
  save(tmp_path / 'llama')
  buffers = (
    'model.rotary_emb.inv_freq',
    'model.rotary_emb.original_inv_freq',
    'model.layers.0.self_attn.rotary_emb.inv_freq',
    'model.layers.1.self_attn.rotary_emb.cos_cached',
  )
  change_tensors(
    tmp_path / 'llama', lambda held: held.update({name: np.ones(4, np.float32) for name in buffers})
  )
  huggingface.load(tmp_path / 'llama')
  change_tensors(tmp_path / 'llama', lambda held: held.update({'model.layers.0.self_attn.scale': np.ones(4)}))
  with pytest.raises(ConfigError, match=r'model\.layers\.0\.self_attn\.scale has no place'):
    huggingface.load(tmp_path / 'llama')


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'quantization_config': {'quant_method': 'awq'}}, 'quantised weights cannot be read'),
    (
      {'model_type': 'qwen2_moe'},
      "model_type='qwen2_moe' .must be one of llama, mistral, qwen2, qwen3, smollm3",
    ),
    ({'model_type': ['llama']}, 'must be one of llama'),
    ({'model_type': 'mistral', 'attention_bias': True}, 'a mistral model has biases: none'),
    (
      {'model_type': 'qwen3', 'use_sliding_window': True, 'sliding_window': 8},
      r'sliding_window=8 in .* layers only',
    ),
    (
      {'model_type': 'qwen2', 'use_sliding_window': True, 'sliding_window': 8, 'max_window_layers': 1},
      r'sliding_window=8 in 2 of 3 layers only \(layers 1, 2\)',
    ),
    (
      {'model_type': 'smollm3', 'use_sliding_window': True, 'sliding_window': 8, 'no_rope_layer_interval': 2},
      r'sliding_window=8 in 1 of 3 layers only \(layers 1\)',
    ),
    (
      {'model_type': 'qwen2', 'use_sliding_window': True, 'layer_types': ['x'] * 3},
      'layer_types must be a list',
    ),
    ({'model_type': 'smollm3', 'no_rope_layers': [1, 0]}, 'no_rope_layers must be a list of 0 or 1 for each'),
    (
      {'rope_parameters': {'full_attention': {'rope_type': 'default'}}},
      r'differ by layer \(full_attention\)',
    ),
    ({'rope_scaling': {'rope_type': 'longrope', 'factor': 2.0}}, "rope scaling 'longrope'"),
    ({'rope_scaling': {'rope_type': ['yarn'], 'factor': 2.0}}, 'rope scaling'),
  ],
)
def test_what_is_not_ours_is_refused_by_name(tmp_path, change, message):
  save(tmp_path / 'llama', num_layers=3)
  (tmp_path / 'llama' / 'model.safetensors').unlink()  # config.json alone decides
  if change.get('model_type') == 'qwen3':
    change = change | {'num_hidden_layers': 30}
  change_config(tmp_path / 'llama', **change)
  with pytest.raises(ConfigError, match=message):
    huggingface.load(tmp_path / 'llama')


@pytest.mark.parametrize(
  ('change', 'expected'),
  [
    ({'model_type': 'mistral'}, {'sliding_window': 4096, 'num_kv_heads': 8}),
    ({'model_type': 'mistral', 'sliding_window': None}, {'sliding_window': None}),
    ({'model_type': 'qwen2'}, {'attention_bias': 'qkv', 'num_kv_heads': 32, 'sliding_window': None}),
    ({'model_type': 'qwen2', 'num_key_value_heads': None}, {'num_kv_heads': 64}),
    ({'model_type': 'qwen2', 'sliding_window': 8}, {'sliding_window': None}),
    ({'model_type': 'qwen2', 'use_sliding_window': True}, {'sliding_window': None}),  # of 28 layers on
    ({'model_type': 'qwen3'}, {'head_dim': 128, 'qk_norm': True}),
    (
      {'model_type': 'smollm3'},
      {'num_kv_heads': 4, 'no_rope_layers': (3, 7), 'tie_embeddings': True, 'rope_theta': 2e6},
    ),
    ({}, {'num_kv_heads': 64, 'tie_embeddings': False}),
  ],
)
def test_what_config_json_does_not_say_is_what_transformers_means(change, expected):
  least = {
    'vocab_size': 300,
    'hidden_size': 128,
    'intermediate_size': 48,
    'num_hidden_layers': 8,
    'num_attention_heads': 64,
  }
  config = huggingface.model_config(least | change, 'here')
  assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'qk_norm': True, 'attention_bias': 'qkv'}, 'is in no family that transformers knows'),
    ({'qk_norm': True, 'no_rope_layers': (0,)}, 'is in no family that transformers knows'),
    ({'attention_bias': 'qkv', 'no_rope_layers': (0,)}, 'is in no family that transformers knows'),
  ],
)
def test_what_no_family_says_is_not_written(tmp_path, change, message):
  with pytest.raises(ConfigError, match=message):
    save(tmp_path / 'model', **change)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  'change',
  [{'attention_bias': 'qkv'}, {'qk_norm': True}, {'sliding_window': 4}, {'no_rope_layers': (1,)}],
)
def test_the_authors_form_has_plain_layers(tmp_path, change):
  made, variables = tiny.model(kind='recursive', num_recursions=2, **change)
  with pytest.raises(ConfigError, match="the authors' models have plain Llama layers, without model"):
    official.save(tmp_path / 'model', made, variables)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  'change',
  [
    {'attention_bias': 'qkv', 'sliding_window': 4},
    {'attention_bias': 'all', 'sliding_window': 4, 'no_rope_layers': (0, 2)},
    {'attention_bias': 'all', 'qk_norm': True, 'head_dim': 16},
    {'sliding_window': 4},
    {
      'rope_scaling': 'yarn',
      'rope_scaling_factor': 4.0,
      'rope_beta_fast': 8.0,
      'rope_truncate': False,
      'rope_attention_factor': 1.25,
    },
    {'rope_scaling': 'dynamic', 'rope_scaling_factor': 4.0, 'rope_original_length': 64},
  ],
)
def test_there_and_back_is_the_same(tmp_path, change):
  made, variables = save(tmp_path / 'model', **change)
  loaded, ours, _ = huggingface.load(tmp_path / 'model')
  assert loaded.config == made.config
  for path, leaf in HeldWeights(made.config, variables).leaves():
    assert HeldWeights(made.config, ours).leaf(path).tobytes() == leaf.tobytes(), path


@pytest.mark.torch
def test_a_sentencepiece_tokenizer_becomes_one_of_ours(tmp_path):
  """The same ids as SentencePiece's own, bytes for unknown characters included."""
  sentencepiece = pytest.importorskip('sentencepiece')
  proto = pytest.importorskip('sentencepiece.sentencepiece_model_pb2')

  model = proto.ModelProto()
  words = ['▁t', 'he', '▁the', 'in', '▁a', 'er', '▁w', *'▁abcdefghijklmnopqrstuvwxyz.,']
  special = [('<unk>', 2), ('<s>', 3), ('</s>', 3), *((f'<0x{byte:02X}>', 6) for byte in range(256))]
  for number, (piece, kind) in enumerate([*special, *((word, 1) for word in words)]):
    model.pieces.add(piece=piece, score=-float(number) if kind == 1 else 0.0, type=kind)
  trainer, normalizer = model.trainer_spec, model.normalizer_spec
  trainer.model_type, trainer.byte_fallback = 2, True
  trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, -1
  normalizer.name, normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces = 'identity', True, False
  save(tmp_path / 'llama')
  (tmp_path / 'llama' / 'tokenizer.model').write_bytes(model.SerializeToString())
  about = {'tokenizer_class': 'LlamaTokenizer', 'bos_token': '<s>', 'eos_token': '</s>', 'unk_token': '<unk>'}
  (tmp_path / 'llama' / 'tokenizer_config.json').write_text(json.dumps(about))
  change_config(tmp_path / 'llama', bos_token_id=1, eos_token_id=2)
  tokenizer = huggingface.load(tmp_path / 'llama')[2]
  text = 'the winter wä.'
  expected = sentencepiece.SentencePieceProcessor(str(tmp_path / 'llama' / 'tokenizer.model')).encode(text)
  assert tokenizer.encode(text) == expected
  assert tokenizer.decode(expected) == text
  assert (tokenizer.separator, tokenizer.end_of_text) == ('</s>', 2)
