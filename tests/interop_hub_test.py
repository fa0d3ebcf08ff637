"""Folders for transformers: written whole, read back bit for bit, and in PyTorch the same as our causal forward pass."""

import ast
import dataclasses
import functools
import json
import pathlib
import shutil
import sys
import tomllib

import entry_points
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tokenizers
from absl import flags
from absl.testing import flagsaver

from mor_jax.cli import engines
from mor_jax.config import Config, ConfigError, with_changes
from mor_jax.data.conventions import Conventions
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.evaluation import calibration
from mor_jax.interop import model_card, names, published, sources, weights
from mor_jax.interop.published import Texts
from mor_jax.interop.weights import HeldWeights
from mor_jax.runs import stored
from mor_jax.runs.restore import load_run
from tests import decoding_cases, tiny_engine
from tests.decoding_cases import CASES, MARGIN

ROOT = pathlib.Path(__file__).parent.parent
LENGTH = 96  # of texts that recursions have places for
SLACK = 0.6  # places per token expected, so that they run out
CHECKED = (
  'vanilla',
  'vanilla shared sequence',
  'recursive relaxed',
  'recursive sequence shared',
  'expert',
  'expert relaxed',
  'expert untied',
  'expert shared',
  'auxiliary hybrid',
  'moving threshold',
  'benefit',
  'token limited',
  'token every step',
)


def make_tokenizer() -> Tokenizer:
  """Words of one letter, as many as the small models have embeddings."""
  words = {chr(ord('0') + index): index for index in range(60)} | {'<|endoftext|>': 60}
  return Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token='0')))


TEXTS = Texts(make_tokenizer(), Conventions((60,), LENGTH), LENGTH, step=7)


def build(name: str):
  """Settings, model and variables of a case."""
  made, variables = decoding_cases.build(CASES[name])
  if 'threshold' in variables.get('routing', {}):  # far from one another, so that none can stand for another
    routing = variables['routing'] | {'threshold': jnp.array([0.3, -0.4, 0.1])}
    variables = {**variables, 'routing': routing}
  return dataclasses.replace(made.config, threshold_slack=SLACK), made, variables


def same(ours: dict, theirs: dict) -> bool:
  one, other = (dict(names.leaves(tree)) for tree in (ours, theirs))
  assert one.keys() == other.keys()
  return all(
    np.asarray(leaf).tobytes() == np.asarray(other[path]).tobytes() and leaf.dtype == other[path].dtype
    for path, leaf in one.items()
  )


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


@pytest.mark.parametrize('name', ['vanilla shared sequence', 'recursive relaxed', 'token limited'])
def test_every_kind_of_model_has_a_card(name, tmp_path):
  config, _, variables = build(name)
  config = with_changes(Config(name='small', model=config), data={'seq_len': LENGTH, 'source': 'hf:a/b@main'})
  stored.write_model(
    tmp_path / 'run', config, HeldWeights(config.model, variables), TEXTS.tokenizer, 'a test'
  )
  card = model_card.write(stored.open_run(tmp_path / 'run'), TEXTS, 'hub')
  assert ('## Depths' in card) == (config.model.kind == 'mor')
  assert f'| kind | {config.model.kind} |' in card
  assert '- "a/b"\n---\n' in card, 'the data are named as the Hub names them'
  assert 'None' not in card


# ---- beside PyTorch ----


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


@pytest.mark.torch
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


@pytest.mark.torch
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


@pytest.mark.torch
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


@pytest.mark.torch
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


@pytest.mark.torch
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


@pytest.mark.torch
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


@pytest.mark.torch
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


@pytest.mark.torch
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


@pytest.mark.torch
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
