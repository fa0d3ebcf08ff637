"""What is refused: records that are no conversations, templates that do what they must not, settings that contradict."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mor_jax.config import Config, ConfigError, DataConfig, with_changes
from mor_jax.data import (
  corpus,
  dataset,
  messages,
)
from mor_jax.data.document import Unreadable
from mor_jax.data.templates import RefusedError, Template
from tests import chat_rows, chats


@pytest.fixture
def data(tmp_path):
  return chat_rows.settings(tmp_path)


USER, ASSISTANT = {'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}


@pytest.mark.parametrize(
  ('record', 'why'),
  [
    ([USER, ASSISTANT], 'not an object'),
    ({'text': 'a'}, 'none of messages, or prompt and completion, or conversations (it has text)'),
    ({'prompt': 'a'}, 'none of messages'),
    ({'messages': 'a'}, 'not a list of messages'),
    ({'messages': ['a']}, 'message 1 is no object'),
    ({'messages': [USER, ASSISTANT], 'prompt': 'a', 'completion': 'b'}, 'of which only one may be there'),
    ({'prompt': 'a', 'completion': [ASSISTANT]}, 'neither two texts nor two lists'),
    ({'messages': [USER, ASSISTANT], 'tools': [{}]}, "'tools' beside messages"),
    ({'messages': [USER]}, 'the assistant says nothing'),
    ({'prompt': [USER, ASSISTANT], 'completion': [USER]}, 'the assistant says nothing'),
    ({'messages': [USER, USER, ASSISTANT]}, 'roles out of order: message 2 is of user after user'),
    ({'messages': [ASSISTANT]}, 'roles out of order: message 1 is of assistant at the beginning'),
    ({'messages': [USER, chats.SYSTEM, ASSISTANT]}, 'roles out of order: message 2 is of system after user'),
    ({'messages': [USER, {'role': 'assistant'}]}, 'message 2 (assistant) has no content'),
    ({'messages': [USER, {**ASSISTANT, 'content': ' \n'}]}, 'message 2 (assistant) has no content'),
    ({'messages': [{**USER, 'content': ['a']}, ASSISTANT]}, 'message 1 (user) has no content'),
    ({'messages': [{**USER, 'weight': 1}, ASSISTANT]}, "unknown key 'weight' beside role and content"),
    ({'messages': [{'role': 'human', 'content': 'a'}]}, "role='human', which is not one of"),
    ({'conversations': [{'from': 'bot', 'value': 'a'}]}, "from='bot', which is not one of"),
    ({'messages': [{**USER, 'content': '\ud800'}, ASSISTANT]}, 'not UTF-8'),
  ],
)
def test_records_that_are_no_conversations_say_why(record, why):
  found = messages.of_record('line 1', record)
  assert isinstance(found, Unreadable)
  assert why in found.reason


def test_bad_rows_are_skipped_up_to_their_share(data, tmp_path):
  path = tmp_path / 'chats.jsonl'
  path.write_text(path.read_text() + json.dumps({'messages': [USER]}) + '\n')
  with pytest.raises(ConfigError, match=r'chats\.jsonl, line 201: the assistant says nothing') as refused:
    dataset.prepare(dataclasses.replace(data, max_bad_fraction=0.0))
  assert '\n' not in str(refused.value)
  assert [path.name for path in Path(data.cache_dir, 'datasets').iterdir() if path.is_dir()] == []
  prepared = dataset.prepare(dataclasses.replace(data, max_bad_fraction=0.01))
  assert prepared.manifest.dropped == {'the assistant says nothing': 1}


HOSTILE = {
  'raises': ("{{ raise_exception('roles must alternate') }}", 'refuses these messages: roles must alternate'),
  'reaches': ('{{ messages.__class__.__mro__[1].__subclasses__() }}', 'does what it must not'),
  'reaches by a filter': ("{{ (messages | attr('__class__')).mro() }}", 'does what it must not'),
  'writes': ("{% set x = messages.append('a') %}", 'does what it must not'),
  'loops': (
    '{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}',
    'loops more than 200,000 times',
  ),
  'loops in a condition': (
    '{% for a in range(9999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}',
    'loops more than',
  ),
  'calls itself': ('{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}', 'refuses these messages'),
  'grows': (
    "{% set n = namespace(s='abcdefgh') %}{% for a in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    'makes more than',
  ),
  'grows by ~': (
    "{% set n = namespace(s='abcdefgh') %}{% for a in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    'makes more than',
  ),
  'grows by blocks': (
    "{% set n = namespace(s='abcdefgh') %}{% for a in range(60) %}{% set t %}{{ n.s }}{{ n.s }}{% endset %}"
    '{% set n.s = t %}{% endfor %}',
    'makes more than',
  ),
  'multiplies': ("{{ 'a' * 9999999999 }}", 'asks for 9999999999 copies'),
  'pads': ("{{ 'a'.ljust(9999999999) }}", 'asks for 9999999999 copies'),
  'pads by a filter': ("{{ 'a' | center(9999999999) }}", 'asks for 9999999999 copies'),
  'pads by a format': ("{{ '%9999999999d' % 1 }}", 'formats with more than'),
  'pads by a method': ("{{ '{:>9999999999}'.format('a') }}", 'formats with more than'),
  'pads by the filter format': ("{{ '%9999999999d' | format(1) }}", 'formats with more than'),
  'pads by an argument': ("{{ '%*d' % (9999999999, 1) }}", 'formats with more than'),
  'powers': ('{{ 10 ** 10 ** 10 }}', 'raises numbers to powers'),
  'squares': (
    '{% set n = namespace(s=9) %}{% for a in range(60) %}{% set n.s = n.s * n.s %}{% endfor %}',
    'counts beyond',
  ),
  'divides by zero': ('{{ 1 // 0 }}', 'refuses these messages'),
}


@pytest.mark.parametrize('source', [chats.LLAMA2, chats.LLAMA3])
def test_messages_may_look_like_formats(source):
  """What is counted is what templates do, not what messages say."""
  answer = 'as "%99999d %", {x:99999} and {"id": 1234567}'
  conversation = [{'role': 'user', 'content': answer}, {'role': 'assistant', 'content': answer}]
  assert chats.said(source, conversation)[0].startswith(answer)


@pytest.mark.parametrize('name', HOSTILE)
def test_templates_are_in_a_sandbox_with_an_end(name):
  source, message = HOSTILE[name]
  with pytest.raises(RefusedError, match=re.escape(message)):
    Template(source, {}).render([USER])


def test_templates_that_are_none_are_refused(data, tmp_path):
  (tmp_path / 'bad.jinja').write_text('{% for')
  for changes, message in (
    (
      {'chat_template': str(tmp_path / 'bad.jinja')},
      r'data\.chat_template=\S+bad\.jinja cannot be used: the chat',
    ),
    ({'chat_template': '/nowhere'}, r'data\.chat_template=/nowhere cannot be used'),
    (
      {'chat_template': None},
      r'data\.format=chat needs a chat template, and data\.tokenizer=bytes came with none',
    ),
  ):
    with pytest.raises(ConfigError, match=message):
      dataset.prepare(dataclasses.replace(data, **changes))


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'too_long': 'skip'}, r'data\.too_long=skip is for conversations: set data\.format=chat'),
    ({'chat_template': 'x'}, r'data\.chat_template=x is for conversations'),
    ({'format': 'chat', 'text_key': 'x'}, r'data\.text_key=x is for data\.format=text'),
    ({'format': 'chat', 'source': 'synthetic:chase'}, r'data\.source=synthetic:chase makes no conversations'),
    ({'format': 'chats'}, r"data\.format='chats' is not one of text, chat"),
  ],
)
def test_settings_that_do_not_go_together(changes, message):
  with pytest.raises(ConfigError, match=message):
    with_changes(Config(), data=changes)


def test_texts_and_tfds_hold_no_conversations(tmp_path):
  (tmp_path / 'a.txt').write_text('a')
  for source, message in (
    (f'files:{tmp_path}/a.txt', r'a\.txt is a text'),
    ('tfds:a/b/c', 'conversations come from'),
  ):
    data = DataConfig(format='chat', source=source)
    with pytest.raises(ConfigError, match=message):
      list(corpus.Reading(data))


def test_texts_need_no_jinja2_and_conversations_say_that_they_do():
  program = """
