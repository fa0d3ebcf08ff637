"""Models for tests of published folders: those of the tests of decoding, with places that run out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from mor_jax.data.conventions import Conventions
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.interop import names
from mor_jax.interop.published import Texts
from tests import decoding_cases
from tests.decoding_cases import CASES as DECODED
from tests.decoding_cases import EXPERT, Case

LENGTH = 96  # of texts that recursions have places for
SLACK = 0.6  # places per token expected, so that they run out
FAMILIES = {
  'attention_bias': 'all',
  'qk_norm': True,
  'sliding_window': 20,
  'no_rope_layers': (1,),
  'head_dim': 16,
  'rope_scaling': 'yarn',
  'rope_scaling_factor': 4.0,
  'rope_original_length': 32,
}
CASES = DECODED | {
  'families': Case({**EXPERT, **FAMILIES}, seed=2),
  'families shared': Case(
    {**EXPERT, **FAMILIES, 'kv': 'shared', 'attention_bias': 'qkv', 'rope_scaling': 'dynamic'}
  ),
}
CHECKED = (
  'families',
  'families shared',
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
  if name.startswith('families'):  # biases begin at 0, and scales at 1
    noise = np.random.default_rng(0)
    variables = jax.tree_util.tree_map_with_path(
      lambda path, leaf: (
        leaf + 0.1 * noise.normal(size=leaf.shape).astype(np.float32)
        if path[-1].key in ('bias', 'scale')
        else leaf
      ),
      variables,
    )
  return dataclasses.replace(made.config, threshold_slack=SLACK), made, variables


def same(ours: dict, theirs: dict) -> bool:
  """Whether variables are equal, bit for bit."""
  one, other = (dict(names.leaves(tree)) for tree in (ours, theirs))
  assert one.keys() == other.keys()
  return all(
    np.asarray(leaf).tobytes() == np.asarray(other[path]).tobytes() and leaf.dtype == other[path].dtype
    for path, leaf in one.items()
  )
