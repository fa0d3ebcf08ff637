"""Published folders in PyTorch: the same as our causal forward pass and our engine."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mor_jax.config import Config
from mor_jax.evaluation import calibration
from mor_jax.interop import published, weights
from mor_jax.interop.weights import HeldWeights
from tests import tiny_engine
from tests.decoding_cases import MARGIN
from tests.hub_cases import CHECKED, LENGTH, SLACK, TEXTS, build, same

pytestmark = pytest.mark.torch


@pytest.fixture(scope='module')
def theirs(tmp_path_factory):
  """Opens a case in transformers, each once: the model, and rows of tokens for it."""
  import torch
  import transformers

  torch.set_num_threads(1)  # these models are too small to be divided

  @functools.cache
  def load(name: str, **options):
    config, _, variables = build(name)
    folder = tmp_path_factory.mktemp('hub') / 'model'
    published.write(folder, HeldWeights(config, variables), TEXTS, '# a card')
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)
    return model, None if options else clear_tokens(model)

  return load


def forward(model, tokens_BT, **options):
  import torch

  with torch.no_grad():
    return model(torch.tensor(np.asarray(tokens_BT)).long(), **options)


def are_clear(model, tokens_BT: np.ndarray) -> bool:
  """Whether no choice hangs on rounding: none turns when thresholds move, nor is a token's second choice as good."""
  settings, output = model.config.settings, forward(model, tokens_BT, output_hidden_states=True)
  if settings.routes == 'token_choice':
    scores_BTR = model.model.router(output.hidden_states[1] / settings.router_temperature)
    best_BT2 = (model.model._gate(scores_BTR) + getattr(model.model, 'router_bias', 0.0)).topk(2).values
    return bool((best_BT2[..., 0] - best_BT2[..., 1]).min() > MARGIN)
  shifted = []
  for shift in (-MARGIN, MARGIN):
    model.config.threshold_shift = shift
    shifted.append(forward(model, tokens_BT).depths)
  model.config.threshold_shift = 0.0
  return settings.routes is None or all(bool((depths == output.depths).all()) for depths in shifted)


def clear_tokens(model) -> np.ndarray:
  """The first rows of random tokens of which no choice hangs on rounding."""
  rows = (np.asarray(tiny.tokens(2, LENGTH, seed=seed)) for seed in range(50))
  return next(tokens_BT for tokens_BT in rows if are_clear(model, tokens_BT))


@pytest.mark.parametrize('name', CHECKED)
def test_logits_and_depths_are_those_of_our_causal_forward_pass(name, theirs):
  _, made, variables = build(name)
  model, tokens_BT = theirs(name)
  apply = tiny.apply(made, 'threshold')
  ours = apply(variables, jnp.asarray(tokens_BT), max_len=LENGTH, slack=SLACK)
  output = forward(model, tokens_BT, output_hidden_states=True)
  np.testing.assert_allclose(output.logits, ours.logits, atol=1e-4)
  np.testing.assert_allclose(output.hidden_states[-1], ours.hidden, atol=1e-4)
  passes = made.config.recursions if made.config.sharing.endswith('cycle') else 1
  assert len(output.hidden_states) == 3 + passes
  if ours.routing is None:
    assert output.depths is None
    return
  np.testing.assert_array_equal(output.depths, ours.routing.depth_BT)
  limited = any(capacity < 1 for capacity in made.config.step_capacities)
  assert bool(ours.routing.overflow_RBT.any()) == limited, 'places shall run out where there is a limit'


