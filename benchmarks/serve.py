"""Measures the server: python -m benchmarks.serve --checkpoint=RUN [--huggingface=FOLDER] [--parts=load,stall,peer]

Servers, their clients and the engine run in processes of their own, which take turns. Prompts are pieces of this
project's documents; answers have --tokens tokens, up to half as many more or less, greedy, ends ignored. Figures are
medians of --repeats measurements of each side.

  load   streams at each --concurrency, against the same requests handed to the engine without a server
  stall  pieces of 16 streams, alone and while prompts of --max_len tokens arrive one after another
  peer   against `transformers serve`, with and without continuous batching, of the same vanilla weights:
         --huggingface is a Llama checkpoint, which both read; needs pip install 'transformers[serving]'

Writes benchmarks/results/serve_PART.* (--suffix). `benchmarks.serve_faults` has what must hold under faults.
"""

import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from absl import flags

from benchmarks import results, serving_process, sides
from mor_jax import cli, serve
from mor_jax.config import ConfigError
from mor_jax.data.tokenizer import Tokenizer

FLAGS = flags.FLAGS
PARTS = ('load', 'stall', 'peer')
BUSY = 16  # streams in `stall` and `peer`
LOAD_GOAL, STALL_GOAL, PEER_GOAL = 0.95, 2.0, 2.0
NAME = 'measured'
SERVER_FLAGS = (
  'checkpoint',
  'max_len',
  'slots',
  'slack',
  'cache_dtype',
  'max_recursions',
  'prefill_tokens',
  'ticks_per_call',
  'call_seconds',
  'batch_invariant',
  'lanes',
  'boundary_lanes',
  'measure_batches',
)
LATENCIES = ['first piece p50, ms', 'p99, ms', 'between pieces p50, ms', 'p99, ms ']


def define_flags() -> None:
  """Those of the server, which it and the engine are started with, and the benchmark's own."""
  serve.define_flags()
  flags.DEFINE_list('parts', ['load', 'stall'], f'of {", ".join(PARTS)}')
  flags.DEFINE_string('huggingface', None, 'checkpoint for peer')
  flags.DEFINE_list('concurrency', ['1', '4', '16', '64'], 'requests at a time')
  flags.DEFINE_integer('tokens', 64, 'tokens of an answer')
  flags.DEFINE_integer('characters', 400, 'length of a prompt')
  flags.DEFINE_integer('each', 4, 'requests of each client')
  flags.DEFINE_integer('repeats', 3, 'measurements of each side')
  flags.DEFINE_string(
    'suffix', '', 'of the files of results, such as _smollm2 for the figures of another model'
  )
  flags.DEFINE_bool('side', False, 'internal: be the engine without a server')


def main() -> int:
  """Measures the parts; 1 if a goal is missed."""
  if FLAGS.side:
    sides.serve(_engine)
    return 0
  for part in FLAGS.parts:
    if part not in PARTS:
      raise ConfigError(f'--parts={part} is not one of {", ".join(PARTS)}')
  if 'peer' in FLAGS.parts and not FLAGS.huggingface:
    raise ConfigError('--huggingface is missing: the checkpoint that both servers read')
  if FLAGS.parts != ['peer']:
    cli.require_checkpoint()
  client = sides.Side(['-m', 'benchmarks.serving_client'])
  with tempfile.TemporaryDirectory() as folder:
    met = [{'load': load, 'stall': stall, 'peer': peer}[part](client, Path(folder)) for part in FLAGS.parts]
  client.close()
  return 0 if all(met) else 1


def load(client: sides.Side, folder: Path) -> bool:
  """The server against the engine alone."""
  engine = sides.Side(['-m', 'benchmarks.serve', '--side', *_flags()])
  rows, raw, met = [], [], True
  with serving_process.ours(_flags(), folder) as server:
    for concurrency in map(int, FLAGS.concurrency):
      found = _in_turns(
        {
          'server': lambda question: _asked(client, server.address, question),
          'engine': engine.ask,
        },
        lambda number, concurrency=concurrency: {
          'bodies': _bodies(concurrency * FLAGS.each, number),
          'concurrency': concurrency,
        },
      )
      ratio = _median(found['server'], 'speed') / _median(found['engine'], 'speed')
      met &= concurrency != BUSY or ratio >= LOAD_GOAL
      count = concurrency * FLAGS.each
      speeds = [f'{_median(found[side], "speed"):,.1f}' for side in ('server', 'engine')]
      rows.append(
        [
          concurrency,
          f'{statistics.median(count / one["seconds"] for one in found["server"]):.2f}',
          *speeds,
          f'{ratio:.3f}',
          *_latencies(found['server']),
        ]
      )
      raw.append({'concurrency': concurrency, **found})
      print(rows[-1], flush=True)
  engine.close()
  columns = ['at a time', 'requests/s', 'tokens/s', 'engine alone, tokens/s', 'ratio', *LATENCIES]
  print(results.keep(f'serve_load{FLAGS.suffix}', columns, rows, _settings(), measurements=_rounded(raw)))
  return met


