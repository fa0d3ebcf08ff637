"""Sampled text: greedy decoding against forward passes done by hand, seeds, end of text, bad input."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from mor_jax.data import tokenizer as tokenizers
from mor_jax.inference import sampling


@pytest.fixture(scope='module')
def tokenizer():
  return tokenizers.build(tiny_run.CONFIG.data)


def sample(tokenizer, prompt='Go', num_tokens=6, **options):
  run = tiny_run.run()
  options = {'temperature': 1.0, 'seed': 3, **options}
  return sampling.sample_text(run.model, run.initial().variables, tokenizer, prompt, num_tokens, **options)


def test_greedy_text_is_what_full_forward_passes_predict(tokenizer):
  run = tiny_run.run()
  tokens = tokenizer.encode('Go')
  for _ in range(6):
    row = np.full((1, 8), tokenizer.end_of_text)
    row[0, : len(tokens)] = tokens
    written = jnp.asarray(np.arange(8) < len(tokens), jnp.int32)[None]
    output = run.model.apply(run.initial().variables, row, routing='threshold', segment_ids=written)
    tokens.append(int(output.logits[0, len(tokens) - 1].argmax()))
  assert sample(tokenizer, temperature=0.0) == tokenizer.decode(tokens[2:])


def test_seeds_decide_the_text(tokenizer):
  first = sample(tokenizer)
  assert first == sample(tokenizer)
  assert first != sample(tokenizer, seed=4)


def test_text_stops_at_end_of_text(tokenizer, monkeypatch):
  ended = jnp.array([[71, 111, 33, tokenizer.end_of_text, 34, 35]])
  monkeypatch.setattr(sampling, '_continue', lambda *_: ended)
  assert sample(tokenizer) == '!'


@pytest.mark.parametrize(
  ('options', 'message'), [({'prompt': ''}, 'prompt is empty'), ({'temperature': -0.1}, 'must be >= 0')]
)
def test_bad_input_is_refused(tokenizer, options, message):
  with pytest.raises(ValueError, match=message):
    sample(tokenizer, **options)
