"""What must hold of a server that is treated badly: python -m benchmarks.serve_faults --checkpoint=RUN

Server and clients run in processes of their own. Every part prints what it found, and fails where something is lost:

  vanish     --vanishing clients hang up at random moments, of streams and of whole answers, while others are answered:
             those answers must be those of an idle server, bit for bit (--batch_invariant); afterwards no slot and no
             queue entry may be taken, and the engine answers as before
  malformed  --malformed bodies from hypothesis, half of them fields with wrong values, half arbitrary JSON or bytes:
             every answer is 4xx in OpenAI's form, or 200 where the body happens to be right; none is 500
  sigterm    SIGTERM while 32 requests run or wait: each accepted one is answered whole, later ones are refused with
             503, exit code 0
  memory     --minutes of mixed load: resident memory at the end against that after the first fifth

Writes benchmarks/results/serve_faults.*.
"""

import asyncio
import json
import random
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import hypothesis
from absl import flags
from hypothesis import strategies

from benchmarks import results, serving_process
from benchmarks.serving_process import ServerProcess
from mor_jax import cli, serve
from mor_jax.config import ConfigError

FLAGS = flags.FLAGS
NAME, ROUTE = 'tried', '/v1/completions'
PATIENCE = 300.0
STAYING = 8  # clients that wait for their answers among those that vanish
GROWTH = 16 * 2**20  # bytes that memory may grow between the first fifth and the end
FIELDS = (
  *('model', 'prompt', 'max_tokens', 'temperature', 'top_p', 'top_k', 'min_p', 'repetition_penalty', 'seed'),
  *('presence_penalty', 'frequency_penalty', 'logit_bias', 'n', 'best_of', 'stop', 'stop_token_ids', 'echo'),
  *('ignore_eos', 'logprobs', 'stream', 'stream_options', 'max_recursions', 'threshold_shift', 'depths'),
  *('messages', 'top_logprobs', 'suffix', 'tools', 'response_format'),
)


def define_flags() -> None:
  """Those of the server and the benchmark's own."""
  serve.define_flags()
  flags.DEFINE_list('parts', list(PARTS), f'of {", ".join(PARTS)}')
  flags.DEFINE_integer('vanishing', 500, 'clients that hang up')
  flags.DEFINE_integer('malformed', 5000, 'bodies')
  flags.DEFINE_float('minutes', 10.0, 'of mixed load')


def main() -> int:
  """Tries the parts; 1 if one failed."""
  cli.require_checkpoint()
  for part in FLAGS.parts:
    if part not in PARTS:
      raise ConfigError(f'--parts={part} is not one of {", ".join(PARTS)}')
  rows, failed = [], False
  with tempfile.TemporaryDirectory() as folder:
    for part in FLAGS.parts:
      with serving_process.ours(
        [f'--checkpoint={FLAGS.checkpoint}', f'--name={NAME}', '--batch_invariant'], Path(folder)
      ) as server:
        begin = time.perf_counter()
        faults, said = PARTS[part](server)
      failed |= bool(faults)
      rows.append([part, said, '; '.join(faults) or 'nothing lost', f'{time.perf_counter() - begin:.0f}'])
      print(*rows[-1], sep=': ', flush=True)
  settings = {'model': Path(FLAGS.checkpoint).resolve().name, 'flags of the server': '--batch_invariant'}
  print(results.keep('serve_faults', ['part', 'tried', 'found', 'seconds'], rows, settings))
  return int(failed)


# ---- clients that vanish ----


def vanish(server: ServerProcess) -> tuple[list[str], str]:
  """Clients that hang up, among others."""
  bodies = [_body(number) for number in range(16)]
  with httpx.Client(base_url=server.address, timeout=PATIENCE) as client:
    alone = [_answer(client.post(ROUTE, json=body)) for body in bodies]
  before = server.resident_bytes
  others, answered = asyncio.run(_among_vanishing(server.address, bodies))
  faults = []
  wrong = sum(answer != alone[place] for place, answer in others)
  if wrong:
    faults.append(f'{wrong} of {len(others)} answers differ from those of an idle server')
  end = time.monotonic() + 60
  while (left := _left(server)) != (0, 0) and time.monotonic() < end:
    time.sleep(0.2)
  if left != (0, 0):
    faults.append(f'{left[0]:g} slots are in use and {left[1]:g} requests wait, though nobody is there')
  with httpx.Client(base_url=server.address, timeout=PATIENCE) as client:
    afterwards = [_answer(client.post(ROUTE, json=body)) for body in bodies]
  if afterwards != alone:
    faults.append('answers afterwards differ')
  gone = server.metric('mor_jax_cancelled_total')
  grown = (server.resident_bytes - before) / 2**20
  said = (
    f'{FLAGS.vanishing} clients, {gone:g} of them while they were answered, {answered} earlier or later; '
  )
  said += f'{len(others)} answers to others compared; '
  return faults, f'{said}memory {grown:+.1f} MB'


