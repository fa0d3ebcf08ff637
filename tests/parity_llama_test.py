"""The vanilla model against Hugging Face Llama in PyTorch: logits, loss and gradients, float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.interop.names import LAYER
from mor_jax.model.transformer import Transformer
from tests import backends, tiny

pytestmark = pytest.mark.torch

CASES = [
  {'tie_embeddings': True, 'num_kv_heads': 2},
  {'tie_embeddings': False, 'num_kv_heads': 4, 'rope_theta': 500.0, 'norm_epsilon': 1e-3},
  *({'attention': backend} for backend in backends.OTHERS),
]


def llama(config):
  """A transformers Llama of the same shape with random weights."""
  import torch
  import transformers

  torch.manual_seed(0)
  shape = transformers.LlamaConfig(
    vocab_size=config.vocab_size,
    hidden_size=config.d_model,
    intermediate_size=config.mlp_dim,
    num_hidden_layers=config.num_layers,
    num_attention_heads=config.num_heads,
    num_key_value_heads=config.num_kv_heads,
    rms_norm_eps=config.norm_epsilon,
    rope_parameters={'rope_type': 'default', 'rope_theta': config.rope_theta},
    tie_word_embeddings=config.tie_embeddings,
    initializer_range=0.1,
  )
  model = transformers.LlamaForCausalLM(shape).float().eval()
  with torch.no_grad():
    for name, tensor in model.named_parameters():
      if 'norm' in name:
        tensor.add_(0.1 * torch.randn_like(tensor))
  return model


def to_params(config, tensors):
  """Our tree of a Llama state dict, or of its gradients."""
  arrays = {name: tensor.detach().numpy() for name, tensor in tensors.items()}
  layers = {}
  for ours, theirs in LAYER.items():
    *parents, leaf = ours.split('/')
    node = layers
    for parent in parents:
      node = node.setdefault(parent, {})
    node[leaf] = np.stack([arrays[f'model.layers.{i}.{theirs}'].T for i in range(config.num_layers)])
  params = {
    'embed': {'embedding': arrays['model.embed_tokens.weight']},
    'block': layers,
    'final_norm': {'scale': arrays['model.norm.weight']},
  }
  if not config.tie_embeddings:
    params['head'] = {'kernel': arrays['lm_head.weight'].T}
  return params


@pytest.mark.parametrize('change', CASES)
def test_logits_loss_and_gradients_equal_llama(change, monkeypatch):
  import torch

  backends.run_anywhere(monkeypatch)
  config = tiny.config(kind='vanilla', **change)
  theirs, ours = llama(config), Transformer(config)
  tokens_BT = np.asarray(tiny.tokens(2, 24))
  output = theirs(torch.tensor(tokens_BT, dtype=torch.long), labels=torch.tensor(tokens_BT, dtype=torch.long))
  output.loss.backward()
  params = to_params(config, dict(theirs.named_parameters()))

  @jax.jit
  def loss(params):
    logits = ours.apply({'params': params}, tokens_BT).logits
    logprobs = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(logprobs, tokens_BT[:, 1:, None], axis=-1).mean(), logits

  (value, logits), gradients = jax.value_and_grad(loss, has_aux=True)(params)
  np.testing.assert_allclose(logits, output.logits.detach(), atol=1e-4)
  np.testing.assert_allclose(value, output.loss.detach(), rtol=1e-5)
  expected = to_params(config, {name: p.grad for name, p in theirs.named_parameters()})
  tiny.assert_same_gradients(gradients, expected)
