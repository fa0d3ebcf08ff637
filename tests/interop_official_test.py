"""Parity with vectors computed by the authors' PyTorch implementation (float32, random weights)."""

import dataclasses
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from mor_jax.config import DataConfig
from mor_jax.data import tokenizer as tokenizer_lib
from mor_jax.interop import names, official
from mor_jax.interop import tensors as tensors_lib
from mor_jax.model.router import loss_weights, summarize
from mor_jax.model.transformer import Transformer
from mor_jax.training import vocabulary_loss
from tests import backends, tiny

FOLDER = pathlib.Path(__file__).parent / 'fixtures' / 'official_mor'
NAMES = sorted(path.stem for path in FOLDER.glob('*.json'))


class Fixture:
  """One recorded model: settings, weights, inputs and results."""

  def __init__(self, name: str):
    self.settings = json.loads((FOLDER / f'{name}.json').read_text())
    self.weights = FOLDER / f'{name}.weights.safetensors'
    self.gradients = safetensors.numpy.load_file(FOLDER / f'{name}.grads.safetensors')
    self.recorded = np.load(FOLDER / f'{name}.npz')
    self.tokens_BT = jnp.asarray(self.recorded['input_ids'], jnp.int32)


def total_loss(model, variables, tokens_BT, chunk):
  """The authors' training loss: mean next-token cross entropy and the weighted losses of the routers.

  Of all logits at once (`chunk` is None), or by the vocabulary loss of training, `chunk` tokens at a time.
  """
  output = model.apply(variables, tokens_BT)
  if chunk is None:
    logprobs_BTV = jax.nn.log_softmax(output.logits[:, :-1])
    total = -jnp.take_along_axis(logprobs_BTV, tokens_BT[:, 1:, None], axis=-1).mean()
  else:
    x_BTD, kernel_DV, _ = model.apply(variables, tokens_BT, method=Transformer.states_and_head)
    targets_BT, mask_BT = tokens_BT[:, 1:], jnp.ones_like(tokens_BT[:, 1:], bool)
    nll = vocabulary_loss.next_token_nll
    summed = vocabulary_loss.sum_over_tokens(nll, x_BTD[:, :-1], kernel_DV, (targets_BT, mask_BT), chunk)
    total = summed / targets_BT.size
  parts = {'lm_loss': total}
  for name, term in output.routing.losses.items():
    parts[name] = (term.sum / term.count).sum()
    total += loss_weights(model.config)[name] * parts[name]
  return total, (parts, output)


run = jax.jit(jax.value_and_grad(total_loss, argnums=1, has_aux=True), static_argnums=(0, 3))


OTHER_WAYS = [
  ({'dispatch': 'mask'}, None),
  *(({}, chunk) for chunk in (0, 20)),
  *(({'attention': backend}, None) for backend in backends.OTHERS),
]
WAYS = [(name, {}, None) for name in NAMES] + [
  # They say nothing new while the others pass; each for half of the models, by turns.
  pytest.param(name, *way, marks=pytest.mark.slow)
  for number, way in enumerate(OTHER_WAYS)
  for name in NAMES[number % 2 :: 2]
]


@pytest.mark.parametrize(('name', 'change', 'chunk'), WAYS)
def test_matches_the_authors(name, change, chunk, monkeypatch):
  backends.run_anywhere(monkeypatch)
  fixture = Fixture(name)
  recorded = fixture.recorded
  model, variables = official.load(fixture.weights, fixture.settings)
  model = Transformer(dataclasses.replace(model.config, **change))
  (total, (parts, output)), gradients = run(model, variables, fixture.tokens_BT, chunk)
  np.testing.assert_allclose(output.logits, recorded['logits'], atol=1e-4)
  np.testing.assert_allclose(total, recorded['total_loss'], atol=1e-4)
  theirs = {'lm_loss': 'lm_loss', 'aux': 'sampling_loss', 'balancing': 'balancing_loss'}
  if fixture.settings.get('z'):
    theirs['z'] = 'router_z_loss'
  for ours, name in theirs.items():
    if ours in parts:
      np.testing.assert_allclose(parts[ours], recorded[name], rtol=1e-5, atol=1e-4, err_msg=name)
  summary = summarize(jax.device_get(output.routing.counts))
  if model.config.router == 'expert_choice':
    np.testing.assert_allclose(summary['sampling_accuracy'], recorded['sampling_acc'], atol=1e-6)
    assert_same_tokens_selected(model.config, output.routing, recorded)
  else:
    shares = [summary[f'depth_share_{depth}'] for depth in range(1, model.config.num_recursions + 1)]
    np.testing.assert_allclose(shares, recorded['balancing_ratio'], atol=1e-6)
  tiny.assert_same_gradients(gradients['params'], official.to_params(model.config, fixture.gradients))