async def _among_vanishing(address: str, bodies: list[dict[str, Any]]) -> tuple[list[tuple[int, Any]], int]:
  """Answers to those who stay, by place of their body, and how many vanishing ones were never cancelled."""
  rng = random.Random(0)
  limits = httpx.Limits(max_connections=64)
  async with httpx.AsyncClient(base_url=address, timeout=PATIENCE, limits=limits) as client:
    left, others, whole = iter(range(FLAGS.vanishing)), [], 0

    async def vanishing() -> None:
      nonlocal whole
      for number in left:
        body = {**_body(1000 + number), 'stream': number % 2 == 0, 'max_tokens': 100, 'n': 1 + number % 3}
        try:
          await asyncio.wait_for(_read(client, body), rng.expovariate(2.0))
          whole += 1
        except (TimeoutError, httpx.HTTPError):
          continue

    async def staying() -> None:
      while not done.is_set():
        place = rng.randrange(len(bodies))
        others.append((place, _answer(await client.post(ROUTE, json=bodies[place]))))

    done = asyncio.Event()
    others_run = [asyncio.create_task(staying()) for _ in range(STAYING)]
    await asyncio.gather(*(vanishing() for _ in range(24)))
    done.set()
    await asyncio.gather(*others_run)
  return others, whole


async def _read(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
  async with client.stream('POST', ROUTE, json=body) as answer:
    async for _ in answer.aiter_bytes():
      pass


def _left(server: ServerProcess) -> tuple[float, float]:
  return server.metric('mor_jax_slots_in_use'), server.metric('mor_jax_waiting')


# ---- malformed bodies ----

ANYTHING = strategies.recursive(
  strategies.none()
  | strategies.booleans()
  | strategies.integers()
  | strategies.floats()
  | strategies.text(max_size=20),
  lambda inner: (
    strategies.lists(inner, max_size=4)
    | strategies.dictionaries(strategies.text(max_size=8), inner, max_size=4)
  ),
  max_leaves=8,
)
BODIES = strategies.one_of(
  strategies.dictionaries(strategies.sampled_from(FIELDS), ANYTHING, max_size=6).map(json.dumps),
  strategies.dictionaries(strategies.sampled_from(FIELDS), ANYTHING, max_size=3)
  .map(lambda fields: {'model': NAME, 'prompt': 'a', 'max_tokens': 1, **fields})
  .map(json.dumps),
  ANYTHING.map(json.dumps),
  strategies.binary(max_size=200),
)


def malformed(server: ServerProcess) -> tuple[list[str], str]:
  """Bodies that nobody should send."""
  statuses: dict[int, int] = {}
  faults: list[str] = []
  with httpx.Client(base_url=server.address, timeout=PATIENCE) as client:

    @hypothesis.settings(
      max_examples=FLAGS.malformed,
      database=None,
      deadline=None,
      derandomize=True,
      suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(
      BODIES, strategies.sampled_from((ROUTE, '/v1/chat/completions', '/tokenize', '/detokenize'))
    )
    def send(body: str | bytes, route: str) -> None:
      content = body if isinstance(body, bytes) else body.encode('utf-8', 'surrogatepass')
      answer = client.post(route, content=content, headers={'Content-Type': 'application/json'})
      statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
      if answer.status_code == 200:
        return
      is_form = answer.status_code // 100 == 4 and {'message', 'type', 'param', 'code'} <= set(
        answer.json().get('error', {})
      )
      if not is_form and len(faults) < 5:
        faults.append(f'{route} {content!r}: {answer.status_code} {answer.text[:200]}')

    send()
    after = client.post(ROUTE, json=_body(0))
  if after.status_code != 200:
    faults.append(f'afterwards it says {after.status_code} {after.text}')
  counts = ', '.join(f'{count:,} times {status}' for status, count in sorted(statuses.items()))
  return faults, f'{sum(statuses.values()):,} bodies: {counts}'


# ---- SIGTERM ----


def sigterm(server: ServerProcess) -> tuple[list[str], str]:
  """A signal while requests run and wait."""
  answers, late = asyncio.run(_terminated(server))
  faults = []
  whole = sum(answer == 200 for answer in answers)
  if whole != len(answers):
    faults.append(f'{len(answers) - whole} accepted requests without a whole answer: {set(answers)}')
  if any(status not in (503, None) for status in late):
    faults.append(f'requests after the signal: {late}')
  code = server.process.wait(timeout=120)
  if code:
    faults.append(f'exit code {code}')
  return faults, f'{whole} accepted requests answered, {len(late)} later ones refused, exit code {code}'


async def _terminated(server: ServerProcess) -> tuple[list[int | None], list[int | None]]:
  """Statuses of requests that were accepted before the signal, and of those sent after it; None: no answer."""
  async with httpx.AsyncClient(base_url=server.address, timeout=PATIENCE) as client:

    async def ask(body: dict[str, Any], tokens: int) -> int | None:
      try:
        answer = await client.post(ROUTE, json=body)
        if answer.status_code == 200 and answer.json()['usage']['completion_tokens'] != tokens:
          return None
        return answer.status_code
      except httpx.HTTPError:
        return None

    count = 32
    tasks = [
      asyncio.create_task(ask({**_body(number), 'max_tokens': 80, 'ignore_eos': True}, 80))
      for number in range(count)
    ]
    while sum(_left(server)) < count:
      await asyncio.sleep(0.01)
    server.process.send_signal(signal.SIGTERM)
    await asyncio.sleep(0.2)
    late = [await ask(_body(number), 0) for number in range(4)]
    return list(await asyncio.gather(*tasks)), late


# ---- memory ----


def memory(server: ServerProcess) -> tuple[list[str], str]:
  """Resident memory under load."""
  sizes, asked = asyncio.run(_loaded(server))
  early, late = sizes[len(sizes) // 5], max(sizes[-3:])
  text = ', '.join(f'{size / 2**20:,.0f}' for size in sizes[:: max(len(sizes) // 10, 1)])
  faults = [f'memory grew by {(late - early) / 2**20:.1f} MB'] if late - early > GROWTH else []
  return faults, f'{asked:,} requests in {FLAGS.minutes:g} minutes; MB by time: {text}'


async def _loaded(server: ServerProcess) -> tuple[list[int], int]:
  """Memory every few seconds, and how many requests there were."""
  rng, sizes, asked = random.Random(1), [], 0
  end = time.monotonic() + 60 * FLAGS.minutes
  async with httpx.AsyncClient(base_url=server.address, timeout=PATIENCE) as client:

    async def asking() -> None:
      nonlocal asked
      while time.monotonic() < end:
        asked += 1
        kind = rng.randrange(5)
        body = {**_body(rng.randrange(10**6)), 'max_tokens': rng.randrange(1, 60), 'stream': kind == 0}
        body |= (
          {'n': 3} if kind == 1 else {'echo': True} if kind == 2 else {'depths': True} if kind == 3 else {}
        )
        body |= {'prompt': []} if asked % 50 == 0 else {}
        try:
          await asyncio.wait_for(_read(client, body), rng.expovariate(1 / 20) if kind == 4 else PATIENCE)
        except (TimeoutError, httpx.HTTPError):
          continue

    tasks = [asyncio.create_task(asking()) for _ in range(20)]
    while time.monotonic() < end:
      sizes.append(server.resident_bytes)
      await asyncio.sleep(max(0.6 * FLAGS.minutes, 0.2))
    await asyncio.gather(*tasks)
  return sizes, asked


# ---- bodies and answers ----


def _body(number: int) -> dict[str, Any]:
  """A request, sampled, with scores."""
  text = serving_process.texts(1000, 40 + number % 90)[number % 1000]
  return {
    'model': NAME,
    'prompt': text,
    'max_tokens': 24,
    'temperature': 1.0,
    'seed': number,
    'logprobs': number % 6,
  }


def _answer(answer: httpx.Response) -> Any:
  """Of an answer what must not depend on others."""
  assert answer.status_code == 200, answer.text
  return answer.json()['choices']


PARTS: dict[str, Callable[[ServerProcess], tuple[list[str], str]]] = {
  'vanish': vanish,
  'malformed': malformed,
  'sigterm': sigterm,
  'memory': memory,
}

if __name__ == '__main__':
  define_flags()
  cli.run(main, __doc__, with_config=False, sections=('parallel',))
