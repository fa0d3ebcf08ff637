"""Conversations as rows: packed, cut, mixed, and shown."""

import dataclasses
import io
import itertools
import json
import re

import numpy as np
import pytest
from rich.console import Console

from mor_jax.config import ConfigError, DataConfig
from mor_jax.data import (
  corpus,
  dataset,
  inspection,
  loader,
  messages,
  packing,
  pipeline,
  questions,
  schedule,
)
from mor_jax.data.document import Document
from mor_jax.data.messages import Conversation
from tests import chat_rows
from tests.chat_rows import ROLES, turn, write


@pytest.fixture
def data(tmp_path):
  return chat_rows.settings(tmp_path)


def decoded(tokens: np.ndarray) -> str:
  """The text of bytes; the end of a text is a zero."""
  return bytes((tokens % 256).tolist()).decode()


def segments(row: dict[str, np.ndarray]):
  for segment in range(1, row['segment_ids'].max() + 1):
    inside = row['segment_ids'] == segment
    yield decoded(row['tokens'][inside]), row['loss_mask'][inside], row['positions'][inside]


def test_first_fit_keeps_conversations_whole_and_apart(data):
  prepared = dataset.prepare(dataclasses.replace(data, packing='first_fit'))
  numbers = []
  for split in corpus.SPLITS:
    for row in prepared.rows(split):
      for text, mask, positions in segments(row):
        number, length = int(text[5:8]), int(text[5:8]) % 17
        asked, answer = (message['content'] for message in turn(number, length))
        assert text == f'user\n{asked}\nassistant\n{answer}\0\n'
        learned = [letter for letter, is_learned in zip(text, mask, strict=True) if is_learned]
        assert ''.join(learned) == f'{answer}\0'
        assert positions.tolist() == list(range(len(text)))
        numbers.append(number)
  assert sorted(numbers) == list(range(200))
  counts = prepared.manifest.splits['train']
  assert counts.targets == sum(int(row['loss_mask'].sum()) for row in prepared.rows('train'))
  assert prepared.manifest.extras == ('loss_mask',)
  assert prepared.manifest.chat['ends'] == [256]


def test_concat_loses_no_token(data):
  prepared = dataset.prepare(dataclasses.replace(data, packing='concat'))
  tokens, mask = (
    np.concatenate([row[name][row['segment_ids'] > 0] for row in prepared.rows('train')])
    for name in ('tokens', 'loss_mask')
  )
  learned = decoded(tokens[mask > 0]).split('\0')[:-1]
  texts = decoded(tokens)
  numbers = [int(found) for found in re.findall(r'user\n(\d{3})', texts)]
  assert learned == [turn(number, number % 17)[1]['content'] for number in numbers]


def test_packing_moves_the_mask_with_its_tokens():
  """Documents whose mask says which ids are even, in both ways of packing."""
  rng = np.random.default_rng(0)
  documents = [rng.integers(0, 50, size) for size in rng.integers(1, 40, 60)]
  scored = [packing.Scored(ids, ids % 2 == 0) for ids in documents]
  for pack in packing.PACKINGS.values():
    rows = list(pack(scored, 32, 7))
    used = [row.tokens_T[: row.num_tokens] for row in rows]
    assert sorted(np.concatenate(used)) == sorted(np.concatenate(documents))
    for row, ids in zip(rows, used, strict=True):
      np.testing.assert_array_equal(row.loss_mask_T[: row.num_tokens], ids % 2 == 0)
      assert not row.loss_mask_T[row.num_tokens :].any()


