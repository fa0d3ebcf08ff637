"""Imports and exports a real model: python -m benchmarks.interop --model=SMOLLM2 --corpus='FOLDER/*.txt'

Compares our model with `transformers`: the logits of 20 paragraphs, and 50 greedily decoded tokens after each
of three prompts. Exports the model, opens the export with `transformers` and compares again. Measures the peak
memory of both conversions, each in its own process. Needs requirements-parity.txt. Writes
benchmarks/results/interop.*.
"""

import glob
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import results
from mor_jax import cli
from mor_jax.config import ConfigError
from mor_jax.inference.text import complete
from mor_jax.interop import huggingface
from mor_jax.model.transformer import Transformer

FLAGS = flags.FLAGS
flags.DEFINE_string('model', None, 'folder of a Llama checkpoint')
flags.DEFINE_string('corpus', None, 'text files, by pattern')
flags.DEFINE_integer('paragraphs', 20, 'texts whose logits are compared')
flags.DEFINE_integer('tokens', 50, 'tokens that are generated')
flags.DEFINE_integer('prompts', 3, 'texts that are continued')

LARGEST_DIFFERENCE = 2e-3
LENGTH = 128  # most tokens of a paragraph


def main() -> int:
  """Compares, measures and writes the table; returns 1 if a goal is missed."""
  import torch
  import transformers

  if not FLAGS.model or not FLAGS.corpus:
    raise ConfigError('--model and --corpus are needed (--help shows an example)')
  model, variables, tokenizer = huggingface.load(FLAGS.model)
  model = Transformer(model.config.__class__(**{**vars(model.config), 'dtype': 'float32'}))
  variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), variables)
  texts = paragraphs(FLAGS.paragraphs)
  rows, worst, same_argmax, same_text = [], 0.0, True, True
  with tempfile.TemporaryDirectory() as folder:
    run, copy = Path(folder) / 'run', Path(folder) / 'copy'
    memory = {'in': convert(FLAGS.model, run), 'out': convert(run, copy)}
    apply = jax.jit(model.apply)
    for name, path in (('original', FLAGS.model), ('export', copy)):
      theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
      differences, agreed, counted = [], 0, 0
      for text in texts:
        ids = tokenizer.encode(text)[:LENGTH]
        padded = jnp.array([ids + [0] * (LENGTH - len(ids))], jnp.int32)
        ours = np.asarray(apply(variables, padded).logits)[0, : len(ids)]
        with torch.no_grad():
          expected = theirs(torch.tensor([ids])).logits[0].numpy()
        differences.append(float(np.abs(ours - expected).max()))
        agreed += int((ours.argmax(-1) == expected.argmax(-1)).sum())
        counted += len(ids)
      greedy = sum(
        continues_alike(model, variables, tokenizer, theirs, text) for text in texts[: FLAGS.prompts]
      )
      rows.append(
        [
          name,
          len(texts),
          counted,
          f'{max(differences):.1e}',
          f'{agreed}/{counted}',
          f'{greedy}/{FLAGS.prompts}',
        ]
      )
      worst, same_argmax = max(worst, *differences), same_argmax and agreed == counted
      same_text = same_text and greedy == FLAGS.prompts
      del theirs
    sizes = {
      name: max(f.stat().st_size for f in Path(p).glob('*.safetensors'))
      for name, p in (('in', FLAGS.model), ('out', copy))
    }
  columns = [
    'transformers opens',
    'paragraphs',
    'tokens',
    'largest difference',
    'same argmax',
    f'same {FLAGS.tokens} tokens',
  ]
  conversions = {
    f'conversion {way}': (
      f'{memory[way]["peak"] / 1e6:,.0f} MB at most, {memory[way]["seconds"]:.1f} s; largest shard '
      f'{sizes[way] / 1e6:,.0f} MB, allowed {(1.3 * sizes[way] + 5e8) / 1e6:,.0f} MB'
    )
    for way in ('in', 'out')
  }
  print(
    results.keep(
      'interop', columns, rows, {'model': Path(FLAGS.model).name, 'dtype': 'float32', **conversions}
    )
  )
  fits = all(memory[way]['peak'] < 1.3 * sizes[way] + 5e8 for way in memory)
  return 0 if worst < LARGEST_DIFFERENCE and same_argmax and same_text and fits else 1


def paragraphs(count: int) -> list[str]:
  """`count` paragraphs of at least 200 characters, spread over as many files as possible."""
  files = sorted(glob.glob(FLAGS.corpus))
  if not files:
    raise ConfigError(f'--corpus={FLAGS.corpus} matches no file')
  found: list[str] = []
  for turn in range(1, count + 1):
    for path in files[:: max(1, len(files) // count)]:
      long = [part for part in Path(path).read_text().split('\n\n') if len(part) >= 200]
      if len(long) >= turn and len(found) < count:
        found.append(long[turn - 1])
  return found


def continues_alike(model: Any, variables: Any, tokenizer: Any, theirs: Any, text: str) -> bool:
  """Whether both models continue the beginning of a text with the same tokens."""
  import torch

  prompt = tokenizer.decode(tokenizer.encode(text)[:16])
  ours = complete(model, variables, tokenizer, prompt, FLAGS.tokens, 0.0, 0)
  ids = torch.tensor([tokenizer.encode(prompt)])
  made = theirs.generate(ids, max_new_tokens=FLAGS.tokens, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
  made = made.tolist()
  if tokenizer.end_of_text in made:
    made = made[: made.index(tokenizer.end_of_text)]
  return ours == tokenizer.decode(made)


def convert(source: str | Path, output: Path) -> dict[str, float]:
  """Runs a conversion in its own process; returns its peak memory in bytes and its time in seconds."""
  command = [sys.executable, '-m', 'mor_jax.convert', f'--checkpoint={source}', f'--output={output}']
  begin = time.perf_counter()
  measured = (
    'import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); '
    'print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)'
  )
  peak = subprocess.run(
    [sys.executable, '-c', measured, *command], check=True, capture_output=True, text=True
  ).stdout
  unit = 1 if sys.platform == 'darwin' else 1024
  return {'peak': int(peak) * unit, 'seconds': time.perf_counter() - begin}


if __name__ == '__main__':
  cli.run(main, __doc__, with_config=False)