def stall(client: sides.Side, folder: Path) -> bool:
  """Streams while long prompts arrive."""
  flags = [flag for flag in _flags() if not flag.startswith('--slots')] + [f'--slots={BUSY + 4}']
  with serving_process.ours(flags, folder) as server:
    most = httpx.get(f'{server.address}/v1/models').json()['data'][0]['max_model_len']
    text = serving_process.texts(1, 20 * most)[0]
    tokens = httpx.post(f'{server.address}/tokenize', json={'prompt': text}).json()['tokens']
    long = {'model': NAME, 'prompt': tokens[: most - 1], 'max_tokens': 1}

    def asked(disturb: Any) -> Callable[[Any], Any]:
      return lambda question: _asked(client, server.address, {**question, 'disturb': disturb})

    found = _in_turns(
      {'alone': asked(None), 'disturbed': asked(long)},
      lambda number: {'bodies': _bodies(BUSY * FLAGS.each, number), 'concurrency': BUSY},
    )
  tails = {side: statistics.median(one['gap_p99'] for one in found[side]) for side in found}
  ratio = tails['disturbed'] / tails['alone']
  rows = [
    [
      name,
      f'{_median(found[side], "speed"):,.1f}',
      *_latencies(found[side]),
      f'{statistics.median(one["disturbances"] for one in found[side]):g}',
    ]
    for side, name in (('alone', '16 streams'), ('disturbed', f'and prompts of {most - 1:,} tokens'))
  ]
  rows.append(['ratio', '', '', '', '', f'{ratio:.2f}', ''])
  columns = ['', 'tokens/s', *LATENCIES, 'long prompts']
  print(
    results.keep(f'serve_stall{FLAGS.suffix}', columns, rows, _settings(), measurements=_rounded([found]))
  )
  return ratio <= STALL_GOAL


def peer(client: sides.Side, folder: Path) -> bool:
  """The server against that of transformers."""
  tokenizer = Tokenizer.load(Path(FLAGS.huggingface) / 'tokenizer.json')
  flags = [flag for flag in _flags() if not flag.startswith('--checkpoint')]
  rows, raw, medians = [], [], {}
  servers = {
    'ours': lambda: serving_process.ours([*flags, f'--checkpoint={FLAGS.huggingface}'], folder),
    'transformers': lambda: serving_process.of_transformers(FLAGS.huggingface, [], folder),
    'transformers, continuous batching': lambda: serving_process.of_transformers(
      FLAGS.huggingface, ['--continuous-batching'], folder
    ),
  }
  found: dict[str, list[dict[str, Any]]] = {name: [] for name in servers}
  for number in range(FLAGS.repeats):
    for name, start in servers.items():
      with start() as server:
        for place in (-1, number):  # the first warms up
          bodies = _bodies(BUSY if place < 0 else BUSY * FLAGS.each, place)
          for body in bodies:
            del body['ignore_eos']  # transformers refuses it
            body['model'] = NAME if name == 'ours' else FLAGS.huggingface
          told = client.ask({'address': server.address, 'bodies': bodies, 'concurrency': BUSY})
      found[name].append(_figures(told, tokenizer))
      print(name, {key: round(value, 3) for key, value in found[name][-1].items()}, flush=True)
  for name, measured in found.items():
    medians[name] = _median(measured, 'speed')
    rows.append(
      [name, f'{medians[name]:,.1f}', f'{medians["ours"] / medians[name]:.2f}', *_latencies(measured)]
    )
    raw.append({'server': name, 'measured': measured})
  print(
    results.keep(
      f'serve_peer{FLAGS.suffix}',
      [f'{BUSY} at a time', 'tokens/s', 'ours, times', *LATENCIES],
      rows,
      _settings(),
      measurements=_rounded(raw),
    )
  )
  return all(medians['ours'] >= PEER_GOAL * value for name, value in medians.items() if name != 'ours')


