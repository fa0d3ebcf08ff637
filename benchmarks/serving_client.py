"""A client of completion servers that measures: streams of many requests at a time, each event with its time.

Runs as a process of its own (`sides.Side`): python -m benchmarks.serving_client
"""

import asyncio
import itertools
import json
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import sides


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
  port = int(address.rpartition(':')[2])
  places, found = iter(range(len(bodies))), [{} for _ in bodies]
  disturbances = 0

  async def one_after_another() -> None:
    for place in places:
      found[place] = await _stream(port, bodies[place])

  async def disturbing() -> None:
    nonlocal disturbances
    while True:
      prompt = disturb['prompt']  # turned, so that no beginning of it is known from before
      turned = prompt[disturbances % len(prompt) :] + prompt[: disturbances % len(prompt)]
      await _stream(port, {**disturb, 'prompt': turned})
      disturbances += 1

  other = asyncio.create_task(disturbing()) if disturb else None
  begin = time.perf_counter()
  await asyncio.gather(*(one_after_another() for _ in range(concurrency)))
  seconds = time.perf_counter() - begin
  if other:
    other.cancel()
  return {'seconds': seconds, 'requests': found, 'disturbances': disturbances}


async def _stream(port: int, body: dict[str, Any]) -> dict[str, Any]:
  """Asks by HTTP/1.0, whose answers need no decoding: a client's own work is taken from the server's two cores."""
  begin = time.perf_counter()
  content = json.dumps({**body, 'stream': True, 'stream_options': {'include_usage': True}}).encode()
  head = f'POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n'
  reader, writer = await asyncio.open_connection('127.0.0.1', port)
  writer.write(head.encode() + content)
  status, lines = await reader.readline(), []
  while line := await reader.readline():
    lines.append((time.perf_counter(), line))
  writer.close()
  if b' 200 ' not in status:
    raise RuntimeError(b''.join([status, *(line for _, line in lines)]).decode())
  times, text, tokens = [], '', None
  for moment, line in lines:
    if not line.startswith(b'data: {'):
      continue
    piece = json.loads(line[6:])
    if 'error' in piece:
      raise RuntimeError(str(piece['error']))
    if said := ''.join(choice.get('text') or '' for choice in piece.get('choices', ())):
      times.append(moment)
      text += said
    if piece.get('usage'):
      tokens = piece['usage']['completion_tokens']
  gaps = [after - before for before, after in itertools.pairwise(times)]
  return {'first': times[0] - begin if times else None, 'gaps': gaps, 'text': text, 'tokens': tokens}


if __name__ == '__main__':
  sides.serve(prepare)
