"""Servers in processes of their own, for benchmarks, and the engine without one."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from mor_jax.errors import RunError

START_SECONDS = 600.0


class ServerProcess:
  """A server that runs.

  Attributes:
    address: where it answers.
    process: of it.
  """

  def __init__(self, command: Sequence[str], port: int, log: Path):
    """Starts it and waits until /health answers 200.

    Raises:
      RunError: it ended, or was not ready in time.
    """
    self.address = f'http://127.0.0.1:{port}'
    with log.open('wb') as output:
      self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    end = time.monotonic() + START_SECONDS
    while not self._is_ready():
      if self.process.poll() is not None or time.monotonic() > end:
        self.process.kill()
        raise RunError(f'{" ".join(command)} was not ready; it said: {log.read_text()[-2000:]}')
      time.sleep(0.5)

  def _is_ready(self) -> bool:
    with contextlib.suppress(httpx.HTTPError):
      return httpx.get(f'{self.address}/health', timeout=5).status_code == 200
    return False

  @property
  def resident_bytes(self) -> int:
    """Memory of the process."""
    pages = int(Path(f'/proc/{self.process.pid}/statm').read_text().split()[1])
    return pages * os.sysconf('SC_PAGE_SIZE')

  def metric(self, name: str) -> float:
    """The value of one of its Prometheus metrics that has no labels."""
    for line in httpx.get(f'{self.address}/metrics', timeout=60).text.splitlines():
      if line.startswith(f'{name} '):
        return float(line.split()[1])
    raise KeyError(name)


@contextlib.contextmanager
def ours(flags: Sequence[str], folder: Path) -> Iterator[ServerProcess]:
  """`mor_jax.serve` with these flags."""
  port = free_port()
  with _running(
    [sys.executable, '-m', 'mor_jax.serve', *flags, f'--port={port}'], port, folder / 'ours.log'
  ) as server:
    yield server


@contextlib.contextmanager
def of_transformers(checkpoint: str, flags: Sequence[str], folder: Path) -> Iterator[ServerProcess]:
  """`transformers serve` of a checkpoint, in float32 on the CPU."""
  port, program = free_port(), str(Path(sys.executable).with_name('transformers'))
  command = [program, 'serve', checkpoint, '--device=cpu', '--dtype=float32', f'--port={port}', *flags]
  with _running([*command, '--host=127.0.0.1'], port, folder / 'transformers.log') as server:
    yield server


@contextlib.contextmanager
def _running(command: Sequence[str], port: int, log: Path) -> Iterator[ServerProcess]:
  server = ServerProcess(command, port, log)
  try:
    yield server
  finally:
    if server.process.poll() is None:
      server.process.kill()
    server.process.wait()


def free_port() -> int:
  """A port that nobody listens at."""
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


def texts(count: int, characters: int) -> list[str]:
  """Prompts: so many pieces of this project's documents, from different places."""
  whole = '\n'.join(path.read_text() for path in sorted(Path('docs').glob('*.md')))
  step = max((len(whole) - characters) // count, 1)
  return [
    whole[start : start + characters]
    for start in (number * step % (len(whole) - characters) for number in range(count))
  ]


def direct(bodies: Sequence[dict[str, Any]], concurrency: int, served: Any, scheduler: Any) -> dict[str, Any]:
  """The same requests handed to the engine, so many at a time: 'seconds' and 'tokens'."""
  from mor_jax.serving import schemas

  waiting = [request for body in bodies for request in schemas.completion(body, served).requests][::-1]
  running, ended, begin = 0, [], time.perf_counter()
  while waiting or running:
    while waiting and running < concurrency:
      scheduler.submit(waiting.pop())
      running += 1
    finished = scheduler.step()
    running -= len(finished)
    ended += finished
  return {'seconds': time.perf_counter() - begin, 'tokens': sum(len(result.tokens) for result in ended)}
