"""Runs the application with uvicorn: warm-up, ready line, and an orderly end."""

import asyncio
import contextlib
import itertools
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn

from mor_jax.config import ConfigError
from mor_jax.inference.engine import Engine
from mor_jax.inference.requests import Request
from mor_jax.serving.application import Application
from mor_jax.serving.errors import ApiError

WARM_UP_TOKENS = 2
POLL_SECONDS = 0.05


class Server(uvicorn.Server):
  """Uvicorn, which on the first signal drains, and on the second leaves."""

  def __init__(
    self, app: Application, config: uvicorn.Config, drain_seconds: float, report: Callable[[str], None]
  ):
    super().__init__(config)
    self._app, self._drain_seconds, self._report = app, drain_seconds, report
    self._loop: asyncio.AbstractEventLoop | None = None

  async def serve(self, sockets: list[socket.socket] | None = None) -> None:
    """Serves until a signal."""
    self._loop = asyncio.get_running_loop()
    await super().serve(sockets)

  @contextlib.contextmanager
  def capture_signals(self) -> Iterator[None]:
    """Takes SIGINT and SIGTERM, and does not raise them again at the end: they were answered."""
    if threading.current_thread() is not threading.main_thread():
      yield
      return
    before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
      yield
    finally:
      for number, handler in before.items():
        signal.signal(number, handler)

  def handle_exit(self, sig: int, frame: FrameType | None) -> None:
    """A signal: drains; while it does, leaves."""
    if self._app.worker.is_draining or self._loop is None:
      self.force_exit = self.should_exit = True
      return
    self._app.worker.drain()
    self._loop.call_soon_threadsafe(lambda: asyncio.ensure_future(self._drain()))

  async def _drain(self) -> None:
    waiting = self._app.worker.waiting + self._app.worker.scheduler.resident
    self._report(
      f'draining: {waiting} requests may end within {self._drain_seconds:g} s; a second signal leaves at once'
    )
    end = time.monotonic() + self._drain_seconds
    while not self._app.worker.is_idle and time.monotonic() < end:
      await asyncio.sleep(POLL_SECONDS)
    if not self._app.worker.is_idle:
      self.force_exit = True
    self.should_exit = True


def serve(app: Application, host: str, port: int, drain_seconds: float, report: Callable[[str], None]) -> int:
  """Listens, compiles, and answers until a signal. Returns the exit code.

  Raises:
    ConfigError: the address cannot be used.
  """
  try:
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family)
  except (OSError, OverflowError) as error:
    raise ConfigError(f'--host={host} --port={port} cannot be used ({error}); choose another port') from None
  config = uvicorn.Config(app.asgi, log_level='warning', access_log=False, lifespan='off')
  server = Server(app, config, drain_seconds, report)
  app.worker.start()
  address = f'[{host}]' if ':' in host else host
  threading.Thread(
    target=_warm_up, args=(app, f'http://{address}:{listener.getsockname()[1]}', report), daemon=True
  ).start()
  server.run(sockets=[listener])
  app.worker.stop()
  if not server.force_exit:
    app.worker.join(timeout=drain_seconds)
  report('stopped')
  return 0


def _warm_up(app: Application, address: str, report: Callable[[str], None]) -> None:
  """Compiles what requests need, and says that the server is ready."""
  begin, done = time.perf_counter(), threading.Event()
  engine = app.worker.scheduler.engine
  report(f'listening at {address}; compiling')
  app.worker.call(app.worker.scheduler.compile).result()
  for prompts, scored in first_prompts(engine):
    done.clear()
    same = {'max_new_tokens': WARM_UP_TOKENS, 'temperature': 1.0, 'prompt_logprobs': scored}
    try:
      job = app.worker.submit([Request(prompt, **same) for prompt in prompts], done.set)
    except ApiError:
      if app.worker.is_draining:  # a signal came meanwhile
        return
      raise
    while not job.is_finished:
      done.wait(POLL_SECONDS)
  app.is_warm = True
  models = app.name
  report(
    f'ready after {time.perf_counter() - begin:.1f} s: {models} at {address}/v1, {engine.slots} slots of {engine.max_len} tokens'
  )


def first_prompts(engine: Engine) -> Iterator[tuple[list[tuple[int, ...]], bool]]:
  """Prompts to be answered together, and whether they are scored: every program for prompts is used once.

  There is one for every chunk, of a single prompt and of several, of which those to be scored are one program. None begins
  like another, or it would not be computed again; but in the end some are asked for twice, so that they are copied.
  """
  lengths = sorted({max(min(chunk + 1, engine.max_len - WARM_UP_TOKENS), 1) for chunk in engine.chunks})
  numbers = itertools.cycle(range(engine.cached.config.vocab_size))
  for count, scored in ((1, False), (1, True), (min(engine.prefill_lanes, 2), False)):
    for length in lengths:
      prompts = [(next(numbers),) * length for _ in range(count)]
      yield prompts, scored
    yield prompts, scored
