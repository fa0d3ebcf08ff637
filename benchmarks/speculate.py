"""Self-speculation: tokens per second with drafts of K tokens, over the same engine without them.

  python -m benchmarks.speculate --checkpoints=runs/tiny-mor,RUN,... [--drafts=2,4,6] [--residents=1,4,16]

Every run continues pieces of text, greedily and drawn, with as many sequences resident as --residents says. What is
compared takes turns: ticks, drafts of every length, and `auto`, which chooses call by call. A ratio is that to the mean
of the ticks before and after it; the median over rounds counts. Beside it: the share of drafted tokens that were right,
by place in the draft, tokens that a check gave, and two bounds on the ratio from the layers that were passed:
"passes" counts every token that went through a layer, as if time were arithmetic; "reads" counts every time that a
layer's weights had to be read, by one token or several, as if time were memory. Head and embedding count as
the layers whose size they have. Writes benchmarks/results/speculate.json and .md.
"""

import statistics
import time
from collections.abc import Sequence
from typing import Any

from absl import flags
from rich.console import Console

from benchmarks import results, serving_process
from mor_jax import cli
from mor_jax.cli.engines import AUTO_DRAFT
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.inference.engine import Engine
from mor_jax.inference.requests import Request
from mor_jax.inference.scheduler import Scheduler
from mor_jax.inference.statistics import Statistics
from mor_jax.model import flops
from mor_jax.runs.restore import LoadedRun, load_run

FLAGS = flags.FLAGS
COLUMNS = (
  'run',
  'resident',
  'texts',
  'drafts',
  'tokens/s',
  'ratio to ticks',
  'smallest to largest',
  'right by place',
  'tokens a check',
  'exact by construction',
  'bound, passes',
  'bound, reads',
)


def define_flags() -> None:
  """Defines the flags of this command."""
  flags.DEFINE_list('checkpoints', None, 'run folders')
  flags.DEFINE_list('drafts', ['2', '4', '6'], 'tokens of a draft')
  flags.DEFINE_list('residents', ['1', '4', '16'], 'sequences at a time')
  flags.DEFINE_list('temperatures', ['0', '0.7'], 'of the texts; 0: greedy')
  flags.DEFINE_integer('draft_recursions', 1, 'recursions that write a draft')
  flags.DEFINE_integer('tokens', 96, 'tokens of each text')
  flags.DEFINE_integer('characters', 200, 'length of a prompt')
  flags.DEFINE_integer('max_len', 256, 'longest text in tokens')
  flags.DEFINE_integer('rounds', 5, 'rounds that are timed')


def main() -> int:
  """Measures and writes the table."""
  rows, everything = [], []
  for path in FLAGS.checkpoints:
    run = load_run(path)
    tokenizer = Tokenizer.load(run.folder.tokenizer, run.config.data.separator, run.config.data.begin)
    for resident in map(int, FLAGS.residents):
      for temperature in map(float, FLAGS.temperatures):
        for row, found in _compare(run, tokenizer, resident, temperature):
          print(' | '.join(map(str, row)), flush=True)
          rows.append(row)
          everything.append(found)
  names = 'tokens', 'characters', 'max_len', 'rounds', 'draft_recursions'
  settings = {name: FLAGS[name].value for name in names} | {'dtype': 'float32, caches, too'}
  Console().print(
    results.keep('speculate', COLUMNS, rows, settings, rounds=everything), highlight=False, soft_wrap=True
  )
  return 0


