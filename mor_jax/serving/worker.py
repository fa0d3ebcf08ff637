"""The one thread that owns the engine. Everybody else hands it jobs, and reads what it tells of them."""

import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any, NamedTuple

from mor_jax.inference.requests import Request, Result
from mor_jax.inference.scheduler import Scheduler
from mor_jax.serving.errors import ApiError

# Seconds from one request to the next, and in all, that an idle engine waits for those that come together.
TOGETHER, MOST_TOGETHER = 0.003, 0.03


class Told(NamedTuple):
  """A result as it was between two calls of the engine; see `requests.Result`."""

  text: str
  tokens: tuple[int, ...]
  depths: tuple[int, ...]
  logprobs: tuple[float | None, ...]
  top_logprobs: tuple[list[tuple[int, float]], ...]
  end_token: int | None
  finish: str


NOTHING = Told('', (), (), (), (), None, '')


@dataclasses.dataclass(eq=False)
class Job:
  """Requests of one client.

  Attributes:
    told: the latest of every request; replaced as a whole by the worker.
    error: why the engine could not answer; None: it could.
    changed: called by the worker whenever there is something new.
  """

  requests: tuple[Request, ...]
  changed: Callable[[], None]
  told: tuple[Told, ...]
  error: Exception | None = None
  results: list[Result] = dataclasses.field(default_factory=list)

  @property
  def is_finished(self) -> bool:
    """Whether nothing more will come."""
    return self.error is not None or all(one.finish for one in self.told)


class Worker(threading.Thread):
  """Runs jobs, first come, first served, until it is stopped.

  Attributes:
    scheduler: whose statistics others may read.
  """

  def __init__(self, scheduler: Scheduler, max_queue: int):
    """Does not start the thread.

    Args:
      max_queue: requests that may wait for a slot.
    """
    super().__init__(name='engine', daemon=True)
    self.scheduler, self._max_queue = scheduler, max_queue
    self._inbox: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    self._lock = threading.Lock()
    self._coming, self._is_draining = 0, False
    self._jobs: list[Job] = []

  @property
  def waiting(self) -> int:
    """Requests that have no slot yet."""
    return self._coming + self.scheduler.waiting

  @property
  def is_draining(self) -> bool:
    """Whether new jobs are refused."""
    return self._is_draining

  @property
  def is_idle(self) -> bool:
    """Whether every job has ended."""
    return not self._coming and not self._jobs

  def submit(self, requests: Sequence[Request], changed: Callable[[], None]) -> Job:
    """Hands over requests, which the engine has checked (`Engine.check`).

    Raises:
      ApiError: 400, they are more than the server can ever take; 429, the queue is full; 503, the server drains.
    """
    room = self._max_queue + self.scheduler.engine.slots
    if len(requests) > room:
      raise ApiError(
        400,
        f'this asks for {len(requests)} texts, and the server takes at most {room} at a time (--max_queue)',
        'n',
      )
    with self._lock:
      if self._is_draining:
        raise ApiError(503, 'the server is shutting down', code='draining', headers={'Retry-After': '5'})
      waiting = self.waiting
      if waiting and waiting + len(requests) > self._max_queue:
        raise ApiError(
          429,
          f'{waiting} requests are waiting, and at most {self._max_queue} may (--max_queue); try again later',
          code='queue_full',
          headers={'Retry-After': '1'},
        )
      self._coming += len(requests)
    job = Job(tuple(requests), changed, (NOTHING,) * len(requests))
    self._inbox.put(('begin', job))
    return job

  def cancel(self, job: Job) -> None:
    """Ends a job, finished or not: its slots are free after the call of the engine that is running."""
    self._inbox.put(('end', job))

  def call(self, function: Callable[[], Any]) -> futures.Future:
    """What a function gives in the engine's thread, between two calls of the engine."""
    future: futures.Future = futures.Future()
    self._inbox.put(('call', (function, future)))
    return future

  def drain(self) -> None:
    """Refuses new jobs; those there are go on."""
    with self._lock:
      self._is_draining = True

  def stop(self) -> None:
    """Ends the thread after what it is doing; jobs that run are left."""
    self._inbox.put(('stop', None))

  # ---- in the thread ----

  def run(self) -> None:
    """Takes jobs and runs the engine, until `stop`.

    What is new is told while the next call runs: whoever is told has work at once, and the thread that has it and this
    one cannot run together.
    """
    while self._take(wait=not self.scheduler.busy):
      if self.scheduler.busy:
        try:
          self.scheduler.step(meanwhile=self._tell)
        except Exception as error:
          logging.exception('the engine failed')
          self._fail(error)
      if not self.scheduler.busy:
        self._tell()

  def _take(self, wait: bool) -> bool:
    """Does what the inbox asks for; False: stop.

    An engine that idles waits for the first request, and a moment for those that come with it: they share passes.
    """
    timeout, end = (None if wait else 0.0), 0.0
    while True:
      try:
        order, what = self._inbox.get(block=timeout != 0.0, timeout=timeout)
      except queue.Empty:
        return True
      if order == 'stop':
        return False
      {'begin': self._begin, 'end': self._end, 'call': self._call}[order](what)
      if timeout is None:
        end = time.monotonic() + MOST_TOGETHER
      timeout = min(TOGETHER, max(end - time.monotonic(), 0.0))

  def _begin(self, job: Job) -> None:
    try:
      job.results = [self.scheduler.submit(request) for request in job.requests]
      self._jobs.append(job)
    except Exception as error:  # what `Engine.check` let pass; the thread must go on
      job.error = error
      job.changed()
    with self._lock:
      self._coming -= len(job.requests)

  def _end(self, job: Job) -> None:
    for result in job.results:
      self.scheduler.cancel(result)
    if job in self._jobs:
      self._jobs.remove(job)

  def _call(self, what: tuple[Callable[[], Any], futures.Future]) -> None:
    function, future = what
    try:
      future.set_result(function())
    except Exception as error:
      future.set_exception(error)

  def _tell(self) -> None:
    for job in list(self._jobs):
      told = tuple(map(_told, job.results, job.told))
      if job.error is not None or any(new is not old for new, old in zip(told, job.told, strict=True)):
        job.told = told
        job.changed()
      if job.is_finished:
        self._jobs.remove(job)

  def _fail(self, error: Exception) -> None:
    """Every job gets the error; the engine begins anew."""
    for job in self._jobs:
      job.error = error
    self.scheduler.reset()


def _told(result: Result, before: Told) -> Told:
  """The result as it is; the former one, if nothing is new."""
  if (len(result.tokens), len(result.depths), result.finish) == (
    len(before.tokens),
    len(before.depths),
    before.finish,
  ):
    return before
  fields = (tuple(getattr(result, name)) for name in ('tokens', 'depths', 'logprobs', 'top_logprobs'))
  return Told(result.text, *fields, result.end_token, result.finish)