def _engine() -> tuple[str, Callable[[Any], Any]]:
  """The side without a server."""
  _, served, scheduler = serve.prepare()

  def answer(question: dict[str, Any]) -> dict[str, Any]:
    told = serving_process.direct(question['bodies'], question['concurrency'], served, scheduler)
    return {**told, 'speed': told['tokens'] / told['seconds']}

  return 'ready', answer


def _in_turns(
  asked: dict[str, Callable[[Any], Any]], question: Callable[[int], dict[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
  """Answers of every side by turns, after one each that does not count; every question differs from those before."""
  found: dict[str, list[dict[str, Any]]] = {side: [] for side in asked}
  for number in range(-1, FLAGS.repeats):
    for side, ask in asked.items():
      told = ask(question(number))
      if number >= 0:
        found[side].append(told)
  return found


def _asked(client: sides.Side, address: str, question: dict[str, Any]) -> dict[str, Any]:
  told = client.ask({**question, 'address': address})
  return {**_figures(told), 'disturbances': told['disturbances']}


def _figures(told: dict[str, Any], tokenizer: Tokenizer | None = None) -> dict[str, Any]:
  """What a client saw, in numbers; tokens are counted by the tokenizer if there is one, else as the server says."""
  requests = told['requests']
  tokens = sum(
    len(tokenizer.encode(one['text'])) if tokenizer is not None else one['tokens'] for one in requests
  )
  first = [one['first'] for one in requests if one['first'] is not None]
  gaps = [gap for one in requests for gap in one['gaps']]
  quantiles = {
    f'{name}_p{q}': float(np.percentile(values or [0.0], q))
    for name, values in (('first', first), ('gap', gaps))
    for q in (50, 99)
  }
  return {
    'seconds': told['seconds'],
    'tokens': tokens,
    'speed': tokens / told['seconds'],
    **quantiles,
  }


def _latencies(measured: Sequence[dict[str, Any]]) -> list[str]:
  names = ('first_p50', 'first_p99', 'gap_p50', 'gap_p99')
  return [f'{1e3 * statistics.median(one[name] for one in measured):,.1f}' for name in names]


def _median(measured: Sequence[dict[str, Any]], name: str) -> float:
  return statistics.median(one[name] for one in measured)


def _bodies(count: int, number: int) -> list[dict[str, Any]]:
  """Requests of measurement `number`, whose prompts no other has."""
  texts = serving_process.texts(count, FLAGS.characters)
  common = {'model': NAME, 'temperature': 0.0, 'ignore_eos': True, 'seed': 0}
  return [
    {
      'prompt': f'{number + 1}:{place} {text}',
      'max_tokens': FLAGS.tokens // 2 + place * 37 % FLAGS.tokens,  # of one length, all would end at once
      **common,
    }
    for place, text in enumerate(texts)
  ]


def _flags() -> list[str]:
  """Flags of the server, as they were given to the benchmark."""
  return [
    f'--name={NAME}',
    *(f'--{name}={FLAGS[name].value}' for name in SERVER_FLAGS if FLAGS[name].present),
  ]


def _settings() -> dict[str, Any]:
  return {
    'flags': ' '.join(flag for flag in _flags()[1:] if not flag.startswith('--checkpoint')) or 'defaults',
    'model': Path(FLAGS.checkpoint or FLAGS.huggingface).resolve().name,
    'requests': f'{FLAGS.each} of each client, prompts of {FLAGS.characters} characters, {FLAGS.tokens // 2} to {FLAGS.tokens * 3 // 2} tokens, greedy',
    'figures': f'median of {FLAGS.repeats} measurements in turns, after one that does not count',
  }


def _rounded(raw: Any) -> Any:
  """With four digits, for the file."""
  if isinstance(raw, dict):
    return {name: _rounded(value) for name, value in raw.items()}
  if isinstance(raw, list):
    return [_rounded(value) for value in raw]
  return float(f'{raw:.4g}') if isinstance(raw, float) else raw


if __name__ == '__main__':
  define_flags()
  cli.run(main, __doc__, with_config=False, sections=('parallel',))
