"""What `benchmarks/path.py` begins with: questions, a chat template, and random models of other shapes."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import linen as nn

from mor_jax.config import Config, with_changes
from mor_jax.data import tokenizer as tokenizers
from mor_jax.data.messages import Conversation
from mor_jax.data.questions import EmbeddedQuestions
from mor_jax.interop import huggingface
from mor_jax.model.transformer import Transformer

# ChatML, whose roles and ends are tokens of SmolLM2's vocabulary.
TEMPLATE = (
  "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHAPES = {
  'qwen3': {
    'num_layers': 6,
    'd_model': 64,
    'num_heads': 4,
    'num_kv_heads': 2,
    'head_dim': 32,
    'mlp_dim': 128,
    'qk_norm': True,
    'rope_theta': 1e6,
    'norm_epsilon': 1e-6,
  }
}


def write_template(place: Path) -> Path:
  """The file of the chat template."""
  path = place / 'chatml.jinja'
  path.write_text(TEMPLATE, encoding='utf-8')
  return path


def settings(shape: str | None) -> list[str]:
  """Flags for a MoR of this shape, None: of SmolLM2-135M, as the configs have it."""
  return [f'--config.model.{name}={value}' for name, value in SHAPES[shape].items()] if shape else []


def write(shape: str, tokenizer: Path, folder: Path) -> None:
  """Writes a random model with the tokenizer of another."""
  loaded = tokenizers.Tokenizer.load(tokenizer / 'tokenizer.json')
  sizes = {**SHAPES[shape], 'kind': 'vanilla', 'vocab_size': loaded.vocab_size, 'dtype': 'float32'}
  model = Transformer(with_changes(Config(), model=sizes).model)
  variables = nn.unbox(model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))
  huggingface.save(folder, model, variables, loaded)
  for name in ('tokenizer_config.json', 'generation_config.json'):
    if (tokenizer / name).exists():
      shutil.copy(tokenizer / name, folder / name)


def questions(count: int) -> list[str]:
  """What the embedded conversations ask first, the same number from all of them."""
  asked = [
    next(
      message['content']
      for message in Conversation.from_text(record.text).messages
      if message['role'] == 'user'
    )
    for record in EmbeddedQuestions().records()
  ]
  return asked[:: max(len(asked) // count, 1)][:count]
