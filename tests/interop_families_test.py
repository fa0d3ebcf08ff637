"""Checkpoints of every family, made by transformers: the same model here, and the same file again after an export."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from mor_jax.inference.requests import Request
from mor_jax.inference.scheduler import Scheduler
from mor_jax.interop import huggingface, names
from mor_jax.interop.tensors import Held
from mor_jax.interop.weights import NamedWeights, tree
from tests import tiny, tiny_engine

pytestmark = pytest.mark.torch

SHAPE = {
  'vocab_size': 61,
  'hidden_size': 32,
  'intermediate_size': 48,
  'num_hidden_layers': 4,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'max_position_embeddings': 64,
  'initializer_range': 0.1,
  'pad_token_id': None,
  'bos_token_id': None,
  'eos_token_id': None,
}
YARN = {'rope_type': 'yarn', 'rope_theta': 100.0, 'factor': 4.0, 'original_max_position_embeddings': 32}
WINDOW = {'use_sliding_window': True, 'sliding_window': 5}
CASES = {  # name: (settings of transformers, what they are here)
  'llama': ('Llama', {'rope_parameters': {'rope_type': 'default', 'rope_theta': 5e5}}, {'rope_theta': 5e5}),
  'llama with biases': ('Llama', {'attention_bias': True}, {'attention_bias': 'all'}),
  'llama3': (
    'Llama',
    {
      'rope_parameters': {
        'rope_type': 'llama3',
        'rope_theta': 100.0,
        'factor': 8.0,
        'low_freq_factor': 1.0,
        'high_freq_factor': 4.0,
        'original_max_position_embeddings': 32,
      }
    },
    {'rope_scaling': 'llama3'},
  ),
  'linear': (
    'Llama',
    {'rope_parameters': {'rope_type': 'linear', 'rope_theta': 100.0, 'factor': 3.0}},
    {'rope_scaling': 'linear'},
  ),
  'dynamic': (
    'Llama',
    {'rope_parameters': {'rope_type': 'dynamic', 'rope_theta': 100.0, 'factor': 3.0}},
    {'rope_scaling': 'dynamic', 'rope_original_length': 64},
  ),
  'yarn': ('Llama', {'rope_parameters': YARN}, {'rope_scaling': 'yarn', 'rope_original_length': 32}),
  'yarn, all its settings': (
    'Qwen2',
    {
      'rope_parameters': YARN
      | {'beta_fast': 4.0, 'beta_slow': 2.0, 'truncate': False, 'mscale': 0.7, 'mscale_all_dim': 0.5}
    },
    {'rope_scaling': 'yarn', 'rope_truncate': False, 'rope_beta_fast': 4.0},
  ),
  'mistral': ('Mistral', {'sliding_window': 5, 'head_dim': 16}, {'sliding_window': 5, 'head_dim': 16}),
  'qwen2': ('Qwen2', {'tie_word_embeddings': True}, {'attention_bias': 'qkv', 'tie_embeddings': True}),
  'qwen2 with a window': (
    'Qwen2',
    WINDOW | {'max_window_layers': 0},
    {'attention_bias': 'qkv', 'sliding_window': 5},
  ),
  'qwen3': ('Qwen3', {'head_dim': 16}, {'qk_norm': True, 'head_dim': 16}),
  'qwen3 with biases and a window': (
    'Qwen3',
    WINDOW | {'head_dim': 16, 'max_window_layers': 0, 'attention_bias': True},
    {'qk_norm': True, 'attention_bias': 'all', 'sliding_window': 5},
  ),
  'smollm3': ('SmolLM3', {'no_rope_layer_interval': 2}, {'no_rope_layers': (1, 3)}),
  'smollm3 with a window': (
    'SmolLM3',
    WINDOW | {'no_rope_layers': [1, 0, 0, 1], 'layer_types': ['sliding_attention'] * 4},
    {'no_rope_layers': (1, 2), 'sliding_window': 5},
  ),
}


GREEDY = (
  'llama3',
  'yarn, all its settings',
  'mistral',
  'qwen2 with a window',
  'qwen3',
  'smollm3 with a window',
)


def make(name, folder):
  """(model of transformers, its folder, what its settings are here), every parameter away from its trivial value."""
  import torch
  import transformers

  family, change, expected = CASES[name]
  torch.manual_seed(0)
  config = getattr(transformers, f'{family}Config')(**SHAPE | change, attn_implementation='eager')
  model = getattr(transformers, f'{family}ForCausalLM')(config).float().eval()
  with torch.no_grad():
    for parameter, tensor in model.named_parameters():
      if 'norm' in parameter or 'bias' in parameter:
        tensor.add_(0.2 * torch.randn_like(tensor))
  model.save_pretrained(folder)
  return model, folder, expected


@pytest.fixture(params=CASES)
def checkpoint(request, tmp_path):
  """See `make`."""
  return make(request.param, tmp_path / 'theirs')


def test_it_computes_and_learns_the_same(checkpoint):
  import torch

  theirs, folder, expected = checkpoint
  model, variables, tokenizer = huggingface.load(folder)
  assert tokenizer is None
  assert {name: getattr(model.config, name) for name in expected} == expected
  tokens_BT = np.asarray(tiny.tokens(2, 24))
  output = theirs(torch.tensor(tokens_BT, dtype=torch.long), labels=torch.tensor(tokens_BT, dtype=torch.long))
  output.loss.backward()

  @jax.jit
  def loss(params):
    logits = model.apply({'params': params}, tokens_BT).logits
    logprobs = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(logprobs, tokens_BT[:, 1:, None], axis=-1).mean(), logits

  (value, logits), gradients = jax.value_and_grad(loss, has_aux=True)(variables['params'])
  np.testing.assert_allclose(logits, output.logits.detach(), atol=1e-4)
  np.testing.assert_allclose(value, output.loss.detach(), rtol=1e-5)
  held = Held({name: p.grad.numpy() for name, p in theirs.named_parameters()}, 'gradients')
  named = NamedWeights(model.config, names.llama(model.config), held)
  tiny.assert_same_gradients(gradients, tree(named)['params'])


@pytest.mark.parametrize('name', GREEDY)
def test_it_says_the_same(name, tmp_path):
  """Greedy text, through our engine: longer than the window, and in several chunks."""
  import torch

  theirs, folder, _ = make(name, tmp_path)
  model, variables, _ = huggingface.load(folder)
  prompt = tiny_engine.prompt(20)
  said = Scheduler(tiny_engine.engine(model, variables)).run([Request(prompt, max_new_tokens=30)])[0].tokens
  with torch.no_grad():
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False)[0, len(prompt) :]
  assert list(said) == expected.tolist()


def test_transformers_opens_our_export(checkpoint, tmp_path):
  import torch
  import transformers

  theirs, folder, _ = checkpoint
  model, variables, _ = huggingface.load(folder)
  huggingface.save(tmp_path / 'ours', model, variables, None)
  ours = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'ours', attn_implementation='eager'
  ).float()
  tokens_BT = torch.tensor(np.asarray(tiny.tokens(2, 40)), dtype=torch.long)
  with torch.no_grad():
    np.testing.assert_allclose(ours.eval()(tokens_BT).logits, theirs(tokens_BT).logits, atol=1e-6)
  before, after = (
    safetensors.numpy.load_file(path / 'model.safetensors') for path in (folder, tmp_path / 'ours')
  )
  assert before.keys() == after.keys()
  for name, tensor in before.items():
    assert tensor.dtype == after[name].dtype
    assert tensor.tobytes() == after[name].tobytes(), name
  assert huggingface.load(tmp_path / 'ours')[0].config == model.config


def test_config_json_of_transformers_4_means_the_same(checkpoint):
  _, folder, _ = checkpoint
  new = json.loads((folder / 'config.json').read_text())
  rope = new.pop('rope_parameters')
  old = new | {'rope_theta': rope.pop('rope_theta'), 'torch_dtype': new.pop('dtype'), 'rope_scaling': rope}
  rope['type'] = rope.pop('rope_type')
  if rope == {'type': 'default'}:
    old['rope_scaling'] = None
  old.pop('layer_types', None)
  config = huggingface.load(folder)[0].config
  if 'sliding_window' not in new or new['model_type'] != 'smollm3' or not new['use_sliding_window']:
    assert huggingface.model_config(old, 'old') == config