def _compare(run: LoadedRun, tokenizer: Tokenizer, resident: int, temperature: float):
  """A row for each way, and what its rounds found."""
  texts = serving_process.texts(resident, FLAGS.characters)
  prompts = [tuple(tokenizer.encode_text(text))[: FLAGS.max_len - FLAGS.tokens] for text in texts]
  requests = [
    Request(prompt, max_new_tokens=FLAGS.tokens, temperature=temperature, seed=seed)
    for seed, prompt in enumerate(prompts)
  ]
  lengths = [int(length) for length in FLAGS.drafts]
  options = {'slots': resident, 'max_len': FLAGS.max_len, 'draft_recursions': FLAGS.draft_recursions}
  engines = {length: Engine(run.model, run.variables, speculate=length, **options) for length in lengths}
  schedulers = {
    'ticks': Scheduler(engines[lengths[0]], drafting=False),
    **{f'K = {length}': Scheduler(engine, drafting=True) for length, engine in engines.items()},
    'auto': Scheduler(engines.get(AUTO_DRAFT, engines[lengths[0]]), drafting=None),
  }
  answers = {}
  for name, scheduler in schedulers.items():
    answers[name] = [result.tokens for result in scheduler.run(requests)]  # compiles
    if name == 'auto':
      for _ in range(4):
        scheduler.run(requests)  # learns
  measured: dict[str, list[dict[str, Any]]] = {name: [] for name in schedulers}
  for _ in range(FLAGS.rounds):
    before = _measure(schedulers['ticks'], requests)
    for name, scheduler in schedulers.items():
      found = before if name == 'ticks' else _measure(scheduler, requests)
      after = before if name == 'ticks' else _measure(schedulers['ticks'], requests)
      found['ratio'] = 2 * found['speed'] / (before['speed'] + after['speed'])
      measured[name].append(found)
      before = after
  for name, scheduler in schedulers.items():
    found, ratios = measured[name], [one['ratio'] for one in measured[name]]
    stats = scheduler.statistics
    same = sum(a == b for a, b in zip(answers[name], answers['ticks'], strict=True))
    bounds = _bounds(run, stats, int(name[4:])) if name.startswith('K') else ('', '')
    row = (
      run.config.name,
      resident,
      'greedy' if temperature == 0 else f'drawn at {temperature:g}',
      name,
      f'{statistics.median(one["speed"] for one in found):,.1f}',
      f'{statistics.median(ratios):.2f}',
      f'{min(ratios):.2f} to {max(ratios):.2f}',
      ', '.join(f'{share:.2f}' for share in stats.acceptance),
      f'{stats.tokens_per_check:.2f}' if stats.checks else '',
      f'{stats.exact_drafts:.0%}' if stats.checks else '',
      *bounds,
    )
    yield row, {'row': row, 'rounds': found, 'equal_texts': f'{same} of {len(requests)}'}


def _measure(scheduler: Scheduler, requests: Sequence[Request]) -> dict[str, float]:
  """Tokens per second of decoding, prompts not counted."""
  stats = scheduler.statistics
  before, begin = (stats.sampled, stats.prefill_seconds), time.perf_counter()
  scheduler.run(requests)
  seconds = time.perf_counter() - begin - (stats.prefill_seconds - before[1])
  return {'speed': (stats.sampled - before[0]) / seconds, 'seconds': seconds}


def _bounds(run: LoadedRun, stats: Statistics, length: int) -> tuple[str, str]:
  """What the ratio would be if time were passes of layers by tokens, and if it were reads of layers."""
  config = run.config.model
  block = (config.num_layers - 2 * config.unique_ends) / config.recursions
  ends, head = config.unique_ends, config.vocab_size * config.d_model / flops.layer_parameters(config)
  depth = stats.mean_depth
  per_check = stats.tokens_per_check
  plain = 2 * ends + head + depth * block
  draft = (length + 1) * (ends + FLAGS.draft_recursions * block) + length * (ends + head)
  deeper = max(depth - FLAGS.draft_recursions, 0)
  passes = draft + (length + 1) * (deeper * block + ends + head)
  reads = draft + (config.recursions - FLAGS.draft_recursions) * block + ends + head
  return f'{plain * per_check / passes:.2f}', f'{plain * per_check / reads:.2f}'


if __name__ == '__main__':
  define_flags()
  cli.run(main, __doc__, with_config=False)
