"""A training step against Hugging Face Llama in PyTorch: same vanilla model, weights, tokens and optimiser.

  python -m benchmarks.peers [--rounds=9] [--against=eager,compiled] [--layers=14] [--width=384] [--rows=4] [--seq_len=512]
  python -m benchmarks.peers --size=360m                     a shape of configs/ in bfloat16, for a GPU

PyTorch runs with its best settings: one thread per core, `scaled_dot_product_attention`, fused AdamW, batched
clipping, and TensorFloat-32 for the remaining float32 products on a GPU. In bfloat16 it uses autocast with float32
parameters, as we do. "compiled" is torch.compile. Our layers are scanned (the default) or "unrolled"
(model.unroll_layers), which takes longer to compile.

Each side runs in its own process. The sides take turns step by step, so only one is busy at a time. The losses of
the first steps must agree before timing starts. The table shows medians. "Speed" is relative to PyTorch's faster
mode, which is 1: the median over rounds of that mode's time divided by the side's time, with the minimum and the
maximum. FLOPs are those of the model's matrix products, without recomputation and with causal attention as half.
Writes benchmarks/results/peers.json and .md.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from absl import flags
from rich.console import Console
from rich.progress import track

from benchmarks import results, sides, training
from mor_jax import cli
from mor_jax.config import ConfigError
from mor_jax.errors import RunError
from mor_jax.model import flops

FLAGS = flags.FLAGS
flags.DEFINE_integer('rounds', 9, 'steps of every side that are timed')
flags.DEFINE_list('against', ['eager', 'compiled'], 'ways of PyTorch to compare with')
flags.DEFINE_string('side', None, 'internal: be the process of this side')
flags.DEFINE_string('weights', None, 'internal: folder of the weights that all sides begin from')
training.define_flags()

OURS, UNROLLED = 'mor_jax', 'mor_jax, unrolled'
WAYS = ('eager', 'compiled')
CHECKED = 4  # first steps, whose losses are compared; they also warm up
TOLERANCE = {'float32': 1e-4, 'bfloat16': 1e-2}


def main() -> None:
  """Measures all sides in turn, or runs as one of them. Raises ConfigError for invalid flags."""
  if FLAGS.rounds < 1:
    raise ConfigError(f'--rounds={FLAGS.rounds} is not allowed: must be >= 1')
  if unknown := set(FLAGS.against) - set(WAYS):
    raise ConfigError(f'--against={unknown.pop()} is not one of {", ".join(WAYS)}')
  config = training.base_config(kind='vanilla')
  if FLAGS.side:
    sides.serve(_ours if FLAGS.side in (OURS, UNROLLED) else _theirs)
    return
  options = [f'--{name}={FLAGS[name].value}' for name in training.SHAPE_FLAGS if FLAGS[name].present]
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # a GPU's memory is for all sides
  with tempfile.TemporaryDirectory() as folder:
    options += [f'--weights={Path(folder) / "llama"}']
    running = {}
    for name in (OURS, UNROLLED, *FLAGS.against):  # the first writes the weights
      running[name] = sides.Side(['-m', 'benchmarks.peers', f'--side={name}', *options])
    about = {name: side.about for name, side in running.items()}
    turns = [
      {name: side.ask(turn) for name, side in running.items()}
      for turn in track(range(CHECKED + FLAGS.rounds), 'measuring')
    ]
    for side in running.values():
      side.close()
  check_losses(turns[:CHECKED], TOLERANCE[config.model.dtype])
  work = flops.train_flops_per_token(config.model, config.data.seq_len, attention=0.5)
  tokens = config.train.global_batch * config.data.seq_len
  rows = table_rows(turns[CHECKED:], about, tokens, work * tokens)
  used = {name: FLAGS[name].value for name in training.SHAPE_FLAGS if FLAGS[name].value is not None}
  notes = {f'{name}, {key}': value for name, one in about.items() for key, value in one.items() if value}
  settings = {'rounds': FLAGS.rounds, 'step': f'{tokens} tokens', **used, **notes}
  table = results.keep('peers', COLUMNS, rows, settings, turns=turns)
  Console().print(table, highlight=False, soft_wrap=True)


def check_losses(turns: list[dict[str, dict[str, float]]], tolerance: float) -> None:
  """Raises RunError if a side's loss differs from ours in any of these turns."""
  for index, turn in enumerate(turns):
    for name, found in turn.items():
      if not abs(found['loss'] / turn[OURS]['loss'] - 1) <= tolerance:
        raise RunError(
          f'the sides do not train the same model: at step {index + 1} the loss of {name} is {found["loss"]:.6f}, '
          f'ours {turn[OURS]["loss"]:.6f}'
        )


COLUMNS = ('side', 'step, ms', 'least, ms', 'tokens/s', 'speed', 'smallest to largest', 'TFLOP/s', 'MFU')