def assert_same_tokens_selected(config, routing, recorded):
  for step in range(config.num_recursions):
    chosen_B = [np.flatnonzero(row) for row in routing.selected_RBT[step]]
    np.testing.assert_array_equal(chosen_B, recorded[f'selected_{step}'])
    if config.dispatch == 'gather':
      np.testing.assert_array_equal(routing.indices[step], recorded[f'selected_{step}'])


def test_settings_and_tensors_that_do_not_fit_are_refused(tmp_path):
  fixture = Fixture('expert_middle_cycle_r3')
  with pytest.raises(ValueError, match="nonsense='x'"):
    official.model_config({**fixture.settings, 'nonsense': 'x'})
  tensors = safetensors.numpy.load_file(fixture.weights)
  config = official.model_config(fixture.settings)
  with pytest.raises(ValueError, match=r'extra\.weight has no place'):
    official.to_params(config, {**tensors, 'extra.weight': np.zeros(1)})
  missing = {k: v for k, v in tensors.items() if k != 'model.norm.weight'}
  with pytest.raises(ValueError, match=r'model\.norm\.weight is missing'):
    official.to_params(config, missing)
  name = 'model.layers.2.block.0.mlp.up_proj.weight'
  with pytest.raises(
    ValueError,
    match=r'copies of one shared tensor differ.*layers\.1\.block\.0\.mlp\.up_proj\.weight and model\.layers\.2',
  ):
    official.to_params(config, {**tensors, name: tensors[name] + 1})


def test_every_setting_the_authors_have_becomes_a_setting_of_ours():
  expert = Fixture('expert_middle_cycle_r3').settings
  settings = {**expert, 'func': 'tanh', 'gating': 'additive', 'sampling': 'aux_router', 'theta': 500.0}
  config = official.model_config({**settings, 'alpha': 1.0, 'router': 'wide_mlp', 'kvshare': True})
  assert (config.squash, config.gate_scale, config.gating) == ('tanh', 1.0, 'additive')
  assert (config.causality, config.rope_theta, config.kv) == ('aux_router', 500.0, 'shared')
  assert official.model_config({**expert, 'func': None}).squash == 'identity'
  token = Fixture('token_middle_cycle_r3').settings
  config = official.model_config({**token, 'tfunc': 'sigmoid', 'talpha': 0.1, 'bal': 'loss_free'})
  assert (config.squash, config.gate_scale, config.balancing) == ('sigmoid', 0.1, 'loss_free')


def test_auxiliary_routers_and_balancing_bias_are_read(tmp_path):
  fixture = Fixture('expert_middle_cycle_r3')
  tensors = safetensors.numpy.load_file(fixture.weights)
  aux = {
    name.replace('mor_router', 'mlp_router'): -value
    for name, value in tensors.items()
    if 'mor_router' in name
  }
  safetensors.numpy.save_file({**tensors, **aux}, tmp_path / 'aux.safetensors')
  model, variables = official.load(
    tmp_path / 'aux.safetensors', {**fixture.settings, 'sampling': 'aux_router'}
  )
  router = variables['params']['router']['output']['kernel']
  np.testing.assert_array_equal(variables['params']['aux_router']['output']['kernel'], -router)
  model.apply(variables, fixture.tokens_BT, routing='threshold')

  fixture = Fixture('token_middle_cycle_r3')
  bias_R = np.array([0.0, 0.0, 9.0], np.float32)
  tensors = {**safetensors.numpy.load_file(fixture.weights), 'model.layers.1.router_bias': bias_R}
  safetensors.numpy.save_file(tensors, tmp_path / 'bias.safetensors')
  model, variables = official.load(tmp_path / 'bias.safetensors', {**fixture.settings, 'bal': 'loss_free'})
  assert (model.apply(variables, fixture.tokens_BT).routing.depth_BT == 3).all()
  with pytest.raises(ValueError, match="set bal='loss_free'"):
    official.load(tmp_path / 'bias.safetensors', fixture.settings)


@pytest.mark.parametrize('name', NAMES)
def test_what_was_read_is_written_back_bit_for_bit(name, tmp_path):
  fixture = Fixture(name)
  official.save(tmp_path / 'out', *official.load(fixture.weights, fixture.settings))
  assert_same_tensors(tmp_path / 'out' / 'model.safetensors', fixture.weights)
  model, variables = official.load(tmp_path / 'out')  # config.json says what it is
  original, expected = official.load(fixture.weights, fixture.settings)
  assert model.config == original.config
  chex.assert_trees_all_equal(variables, expected)


def assert_same_tensors(path, expected_path):
  ours, theirs = (safetensors.numpy.load_file(file) for file in (path, expected_path))
  assert sorted(ours) == sorted(theirs)
  for name, tensor in theirs.items():
    assert ours[name].dtype == tensor.dtype
    assert ours[name].tobytes() == tensor.tobytes(), name


