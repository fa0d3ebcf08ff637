"""Generation beside Hugging Face: the vanilla 135m shape, random weights, float32, greedy, at batch 1 and 16.

  python -m benchmarks.decode_huggingface [--rounds=7] [--new_tokens=64]

Each side runs in a process of its own, with as many threads as there are cores; they take turns, and only the one whose
turn it is has work. The first turn of each warms up. "tokens/s" are those of the median turn, prompt included;
"ratio" is the median of the ratios of neighbouring turns, beside the smallest and the largest. Weights differ, which
changes no shape. Writes benchmarks/results/decode_huggingface.json and .md.
"""

import os
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from absl import flags
from rich.console import Console

from benchmarks import results, sides
from mor_jax import cli
from mor_jax.config import ConfigError, with_changes

FLAGS = flags.FLAGS
flags.DEFINE_enum('side', None, ['mor_jax', 'transformers'], 'internal: be the process of this side')
flags.DEFINE_integer('new_tokens', 64, 'tokens that both generate')
flags.DEFINE_integer('rounds', 7, 'turns that are timed')

BATCHES = (1, 16)
PROMPT = 16
VOCABULARY, LAYERS, WIDTH, HEADS, KV_HEADS, HIDDEN = 49152, 30, 576, 9, 3, 1536


def main() -> None:
  """Measures both sides in turn, or is one of them. Raises ConfigError for flags that cannot work."""
  for name in ('rounds', 'new_tokens'):
    if FLAGS[name].value < 1:
      raise ConfigError(f'--{name}={FLAGS[name].value} is not allowed: must be >= 1')
  if FLAGS.side:
    sides.serve(partial(_timed, _ours if FLAGS.side == 'mor_jax' else _theirs))
    return
  options = [f'--new_tokens={FLAGS.new_tokens}']
  running = {
    name: sides.Side(['-m', 'benchmarks.decode_huggingface', f'--side={name}', *options])
    for name in ('mor_jax', 'transformers')
  }
  about = {f'{name} {key}': value for name, side in running.items() for key, value in side.about.items()}
  rows, taken = [], {}
  for size in BATCHES:
    seconds = {name: [] for name in running}
    for turn in range(FLAGS.rounds + 1):
      for name, side in running.items():
        found = side.ask(size)
        if turn:
          seconds[name].append(found)
    taken[size] = seconds
    ours, theirs = seconds.values()
    ratios = [other / one for one, other in zip(ours, theirs, strict=True)]
    speeds = [size * FLAGS.new_tokens / statistics.median(side) for side in (ours, theirs)]
    spread = f'{min(ratios):.2f} to {max(ratios):.2f}'
    rows.append([size, *(f'{speed:,.1f}' for speed in speeds), f'{statistics.median(ratios):.2f}', spread])
  for side in running.values():
    side.close()
  columns = 'batch', 'mor_jax, tokens/s', 'transformers, tokens/s', 'ratio', 'smallest to largest'
  settings = {'new_tokens': FLAGS.new_tokens, 'prompt': PROMPT, 'rounds': FLAGS.rounds, **about}
  table = results.keep('decode_huggingface', columns, rows, settings, seconds=taken)
  Console().print(table, highlight=False, soft_wrap=True)


def _timed(
  prepare: Callable[[], tuple[dict[str, str], Callable[[int], None]]],
) -> tuple[dict[str, str], Callable[[int], float]]:
  """A side that answers the size of a batch with the seconds it took."""
  about, generate = prepare()

  def answer(size: int) -> float:
    begin = time.perf_counter()
    generate(size)
    return time.perf_counter() - begin

  return about, answer


def _prompt() -> np.ndarray:
  return np.random.default_rng(0).integers(0, VOCABULARY, PROMPT)


def _ours() -> tuple[dict[str, str], Callable[[int], None]]:
  import jax

  from mor_jax.config import Config
  from mor_jax.inference.engine import Engine
  from mor_jax.inference.requests import Request
  from mor_jax.inference.scheduler import Scheduler
  from mor_jax.model.transformer import Transformer

  settings = {
    'kind': 'vanilla',
    'num_layers': LAYERS,
    'd_model': WIDTH,
    'num_heads': HEADS,
    'num_kv_heads': KV_HEADS,
    'mlp_dim': HIDDEN,
    'vocab_size': VOCABULARY,
    'dtype': 'float32',
  }
  model = Transformer(with_changes(Config(), model=settings).model)
  variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4), np.int32))
  options = {'max_len': PROMPT + FLAGS.new_tokens, 'chunks': (PROMPT,)}
  engines = {size: Engine(model, variables, slots=size, boundary_lanes=size, **options) for size in BATCHES}
  request = Request(tuple(_prompt().tolist()), max_new_tokens=FLAGS.new_tokens)

  def generate(size: int) -> None:
    found = Scheduler(engines[size], ticks_per_call=FLAGS.new_tokens).run([request] * size)
    assert all(len(result.tokens) == FLAGS.new_tokens for result in found)

  return {'dtype': 'float32', 'threads': str(len(os.sched_getaffinity(0)))}, generate


def _theirs() -> tuple[dict[str, str], Callable[[int], None]]:
  import torch
  import transformers

  threads = len(os.sched_getaffinity(0))
  torch.set_num_threads(threads)
  config = transformers.LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=WIDTH,
    intermediate_size=HIDDEN,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    tie_word_embeddings=True,
    max_position_embeddings=2048,
    bos_token_id=None,
    eos_token_id=None,
  )
  model = transformers.LlamaForCausalLM(config).float().eval()
  tokens = torch.tensor(_prompt())[None]
  count = FLAGS.new_tokens
  options = {'max_new_tokens': count, 'min_new_tokens': count, 'do_sample': False, 'pad_token_id': 0}

  def generate(size: int) -> None:
    batch = tokens.repeat(size, 1)
    with torch.inference_mode():
      found = model.generate(batch, attention_mask=torch.ones_like(batch), **options)
    assert found.shape[1] == PROMPT + count

  about = {'dtype': str(model.dtype).removeprefix('torch.'), 'threads': str(torch.get_num_threads())}
  versions = {'torch': torch.__version__, 'version': transformers.__version__}
  return about | versions, generate


if __name__ == '__main__':
  cli.run(main, __doc__, with_config=False)