import sys
sys.modules['jinja2'] = None
import mor_jax.evaluate, mor_jax.generate, mor_jax.prepare, mor_jax.train
from mor_jax.config import ConfigError, DataConfig
from mor_jax.data import conversations
try:
  conversations.find_template(DataConfig(format='chat'))
except ConfigError as error:
  print(error)
"""
  done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=True)
  assert done.stdout == "data.format=chat needs the package jinja2; run: pip install 'mor_jax[chat]'\n"


# ---- where templates are found ----


def test_the_template_comes_with_the_tokenizer(data, tmp_path):
  folder = tmp_path / 'model'
  folder.mkdir()
  chats.backend().save(str(folder / 'tokenizer.json'))
  (folder / 'tokenizer_config.json').write_text(
    json.dumps({'eos_token': {'content': '</s>'}, 'chat_template': chats.ZEPHYR})
  )
  named = dataclasses.replace(data, tokenizer=str(folder), chat_template=None, seq_len=32)
  prepared = dataset.prepare(named)
  assert prepared.manifest.chat['template'] == chats.ZEPHYR
  assert prepared.manifest.chat['ends'] == [chats.tokenizer().token_to_id('</s>')]
  (folder / 'chat_template.jinja').write_text(chats.CHATML)
  assert dataset.prepare(named).manifest.chat['template'] == chats.CHATML
  borrowed = dataclasses.replace(data, chat_template=str(folder))
  assert dataset.prepare(borrowed).manifest.chat['template'] == chats.CHATML
