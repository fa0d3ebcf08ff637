"""A client's job while it runs: what is new of it, as events or until it has ended, and what if the client goes."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from starlette.responses import Response

from mor_jax.serving.answers import Answers
from mor_jax.serving.errors import ApiError
from mor_jax.serving.metrics import Metrics
from mor_jax.serving.schemas import FULL, Wanted
from mor_jax.serving.worker import NOTHING, Job, Told, Worker

# Tokens of a text between two looks at what their recursions said, each of which costs a pass over the whole text.
LOOK_EVERY = 32
Look = Callable[[Wanted, Sequence[Told], Sequence[int]], Awaitable[list[Any] | None]]
"""What was said after each recursion of every text, from the tokens at the last argument on, if it is wanted."""


class Follow:
  """A job, and when it changes, for a coroutine."""

  def __init__(self, worker: Worker, wanted: Wanted, metrics: Metrics):
    loop, self._event = asyncio.get_running_loop(), asyncio.Event()
    self._worker, self._metrics, self._begin = worker, metrics, time.perf_counter()

    def changed() -> None:
      with contextlib.suppress(RuntimeError):  # the loop has ended
        loop.call_soon_threadsafe(self._event.set)

    self.job: Job = worker.submit(wanted.requests, changed)
    self._has_begun = False

  async def changes(self, gone: 'asyncio.Task | None' = None) -> AsyncIterator[None]:
    """Once for whatever is new, until the job has ended or the client is gone."""
    if gone is not None:
      gone.add_done_callback(lambda _: self._event.set())
    while not self.job.is_finished:
      await self._event.wait()
      if gone is not None and gone.done():
        return
      self._event.clear()
      if not self._has_begun and any(one is not NOTHING for one in self.job.told):
        self._has_begun = True
        self._metrics.first_token.observe(time.perf_counter() - self._begin)
      yield

  def end(self) -> None:
    """Frees what the job holds, if it has not ended, and counts it."""
    job, metrics = self.job, self._metrics
    if not job.is_finished:
      self._worker.cancel(job)
      metrics.cancelled.inc()
    metrics.duration.observe(time.perf_counter() - self._begin)
    metrics.prompt_tokens.inc(sum(len(one.prompt) for one in job.requests))
    metrics.completion_tokens.inc(sum(len(one.tokens) for one in job.told))
    metrics.block_passes.inc(sum(sum(one.depths) for one in job.told))

  def raise_error(self) -> None:
    """Raises ApiError if the engine failed."""
    if self.job.error is not None:
      raise ApiError(500, f'the engine failed: {self.job.error}', code='engine_failed')


class EventStream(Response):
  """Server-sent events of a job, until it has ended or the client is gone."""

  def __init__(self, follow: Follow, answers: Answers, wanted: Wanted, look: Look):
    super().__init__(
      media_type='text/event-stream', headers={'Cache-Control': 'no-cache', 'X-Accel-Buffering': 'no'}
    )
    del self.headers['content-length']
    self._follow, self._answers, self._wanted, self._look = follow, answers, wanted, look
    self._looked = [0] * len(wanted.requests)  # tokens

  async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
    """Sends the events."""
    gone = asyncio.create_task(disconnected(receive))
    start = {'type': 'http.response.start', 'status': self.status_code, 'headers': self.raw_headers}
    try:
      await send(start)
      async for _ in self._follow.changes(gone):
        await self._send_pieces(send)
      if not gone.done():
        await self._send_pieces(send)
        await self._send_end(send)
    except OSError:  # the client is gone
      pass
    finally:
      gone.cancel()
      self._follow.end()

  async def _send_pieces(self, send: Any) -> None:
    told = self._follow.job.told
    for piece in self._answers.pieces(told):
      await send({'type': 'http.response.body', 'body': _event(piece), 'more_body': True})
    if self._wanted.depths != FULL:
      return
    new = max(len(one.depths) - looked for one, looked in zip(told, self._looked, strict=True))
    if new >= LOOK_EVERY and (events := await self._new_looks(told)):
      await send({'type': 'http.response.body', 'body': events, 'more_body': True})

  async def _new_looks(self, told: Sequence[Told]) -> bytes:
    """Events with what was said of tokens since the last look."""
    looks = await self._look(self._wanted, told, self._looked)
    if looks is None:
      return b''
    self._looked = [looked + len(look) for looked, look in zip(self._looked, looks, strict=True)]
    return b''.join(map(_event, self._answers.looked(looks)))

  async def _send_end(self, send: Any) -> None:
    events = b''
    try:
      self._follow.raise_error()
      events += await self._new_looks(self._follow.job.told)
    except ApiError as error:
      events += _event(error.body())
    if self._wanted.include_usage:
      events += _event(self._answers.last(self._follow.job.told))
    await send({'type': 'http.response.body', 'body': events + b'data: [DONE]\n\n', 'more_body': False})


def _event(piece: dict[str, Any]) -> bytes:
  return f'data: {json.dumps(piece, ensure_ascii=False)}\n\n'.encode('utf-8', 'backslashreplace')


async def disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
  """Ends when the client is gone."""
  while (await receive())['type'] != 'http.disconnect':
    pass
