"""Chat templates of several families and a small vocabulary with their special tokens, for tests of conversations."""

import functools
import pathlib

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from mor_jax.data import tokenizer as tokenizers
from mor_jax.data.chats import Chats
from mor_jax.data.messages import Conversation
from mor_jax.data.templates import Template

TEXT = (pathlib.Path(__file__).parent / 'texts' / 'harbour.txt').read_text()
SPECIALS = (
  '<|endoftext|>',
  '<|im_start|>',
  '<|im_end|>',
  '<|begin_of_text|>',
  '<|start_header_id|>',
  '<|end_header_id|>',
  '<|eot_id|>',
  '<s>',
  '</s>',
  '<|user|>',
  '<|system|>',
  '<|assistant|>',
)

CHATML = (
  "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_DEFAULT = (
  "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
  "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
  "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
  "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
  "message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
  '{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}'
  "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
LLAMA2 = (
  "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'].strip() "
  "+ ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}"
  '{% endif %}{% endfor %}'
)
GENERATION = (
  "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
  "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
  "{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
  'chatml': CHATML,
  'chatml with a default system message': CHATML_DEFAULT,
  'llama 3': LLAMA3,
  'zephyr': ZEPHYR,
  'llama 2': LLAMA2,
  'generation': GENERATION,
}
TOKENS = {'bos_token': '<|begin_of_text|>', 'eos_token': '</s>'}

CONVERSATION = [
  {'role': 'user', 'content': 'Where do the boats lie?'},
  {'role': 'assistant', 'content': 'In the harbour, behind the wall.'},
  {'role': 'user', 'content': 'And  at night?\n\nTell me more.'},
  {'role': 'assistant', 'content': 'There, too; nobody sails.\n\nThe gulls sleep — on “ropes”.'},
]
SYSTEM = {'role': 'system', 'content': 'Be brief.'}


@functools.cache
def backend() -> Tokenizer:
  """A byte-level vocabulary as GPT-2 and SmolLM2 have it, with the special tokens of all templates here."""
  made = Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  made.post_processor = processors.ByteLevel(trim_offsets=True)
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
  made.train_from_iterator([TEXT], trainer)
  made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
  return made


@functools.cache
def tokenizer() -> tokenizers.Tokenizer:
  """It as ours."""
  return tokenizers.Tokenizer(backend())


def chats(source: str) -> Chats:
  """A template with that vocabulary."""
  return Chats(Template(source, TOKENS), tokenizer())


def said(source: str, conversation: list[dict], first: int = 0) -> list[str]:
  """What a template's mask says that the assistant says."""
  found = chats(source).render(Conversation(conversation, first))
  return [found.text[begin:end] for begin, end in found.learned]
