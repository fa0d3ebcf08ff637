"""A client of completion servers that measures: streams of many requests at a time, each event with its time.

Runs as a process of its own (`sides.Side`): python -m benchmarks.serving_client
"""

import asyncio
import itertools
import json
import time
from collections.abc import Sequence
from typing import Any

import httpx

from benchmarks import sides

PATIENCE = 600.0  # seconds


def prepare() -> tuple[str, Any]:
  """For `sides.serve`: questions are {'address', 'bodies', 'concurrency', 'disturb'}."""
  return 'ready', lambda question: asyncio.run(measure(**question))


async def measure(
  address: str, bodies: Sequence[dict[str, Any]], concurrency: int, disturb: dict[str, Any] | None = None
) -> dict[str, Any]:
  """Streams completions, so many at a time.

  Args:
    address: of a server, such as 'http://127.0.0.1:8000'.
    bodies: of /v1/completions; `stream` is added.
    disturb: a body with a prompt of ids, which is sent again and again meanwhile, turned by one token each time, after
      the answer to the one before.

  Returns:
    'seconds' of everything; 'requests' in order, each with 'first' and 'gaps', seconds from sending to the first piece
    with text and between such pieces, 'text', and 'tokens' if the server told them; 'disturbances', how many ended.
  """
  limits = httpx.Limits(max_connections=concurrency + 1, max_keepalive_connections=concurrency + 1)
  async with httpx.AsyncClient(base_url=address, timeout=PATIENCE, limits=limits) as client:
    places, found = iter(range(len(bodies))), [{} for _ in bodies]
    disturbances = 0

    async def one_after_another() -> None:
      for place in places:
        found[place] = await _stream(client, bodies[place])

    async def disturbing() -> None:
      nonlocal disturbances
      while True:
        prompt = disturb['prompt']  # turned, so that no beginning of it is known from before
        turned = prompt[disturbances % len(prompt) :] + prompt[: disturbances % len(prompt)]
        await client.post('/v1/completions', json={**disturb, 'prompt': turned})
        disturbances += 1

    other = asyncio.create_task(disturbing()) if disturb else None
    begin = time.perf_counter()
    await asyncio.gather(*(one_after_another() for _ in range(concurrency)))
    seconds = time.perf_counter() - begin
    if other:
      other.cancel()
  return {'seconds': seconds, 'requests': found, 'disturbances': disturbances}


async def _stream(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
  begin = time.perf_counter()
  times, text, tokens = [], '', None
  body = {**body, 'stream': True, 'stream_options': {'include_usage': True}}
  async with client.stream('POST', '/v1/completions', json=body) as answer:
    if answer.status_code != 200:
      raise RuntimeError(f'{answer.status_code}: {(await answer.aread()).decode()}')
    async for line in answer.aiter_lines():
      if not line.startswith('data: {'):
        continue
      piece = json.loads(line[6:])
      if 'error' in piece:
        raise RuntimeError(str(piece['error']))
      said = ''.join(choice.get('text') or '' for choice in piece.get('choices', ()))
      if said:
        times.append(time.perf_counter())
        text += said
      if piece.get('usage'):
        tokens = piece['usage']['completion_tokens']
  gaps = [after - before for before, after in itertools.pairwise(times)]
  return {'first': times[0] - begin if times else None, 'gaps': gaps, 'text': text, 'tokens': tokens}


if __name__ == '__main__':
  sides.serve(prepare)