@pytest.mark.parametrize('packed', ['concat', 'first_fit'])
@pytest.mark.parametrize('too_long', ['cut', 'skip'])
def test_long_conversations_are_cut_or_skipped_and_counted(data, tmp_path, packed, too_long):
  long = [turn(number, 10) for number in range(40)]
  long[7] = turn(7, 30)  # its answer is cut
  long[8] = turn(8, 80)  # nothing is left of its answer
  data = dataclasses.replace(data, source=write(tmp_path, long), too_long=too_long, packing=packed)
  lines = []
  prepared = dataset.prepare(data, report=lines.append)
  cut, left_out = (1, 1) if too_long == 'cut' else (0, 2)
  assert (
    f'longer than data.seq_len=64: {cut} conversations cut, {left_out} left out (data.too_long={too_long})'
    in lines
  )
  manifest = prepared.manifest
  assert manifest.too_long == left_out
  assert sum(split.cut for split in manifest.splits.values()) == cut
  assert sum(split.documents for split in manifest.splits.values()) == 40 - left_out
  text = ''.join(
    text for split in corpus.SPLITS for row in prepared.rows(split) for text, _, _ in segments(row)
  )
  assert ('007aaa' in text.replace('\n', '')) == (too_long == 'cut')
  assert '008' not in text


def test_format_template_and_length_rule_decide_the_dataset(data, tmp_path):
  other = tmp_path / 'other.jinja'
  other.write_text(ROLES.replace('eos_token', "'!'"))
  changed = [
    data,
    dataclasses.replace(data, chat_template=str(other)),
    dataclasses.replace(data, too_long='skip'),
    dataclasses.replace(data, format='text', chat_template=None),
  ]
  assert len({dataset.dataset_folder(one) for one in changed}) == len(changed)
  moved = tmp_path / 'moved.jinja'
  moved.write_text(ROLES)
  assert dataset.dataset_folder(
    dataclasses.replace(data, chat_template=str(moved))
  ) == dataset.dataset_folder(data)
  prepared = dataset.prepare(data)
  named = dataclasses.replace(data, source=f'prepared:{prepared.folder}', chat_template=None)
  assert dataset.prepare(named).manifest == prepared.manifest
  for changes, message in (
    ({'format': 'text'}, r'was prepared with format=chat, and data\.format asks for text'),
    ({'chat_template': str(other)}, r'another template than data\.chat_template=\S+other\.jinja'),
  ):
    with pytest.raises(ConfigError, match=message):
      dataset.prepare(dataclasses.replace(named, **changes))


def test_the_split_does_not_depend_on_the_template(data, tmp_path):
  other = tmp_path / 'other.jinja'
  other.write_text(
    ROLES.replace("m.role + '", "'# ' + m.role + '").replace("'assistant\n'", "'# assistant\n'")
  )

  def held_out(data):
    prepared = dataset.prepare(dataclasses.replace(data, packing='first_fit'))
    texts = (text for row in prepared.rows('validation') for text, _, _ in segments(row))
    return sorted(re.search(r'user\n(\d+)', text)[1] for text in texts)

  assert held_out(data) == held_out(dataclasses.replace(data, chat_template=str(other)))


def test_live_rows_are_those_that_would_be_prepared(data):
  prepared = dataset.prepare(data)
  live = loader.open_dataset(dataclasses.replace(data, live=True, live_validation_rows=4))
  for row, other in zip(live.rows('validation'), prepared.rows('validation'), strict=False):
    for name in loader.train_arrays(prepared):
      np.testing.assert_array_equal(row[name], other[name])
  batches = loader.train_batches(live, live.data, schedule.constant(4))
  found = [row.tobytes() for batch in itertools.islice(batches, 5) for row in batch['loss_mask']]
  assert set(found) <= {row['loss_mask'].tobytes() for row in prepared.rows('train')}


def test_mixtures_and_duplicates(data, tmp_path):
  line = json.dumps({'prompt': 'same', 'completion': 'answer', 'id': 1})
  (tmp_path / 'pairs.jsonl').write_text('\n'.join([line] * 50) + '\n')
  source = f'0.5*{data.source};0.5*files:{tmp_path}/pairs.jsonl'
  prepared = dataset.prepare(dataclasses.replace(data, source=source, drop_duplicates=True))
  assert prepared.manifest.dropped['duplicate'] == 49