@pytest.mark.parametrize('name', CHECKED)
def test_a_cache_and_padding_on_the_left_change_nothing(name, theirs):
  import torch

  model, tokens_BT = theirs(name)
  whole, lengths = forward(model, tokens_BT), (61, LENGTH)
  padded = torch.full((2, LENGTH), 60)
  mask = torch.zeros_like(padded)
  for row, length in enumerate(lengths):
    padded[row, LENGTH - length :] = torch.tensor(tokens_BT[row, :length])
    mask[row, LENGTH - length :] = 1
  cache, logits, depths = None, [], []
  for begin, end in ((0, 40), (40, 41), (41, 42), (42, LENGTH)):
    part = forward(model, padded[:, begin:end], attention_mask=mask[:, :end], cache=cache, use_cache=True)
    cache = part.get('cache', part.get('past_key_values'))  # as the version of transformers calls it
    logits.append(part.logits)
    depths.append(part.depths)
  assert cache.get_seq_length() == LENGTH
  for row, length in enumerate(lengths):
    found = torch.cat(logits, 1)[row, LENGTH - length :]
    np.testing.assert_allclose(found, whole.logits[row, :length], atol=1e-4)
    if whole.depths is not None:
      np.testing.assert_array_equal(torch.cat(depths, 1)[row, LENGTH - length :], whole.depths[row, :length])


@pytest.mark.parametrize('name', ['expert', 'token limited', 'auxiliary hybrid', 'recursive sequence shared'])
def test_greedy_text_is_that_of_the_full_forward_pass(name, theirs):
  """Prompts of different length, with a cache, against each token's likeliest follower without one."""
  import torch

  model, tokens_BT = theirs(name)
  prompts, new = (tokens_BT[0, :9], tokens_BT[1, :4]), 60
  padded = torch.tensor(np.stack([np.pad(prompt, (9 - len(prompt), 0)) for prompt in prompts]))
  mask = torch.tensor([[1] * 9, [0] * 5 + [1] * 4])
  options = {'max_new_tokens': new, 'do_sample': False, 'eos_token_id': None}
  texts = model.generate(padded, attention_mask=mask, **options)
  without = model.generate(padded, attention_mask=mask, use_cache=False, **options)
  np.testing.assert_array_equal(texts, without)
  beams = model.generate(padded, attention_mask=mask, num_beams=3, **(options | {'max_new_tokens': 8}))
  again = model.generate(
    padded, attention_mask=mask, num_beams=3, use_cache=False, **(options | {'max_new_tokens': 8})
  )
  np.testing.assert_array_equal(beams, again)
  for row, prompt in enumerate(prompts):
    alone = texts[row, 9 - len(prompt) :]
    likeliest = forward(model, alone[None]).logits.argmax(-1)[0]
    np.testing.assert_array_equal(alone[len(prompt) :], likeliest[len(prompt) - 1 : -1])
    drafted = model.generate(alone[None, : len(prompt)], prompt_lookup_num_tokens=4, **options)
    np.testing.assert_array_equal(drafted[0], alone)


def test_greedy_text_is_that_of_our_engine(theirs):
  import torch

  from mor_jax.inference.requests import Request

  _, made, variables = build('expert shared')
  prompt = tiny_engine.prompt(14)
  options = {'max_len': LENGTH + 18, 'slack': SLACK, 'slots': 1}
  scheduler = tiny_engine.KeepingScheduler(
    tiny_engine.engine(made, variables, keep_logits=True, **options), ticks_per_call=50
  )
  (result,) = scheduler.run([Request(prompt, max_new_tokens=100, temperature=0.0)])
  model, _ = theirs('expert shared')
  model.config.max_position_embeddings = LENGTH + 18
  text = model.generate(torch.tensor([prompt]), max_new_tokens=100, do_sample=False, eos_token_id=None)
  model.config.max_position_embeddings = LENGTH
  assert tuple(text[0, 14:].tolist()) == tuple(result.tokens)


def test_calibrated_thresholds_are_those_of_calibrate(theirs):
  config, made, variables = build('expert')
  entry = calibration.Calibration((1.0, 0.5, 0.2), (0.0, 0.125, -0.25), 7, 16)
  model, tokens_BT = theirs('expert')
  model.config.calibrations, model.config.capacities = [dataclasses.asdict(entry)], [1.0, 0.5, 0.2]
  found = forward(model, tokens_BT)
  model.config.capacities = None
  changed, calibrated = calibration.apply(Config(model=config), variables, entry)
  model_of = dataclasses.replace(made, config=changed.model)
  ours = tiny.apply(model_of, 'threshold')(calibrated, jnp.asarray(tokens_BT), max_len=LENGTH, slack=SLACK)
  np.testing.assert_allclose(found.logits, ours.logits, atol=1e-4)