KINDS = [
  {'kind': 'recursive', 'num_recursions': 2},
  {'kind': 'recursive', 'num_recursions': 2, 'sharing': 'middle_sequence', 'kv': 'shared'},
  {'kind': 'recursive', 'num_recursions': 3, 'sharing': 'sequence', 'tie_embeddings': False},
  {'num_recursions': 2, 'causality': 'aux_router', 'router_head': 'wide_mlp', 'kv': 'hybrid'},
  {'num_recursions': 3, 'sharing': 'cycle', 'router_activation': 'tanh', 'gating': 'residual'},
  {'num_recursions': 4, 'router': 'token_choice', 'balancing': 'loss_free', 'router_head': 'mlp'},
  {'num_recursions': 3, 'router': 'token_choice', 'sharing': 'cycle', 'token_gating': 'every_step'},
]


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('change', KINDS)
def test_every_kind_of_model_there_and_back(change, dtype, tmp_path, monkeypatch):
  monkeypatch.setattr(tensors_lib, 'SHARD_BYTES', 40_000)  # several files
  model, variables = tiny.model(**change)
  variables = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.dtype(dtype)), variables)
  official.save(tmp_path / 'out', model, variables)
  assert len(list((tmp_path / 'out').glob('*.safetensors'))) > 1
  again, loaded = official.load(tmp_path / 'out')
  assert again.config == model.config
  for (path, leaf), (ours, expected) in zip(names.leaves(loaded), names.leaves(variables), strict=True):
    assert (path, leaf.dtype) == (ours, expected.dtype)
    assert leaf.tobytes() == expected.tobytes(), path


def test_models_with_parameters_that_the_authors_lack_are_refused(tmp_path):
  model, variables = tiny.model(num_recursions=2, lora_rank=2)
  with pytest.raises(ValueError, match=r'have no params/steps/lora/attention_key/down'):
    official.save(tmp_path / 'out', model, variables)
  with pytest.raises(ValueError, match='write it as a Llama checkpoint'):
    official.save(tmp_path / 'out', *tiny.model(kind='vanilla'))
  assert not list(tmp_path.iterdir())


def test_untied_copies_are_all_named_or_averaged(tmp_path):
  fixture = Fixture('expert_middle_cycle_r3')
  tensors = safetensors.numpy.load_file(fixture.weights)
  query = 'model.layers.{}.block.0.self_attn.q_proj.weight'
  for step, scale in ((1, 3.0), (2, 6.0), (3, 0.0)):
    tensors[query.format(step)] = np.full((64, 64), scale, np.float32)
  key = 'model.layers.3.block.1.self_attn.k_proj.weight'
  tensors[key] = tensors[key] + 1
  path = tmp_path / 'untied.safetensors'
  safetensors.numpy.save_file(tensors, path)
  with pytest.raises(ValueError, match='copies of one shared tensor differ') as error:
    official.load(path, fixture.settings)
  for name in (query.format(2), query.format(3), key):
    assert name in str(error.value)
  _, variables = official.load(path, fixture.settings, untied='average')
  layers = variables['params']['block']
  np.testing.assert_allclose(layers['attention']['query']['kernel'][0], 3.0)
  tied = official.load(fixture.weights, fixture.settings)[1]['params']['block']
  np.testing.assert_allclose(
    layers['attention']['key']['kernel'][1], tied['attention']['key']['kernel'][1] + 1 / 3, atol=1e-6
  )
  np.testing.assert_array_equal(layers['mlp']['up']['kernel'], tied['mlp']['up']['kernel'])


@pytest.mark.torch
@pytest.mark.parametrize('suffix', ['bin', 'pt'])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_pytorch_files_are_read_without_running_what_is_in_them(suffix, dtype, tmp_path):
  import torch

  fixture = Fixture('token_middle_cycle_r3')
  tensors = {
    name: torch.tensor(tensor).to(getattr(torch, dtype))
    for name, tensor in safetensors.numpy.load_file(fixture.weights).items()
  }
  path = tmp_path / f'weights.{suffix}'
  torch.save(tensors if suffix == 'bin' else {'state_dict': tensors, 'step': 7}, path)
  _, variables = official.load(path, fixture.settings)
  _, expected = official.load(fixture.weights, fixture.settings)
  jax.tree.map(
    lambda ours, theirs: np.testing.assert_array_equal(ours, theirs.astype(jnp.dtype(dtype))),
    variables,
    expected,
  )
  torch.save(tensors | {'evil': print}, path)
  with pytest.raises(ValueError, match='cannot be read as a PyTorch state dict'):
    official.load(path, fixture.settings)


@pytest.mark.torch
def test_a_recursive_model_opens_in_transformers(tmp_path):
  import torch
  import transformers

  model, variables = tiny.model(kind='recursive', num_recursions=2, vocab_size=257)
  tokenizer = tokenizer_lib.build(DataConfig(tokenizer='bytes'))
  official.save(tmp_path / 'out', model, variables, tokenizer)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out').float().eval()
  tokens_BT = tiny.tokens(2, 20)
  with torch.no_grad():
    expected = theirs(torch.tensor(np.asarray(tokens_BT))).logits.numpy()
  np.testing.assert_allclose(tiny.apply(model)(variables, tokens_BT).logits, expected, atol=1e-4)