def test_parquet_and_json_have_the_three_forms(tmp_path):
  import pyarrow
  import pyarrow.parquet

  shared = [{'from': 'human', 'value': 'one'}, {'from': 'gpt', 'value': 'two'}]
  plain = [{'role': 'user', 'content': 'one'}, {'role': 'assistant', 'content': 'two'}]
  records = [
    {'messages': plain, 'source': 'x'},
    {'prompt': 'one', 'completion': 'two'},
    {'prompt': plain[:1], 'completion': plain[1:]},
    {'conversations': shared, 'messages': None},
  ]
  firsts = [0, 1, 1, 0]
  for number, (record, first) in enumerate(zip(records, firsts, strict=True)):
    table = pyarrow.Table.from_pylist([record] * 2)
    pyarrow.parquet.write_table(table, tmp_path / f'{number}.parquet')
    (tmp_path / f'{number}.json').write_text(json.dumps([record] * 2))
    for extension in ('parquet', 'json'):
      data = DataConfig(format='chat', source=f'files:{tmp_path}/{number}.{extension}')
      documents = list(corpus.open_source(data).records())
      assert [document.text for document in documents] == [Conversation(plain, first).to_text()] * 2


@pytest.mark.parametrize(('colours', 'no_color'), [(None, False), ('truecolor', False), ('truecolor', True)])
def test_inspection_shows_what_is_learned(data, colours, no_color):
  prepared = dataset.prepare(dataclasses.replace(data, packing='first_fit'))
  output = io.StringIO()
  console = Console(
    file=output, force_terminal=colours is not None, color_system=colours, no_color=no_color, width=200
  )
  inspection.show(console, prepared, 'train', 2)
  text = output.getvalue()
  answer = next(segments(prepared.rows('train')[0]))[0].split('\n')[3].strip('\0')
  if colours and not no_color:
    assert re.search(rf'\x1b\[1;32m{answer}<\|endoftext\|>\x1b\[0m', text)
    assert '[[' not in text.replace('\x1b[', '')
  else:
    assert f'assistant\n[[{answer}<|endoftext|>]]\n' in text
    assert '[[learned]], context' in text
  counts = prepared.manifest.splits['train']
  assert f'{counts.targets:,} tokens, {counts.targets / counts.tokens:.1%}, what the assistant says' in text


@pytest.mark.slow
def test_rows_do_not_depend_on_the_number_of_processes(data, tmp_path, monkeypatch):
  monkeypatch.setattr(pipeline, 'UNIT_CHARACTERS', 1024)
  folders = []
  for workers in (1, 2):
    own = dataclasses.replace(data, workers=workers, cache_dir=str(tmp_path / str(workers)))
    folders.append(dataset.prepare(own).folder)
  one, two = ({path.name: path.read_bytes() for path in folder.glob('*.array_record*')} for folder in folders)
  assert one == two


# ---- embedded conversations ----


def test_embedded_conversations_are_about_the_library():
  documents = list(itertools.islice(questions.EmbeddedQuestions().records(), 40))
  again = list(itertools.islice(questions.EmbeddedQuestions().records(), 40))
  assert documents == again
  for document in documents:
    assert isinstance(document, Document)
    conversation = Conversation.from_text(document.text)
    assert messages.of_record('x', {'messages': conversation.messages}).text == document.text
  assert any(len(Conversation.from_text(document.text).messages) > 2 for document in documents)


def test_what_a_docstring_says_is_the_answer():
  source = '"""About things.  More."""\ndef f(a):\n  """Return a again.\n\n  Much more."""\ndef g(): "g(x) -> y"\nclass _C:\n  "Hidden one here."'
  found = list(questions._subjects(source, 'm'))
  assert [(one.name, one.signature, one.answer) for one in found] == [('m.f', 'f(a)', 'Return a again.')]