@pytest.mark.parametrize('name', ['expert relaxed', 'benefit', 'token every step', 'moving threshold'])
def test_what_transformers_saves_comes_back_bit_for_bit(name, theirs, tmp_path):
  import transformers

  config, _, variables = build(name)
  model, tokens_BT = theirs(name)
  model.save_pretrained(tmp_path / 'saved')
  TEXTS.tokenizer.save(tmp_path / 'saved' / 'tokenizer.json')
  opened = published.open_folder(tmp_path / 'saved')
  assert opened.weights.config == config
  assert same(variables, weights.tree(opened.weights))
  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'saved', trust_remote_code=True)
  np.testing.assert_array_equal(forward(again, tokens_BT).logits, forward(model, tokens_BT).logits)


def test_in_bfloat16_routers_stay_in_float32(theirs):
  import torch

  model, _ = theirs('auxiliary hybrid', dtype=torch.bfloat16)
  exact_model, tokens_BT = theirs('auxiliary hybrid')
  kept = {name for name, leaf in model.state_dict().items() if leaf.dtype == torch.float32}
  assert all('router' in name or 'norm' in name for name in kept)
  assert {'model.router.0.output.weight', 'model.aux_router.2.hidden.weight', 'model.norm.weight'} <= kept
  assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
  rough, exact = forward(model, tokens_BT), forward(exact_model, tokens_BT)
  assert rough.logits.dtype == torch.bfloat16
  agree = (rough.depths == exact.depths).float().mean()
  assert agree > 0.9
  assert (rough.logits.float() - exact.logits).abs().median() < 0.05


@pytest.mark.parametrize('name', ['expert relaxed', 'token limited', 'auxiliary hybrid'])
def test_trainer_takes_steps(name, theirs, tmp_path):
  import torch
  import transformers

  config, _, variables = build(name)
  published.write(tmp_path / 'hub', HeldWeights(config, variables), TEXTS, '# a card')
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hub', trust_remote_code=True)
  before = {name: leaf.clone() for name, leaf in model.named_parameters()}
  tokens_BT = torch.tensor(theirs(name)[1]).long()
  rows = [{'input_ids': row, 'labels': row} for row in tokens_BT]
  expected = forward(model, tokens_BT).logits[:, :-1].log_softmax(-1)
  expected = -expected.gather(-1, tokens_BT[:, 1:, None]).mean()
  arguments = transformers.TrainingArguments(
    str(tmp_path / 'out'), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True,
    report_to=[], logging_steps=1, save_strategy='no', disable_tqdm=True,
  )  # fmt: skip
  trainer = transformers.Trainer(model, arguments, train_dataset=rows)
  trainer.train()
  losses = [entry['loss'] for entry in trainer.state.log_history if 'loss' in entry]
  np.testing.assert_allclose(losses[0], expected, atol=1e-3)
  assert losses[-1] < losses[0]
  still = {name for name, leaf in model.named_parameters() if torch.equal(leaf, before[name])}
  assert all('aux_router' in name for name in still), 'auxiliary routers learn from a loss of their own'
  evaluated = trainer.evaluate(rows)
  assert np.isfinite(evaluated['eval_loss'])


def test_what_cannot_work_is_refused(theirs):
  import torch
  import transformers

  model, tokens_BT = theirs('expert')
  with pytest.raises(ValueError, match=r'does not support \w+ checkpointing'):
    model.gradient_checkpointing_enable()
  with pytest.raises(ValueError, match='cannot hold recursions'):
    forward(model, tokens_BT, cache=transformers.DynamicCache())
  with pytest.raises(ValueError, match='attention_mask has shape'):
    forward(model, tokens_BT, attention_mask=torch.ones(2, 3))
  with pytest.raises(ValueError, match='output_attentions=True'):
    forward(model, tokens_BT, output_attentions=True)
  model.config.capacities = [1.0, 0.9, 0.8]
  with pytest.raises(ValueError, match='have not been calibrated'):
    forward(model, tokens_BT)
  model.config.capacities = None
