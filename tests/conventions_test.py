"""Beginnings and ends of texts of imported models: kept, followed by those who use them, and exported again."""

import json

import entry_points
import numpy as np
import pytest
import tiny
import tiny_engine
import tokenizers
from absl import flags
from absl.testing import flagsaver

from mor_jax.config import Config, ConfigError, DataConfig, with_changes
from mor_jax.data import dataset, tokenizer
from mor_jax.data.conventions import Conventions
from mor_jax.inference.requests import Request
from mor_jax.inference.scheduler import Scheduler
from mor_jax.interop import huggingface
from mor_jax.runs import stored
from mor_jax.runs.restore import load_run

WORDS = {name: i for i, name in enumerate(['<s>', '</s>', '<|im_end|>', '<unk>', 'one', 'two', 'three'])}
TEMPLATE = '{% for m in messages %}{{ m.content }}{% endfor %}'


@pytest.fixture
def source(tmp_path):
  """A Llama checkpoint with a template that begins texts with <s>, three ends, and files beside it."""
  model, variables = tiny.model(kind='vanilla', vocab_size=len(WORDS), num_layers=3)
  huggingface.save(tmp_path / 'source', model, variables, None)
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token='<unk>'))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  backend.add_special_tokens(['<s>', '</s>', '<|im_end|>'])
  backend.post_processor = tokenizers.processors.TemplateProcessing(
    single='<s> $A', special_tokens=[('<s>', WORDS['<s>'])]
  )
  folder = tmp_path / 'source'
  backend.save(str(folder / 'tokenizer.json'))
  config = json.loads((folder / 'config.json').read_text())
  config |= {'bos_token_id': 0, 'eos_token_id': 1, 'max_position_embeddings': 64}
  (folder / 'config.json').write_text(json.dumps(config))
  (folder / 'generation_config.json').write_text('{"eos_token_id": [1, 6]}')
  end = {'__type': 'AddedToken', 'content': '<|im_end|>', 'special': True}
  about = {'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': end, 'bos_token': '<s>'}
  (folder / 'tokenizer_config.json').write_text(json.dumps(about | {'chat_template': TEMPLATE}))
  (folder / 'chat_template.jinja').write_text(TEMPLATE)
  return folder


def convert(**values):
  program = entry_points.load('mor_jax.convert')
  with flagsaver.flagsaver():
    flags.FLAGS(['convert', *(f'--{name}={value}' for name, value in values.items())])
    program.main()


def test_everything_that_a_checkpoint_says_about_texts_is_kept_and_exported(source, tmp_path):
  convert(checkpoint=source, output=tmp_path / 'run')
  run = stored.open_run(tmp_path / 'run')
  assert (run.run_config.data.begin, run.run_config.data.separator) == ('<s>', '</s>')
  assert run.conventions().ends == (1, 6, 2)
  assert run.tokenizer().encode_text('one two') == [0, 4, 5]

  convert(checkpoint=tmp_path / 'run', output=tmp_path / 'out')
  before, after = (json.loads((folder / 'config.json').read_text()) for folder in (source, tmp_path / 'out'))
  assert after['eos_token_id'] == [1, 6, 2]
  for name in ('bos_token_id', 'max_position_embeddings'):
    assert after[name] == before[name]
  for name in ('tokenizer_config.json', 'generation_config.json', 'chat_template.jinja', 'tokenizer.json'):
    kept, was = (json_or_text(folder / name) for folder in (tmp_path / 'out', source))
    assert kept == was, name


def json_or_text(path):
  text = path.read_text()
  return json.loads(text) if path.suffix == '.json' else text


def test_flags_of_convert_hold_for_llama_folders_too(source, tmp_path):
  convert(checkpoint=source, output=tmp_path / 'run', separator='<|im_end|>')
  run = stored.open_run(tmp_path / 'run')
  assert run.run_config.data.separator == '<|im_end|>'
  assert run.conventions().ends == (2, 1, 6)
  moved = tmp_path / 'elsewhere.json'
  (source / 'tokenizer.json').rename(moved)
  with pytest.raises(
    ConfigError,
    match=r'no tokenizer\.json and no tokenizer\.model beside the weights .* name one with --tokenizer',
  ):
    convert(checkpoint=source, output=tmp_path / 'other')
  convert(checkpoint=source, output=tmp_path / 'other', tokenizer=moved)
  assert stored.open_run(tmp_path / 'other').tokenizer().encode_text('two') == [0, 5]