def table_rows(
  turns: list[dict[str, dict[str, float]]], about: dict[str, dict[str, str]], tokens: int, work: float
) -> list[list[str]]:
  """Rows of the table.

  Args:
    turns: side -> seconds and loss, for every timed turn.
    about: side -> its description of itself.
    tokens: tokens per step.
    work: FLOPs per step.
  """
  taken = {name: [turn[name]['seconds'] for turn in turns] for name in turns[0]}
  medians = {name: statistics.median(seconds) for name, seconds in taken.items()}
  theirs = min((name for name in taken if name in WAYS), key=medians.get, default=OURS)
  rows = []
  for name, seconds in taken.items():
    median = medians[name]
    ratios = [other / own for own, other in zip(seconds, taken[theirs], strict=True)]
    used = training.utilization(work / median, about[OURS]['device'])
    label = f'transformers, {name}' if name in WAYS else name
    rows.append(
      [
        f'{label} ({about[name]["note"]})' if about[name].get('note') else label,
        f'{median * 1e3:,.0f}',
        f'{min(seconds) * 1e3:,.0f}',
        f'{tokens / median:,.0f}',
        f'{statistics.median(ratios):.2f}',
        f'{min(ratios):.2f} to {max(ratios):.2f}',
        f'{work / median / 1e12:.3g}',
        '-' if used is None else f'{used:.0%}',
      ]
    )
  return rows


def _ours() -> tuple[dict[str, str], Callable[[int], dict[str, float]]]:
  import jax
  import numpy as np

  from mor_jax.interop import folders, huggingface, names
  from mor_jax.interop.weights import HeldWeights

  config = training.base_config(kind='vanilla', unroll_layers=FLAGS.side == UNROLLED)
  step = training.TrainingStep(config)
  about = {'device': jax.devices()[0].device_kind, 'threads': str(len(os.sched_getaffinity(0)))}
  if FLAGS.side == OURS:
    form = huggingface.llama_config(config.model, None, np.dtype('float32'))
    held = HeldWeights(config.model, step.state.variables)
    folders.write(FLAGS.weights, names.llama(config.model), held, form, None)

  def answer(turn: int) -> dict[str, float]:
    seconds, loss = step.run(turn)
    return {'seconds': seconds, 'loss': loss}

  return about, answer


def _theirs() -> tuple[dict[str, str], Callable[[int], dict[str, float]]]:
  import torch
  import transformers

  config = training.base_config(kind='vanilla')
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  if device == 'cuda':
    torch.set_float32_matmul_precision('high')
  model = transformers.LlamaForCausalLM.from_pretrained(
    FLAGS.weights, attn_implementation='sdpa', dtype=torch.float32
  ).to(device)
  model.train()
  train = config.train
  matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
  scales = [parameter for parameter in model.parameters() if parameter.ndim == 1]
  groups = [{'params': matrices, 'weight_decay': train.weight_decay}, {'params': scales, 'weight_decay': 0.0}]
  betas = train.beta1, train.beta2
  optimizer = torch.optim.AdamW(
    groups, lr=train.learning_rate, betas=betas, eps=train.adam_epsilon, fused=True
  )

  def loss_of(tokens):
    with torch.autocast(device, torch.bfloat16, enabled=config.model.dtype == 'bfloat16'):
      return model(input_ids=tokens, labels=tokens, use_cache=False).loss

  run, note = loss_of, ''
  if FLAGS.side == 'compiled':
    run, note = _compiled(loss_of, torch.as_tensor(training.random_tokens(config, 0), device=device).long())

  def wait():
    if device == 'cuda':
      torch.cuda.synchronize()

  def answer(turn: int) -> dict[str, float]:
    tokens = torch.as_tensor(training.random_tokens(config, turn), device=device).long()
    wait()
    begin = time.perf_counter()
    loss = run(tokens)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm, foreach=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    wait()
    return {'seconds': time.perf_counter() - begin, 'loss': loss.item()}

  about = {'torch': torch.__version__, 'version': transformers.__version__, 'note': note}
  return about | {
    'attention': model.config._attn_implementation,
    'threads': str(torch.get_num_threads()),
  }, answer


def _compiled(function: Callable, tokens) -> tuple[Callable, str]:
  """(compiled function, ''), or (the function itself, the reason) if torch.compile fails on this machine."""
  import torch

  compiled = torch.compile(function)
  try:
    compiled(tokens).backward()
  except Exception as error:  # compilers fail in many ways
    reason = str(error).strip().splitlines()[0][:100]
    return function, f'eager, since torch.compile fails here: {type(error).__name__}: {reason}'
  return compiled, ''


if __name__ == '__main__':
  cli.run(main, __doc__, with_config=False)