def test_weights_that_are_not_finite_are_named(source, tmp_path, capsys):
  model, variables, _ = huggingface.load(source)
  variables['params']['final_norm']['scale'] = np.full((32,), np.nan, np.float32)
  huggingface.save(tmp_path / 'nan', model, variables, None)
  convert(checkpoint=tmp_path / 'nan', output=tmp_path / 'run', tokenizer=source, separator='</s>')
  message = 'WARNING: params/final_norm/scale has 32 values that are not finite'
  assert capsys.readouterr().err.count(message) == 1


@pytest.mark.parametrize(('begin', 'first'), [('auto', [0]), ('<|im_end|>', [2]), (None, [])])
def test_documents_in_rows_begin_as_the_setting_says(source, tmp_path, begin, first):
  for number in range(30):
    (tmp_path / f'{number}.txt').write_text('one two three ' * (1 + number))
  data = DataConfig(
    source=f'files:{tmp_path}/*.txt',
    tokenizer=str(source),
    separator='</s>',
    begin=begin,
    seq_len=16,
    cache_dir=str(tmp_path / 'cache'),
    validation_fraction=0.2,
  )
  prepared = dataset.prepare(data)
  rows = prepared.rows('train')
  starts = [row['tokens'][row['positions'] == 0][0] for row in (rows[0],)]
  assert starts == [first[0] if first else 4]
  ends_at = np.flatnonzero(rows[0]['tokens'] == 1)
  assert rows[0]['tokens'][ends_at[0] + 1] == (first[0] if first else 4)
  if begin == 'auto':  # what the run then says of itself finds the same rows
    resolved = with_changes(Config(), data={**vars(data), 'begin': prepared.tokenizer.begin}).data
    assert dataset.dataset_folder(resolved) == prepared.folder
    opened = with_changes(
      Config(), data={**vars(data), 'source': f'prepared:{prepared.folder}', 'begin': None}
    )
    with pytest.raises(ConfigError, match=r'was prepared with begin=<s>, and data\.begin asks for none'):
      dataset.prepare(opened.data)


def test_a_token_that_is_none_cannot_begin_texts(source):
  with pytest.raises(ConfigError, match=r'no token <bos>, which begins texts \(data\.begin\)'):
    tokenizer.build(DataConfig(tokenizer=str(source), separator='</s>', begin='<bos>'))


def test_a_run_of_its_own_exports_its_own_ends(tmp_path):
  model, variables = tiny.model(kind='vanilla', vocab_size=257, num_layers=3)
  made = tokenizer.build(DataConfig(tokenizer='bytes'))
  huggingface.save(tmp_path / 'out', model, variables, made, Conventions((256,), 128))
  config = json.loads((tmp_path / 'out' / 'config.json').read_text())
  about = json.loads((tmp_path / 'out' / 'tokenizer_config.json').read_text())
  assert (config['eos_token_id'], config['bos_token_id'], config['max_position_embeddings']) == (
    256,
    None,
    128,
  )
  assert 'bos_token' not in about


@pytest.mark.torch
def test_greedy_text_after_a_prompt_is_that_of_transformers(source, tmp_path):
  """The prompt begins with <s> on both sides, and any of the ends ends the text."""
  import torch
  import transformers

  theirs = transformers.AutoModelForCausalLM.from_pretrained(source).float().eval()
  vocabulary = transformers.AutoTokenizer.from_pretrained(source)
  convert(checkpoint=source, output=tmp_path / 'run')
  run = load_run(tmp_path / 'run')
  made = stored.open_run(tmp_path / 'run').tokenizer()
  ends = run.folder.conventions(run.config, made).ends
  for prompt in ('one two', 'three', 'two three one'):
    ids = vocabulary(prompt)['input_ids']
    assert made.encode_text(prompt) == ids
    with torch.no_grad():
      expected = theirs.generate(
        torch.tensor([ids]), do_sample=False, max_new_tokens=12, eos_token_id=list(ends), pad_token_id=1
      )[0, len(ids) :].tolist()
    engine = tiny_engine.engine(run.model, run.variables, slots=1, max_len=32)
    request = Request(tuple(ids), max_new_tokens=12, stop_tokens=ends)
    result = Scheduler(engine, made).run([request])[0]
    assert result.tokens == [token for token in expected if token not in ends]
