"""Schedules requests on the engine's slots: queue, admission, cancellation and stop strings."""

import collections
import time
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np

from mor_jax.data.tokenizer import Tokenizer
from mor_jax.inference.calls import CallLength
from mor_jax.inference.continuation import Continuation
from mor_jax.inference.engine import Engine
from mor_jax.inference.pace import Pace
from mor_jax.inference.prefixes import Prefixes
from mor_jax.inference.prompts import Prompts
from mor_jax.inference.requests import Request, RequestError, Result
from mor_jax.inference.scores import Scores
from mor_jax.inference.state import IDLE
from mor_jax.inference.statistics import Statistics

STOP_TICKS = 32  # at most, of a call with texts that a stop string may end


class Scheduler:
  """Runs requests on an engine; first come, first served."""

  def __init__(
    self,
    engine: Engine,
    tokenizer: Tokenizer | None = None,
    ticks_per_call: int = 64,
    prefill_tokens: int | None = None,
    drafting: bool | None = None,
    call_seconds: float | None = None,
  ):
    """Starts with all slots free.

    Args:
      engine: runs the requests.
      tokenizer: decodes the text of results; required for stop strings.
      ticks_per_call: maximum ticks per call of the engine. Fewer show text sooner; more reduce host overhead.
      prefill_tokens: tokens of prompts that are computed between two calls, or a chunk if that has more, so that a
        long prompt does not stall those who are being answered; None: all there are.
      drafting: whether calls draft (`speculation`), if the engine is made for it; None: those which are faster so
        (`pace`).
      call_seconds: fewer ticks are made in a call where so many would take longer than this; None: never.
    """
    self.engine = engine
    batches = engine.batches
    self.statistics = Statistics(engine.slots, batches.block * engine.parts, batches.boundary)
    self._tokenizer = tokenizer
    self._length = CallLength(ticks_per_call, call_seconds)
    self._state = engine.init_state()
    self._queue: collections.deque[Result] = collections.deque()
    self._resident: dict[int, Result] = {}
    self._texts: dict[Result, Continuation] = {}
    self._prompts, self._prefill_tokens = Prompts(engine), prefill_tokens
    self._prefixes = Prefixes(engine)
    self._drafting, self._pace = drafting, Pace()

  # ---- requests ----

  def compile(self) -> None:
    """Compiles every program of the engine that calls may take, while nobody is resident."""
    lanes = self.engine.draft_lanes if self.engine.speculate and self._drafting is not False else ()
    for drafts_for in (0, *lanes):
      self._state, _ = self.engine.generate(self._state, 1, drafts_for=drafts_for)

  def submit(self, request: Request) -> Result:
    """Queues a request and returns its result, which grows during generation.

    Raises:
      RequestError: the request is invalid for this engine.
    """
    self.engine.check(request)
    if request.stop_strings and self._tokenizer is None:
      raise RequestError('stop_strings need a tokenizer; without one use stop_tokens')
    result = Result(request, submitted=time.perf_counter())
    self._queue.append(result)
    return result

  def cancel(self, result: Result) -> None:
    """Cancels a queued or running request; its result keeps the tokens generated so far."""
    if result.finish:
      return
    if result in self._queue:
      self._queue.remove(result)
    for slot, other in list(self._resident.items()):
      if other is result:
        self._free(slot)
    self._prompts.cancel(result)
    self._finish(result, 'cancelled')

  def reset(self) -> None:
    """Cancels everything and begins with an empty engine, as after an error that left its state unusable."""
    for result in [*self._resident.values(), *self._prompts.clear(), *self._queue]:
      self._finish(result, 'cancelled')
    self._resident.clear()
    self._queue.clear()
    self._prefixes.clear()
    self._state = self.engine.init_state()

  @property
  def prompt_tokens(self) -> tuple[int, int]:
    """Tokens of prompts so far, and how many of them were copied from sequences that begin alike."""
    return self._prompts.tokens, self._prompts.reused

  @property
  def waiting(self) -> int:
    """Requests that have no slot yet."""
    return len(self._queue)

  @property
  def resident(self) -> int:
    """Requests that have a slot."""
    return len(self._resident) + len(self._prompts.entries)

  @property
  def busy(self) -> bool:
    """Whether any request is queued or running."""
    return bool(self._queue or self._resident or self._prompts.entries)

  def run(self, requests: Iterable[Request]) -> list[Result]:
    """Runs the requests to completion; returns their results in order."""
    results = [self.submit(request) for request in requests]
    while self.busy:
      self.step()
    return results

  def stream(self, request: Request) -> Iterator[Result]:
    """Yields the result of a request repeatedly as it grows."""
    result = self.submit(request)
    while not result.finish:
      self.step()
      yield result

  def step(self, meanwhile: Callable[[], None] = lambda: None) -> list[Result]:
    """Admits queued requests, runs one engine call and returns the results that have finished.

    Args:
      meanwhile: called while the device works, or would work: results are still as the last call left them.
    """
    begin = time.perf_counter()
    self._admit()
    ended = []
    if self._resident:
      # With somebody waiting for a slot, the first that is free counts; but several parts of a mesh, which do
      # not know of each other, would wait for the last of them.
      max_finished = 1 if self._queue and self.engine.parts == 1 else None
      drafts_for, called, resident = self._drafts_for(), time.perf_counter(), len(self._resident)
      self._state, tally = self.engine.generate(self._state, self._most_ticks(), max_finished, drafts_for)
      meanwhile()
      tally = jax.device_get(tally)
      self.statistics.call_seconds += time.perf_counter() - called
      ended = self._collect()
      self.statistics.count(tally)
      seconds = time.perf_counter() - called
      self._pace.learn(resident, drafts_for > 0, int(tally.sampled.sum()), seconds)
      self._length.learn(int(tally.ticks.max()), seconds)
    else:
      meanwhile()
    self.statistics.seconds += time.perf_counter() - begin
    return ended

  def _most_ticks(self) -> int:
    """Ticks of the next call: fewer while a text may end by a stop string, which is looked for between two calls."""
    may_stop = any(result.request.stop_strings for result in self._resident.values())
    return min(self._length.ticks, STOP_TICKS) if may_stop else self._length.ticks

  def _drafts_for(self) -> int:
    """Sequences that the next call drafts; 0: none, it ticks."""
    wanting = sum(result.request.speculate != 0 for result in self._resident.values())
    if not wanting or not self.engine.speculate:
      return 0
    drafts = self._pace.drafts(len(self._resident)) if self._drafting is None else self._drafting
    return len(self._resident) if drafts else 0

  # ---- between the ticks ----

  def _admit(self) -> None:
    begin = time.perf_counter()
    free = self._free_slots()
    admitted = [(slot, self._queue.popleft()) for slot in free[: len(self._queue)]]
    try:
      self._begin(admitted)
    except BaseException:  # such as memory that ends: nobody is forgotten
      waiting = [*self._prompts.clear(), *(result for _, result in admitted)]
      known = set(self._resident.values())
      self._queue.extendleft(
        result for result in reversed(list(dict.fromkeys(waiting))) if result not in known
      )
      raise
    self.statistics.prefill_seconds += time.perf_counter() - begin

  def _begin(self, admitted: list[tuple[int, Result]]) -> None:
    """Computes prompts of requests, and puts those that are complete into their slots."""
    for slot, result in admitted:
      if len(result.request.prompt) == 1:
        self._insert(None, 0, slot, result)
    self._prompts.add([entry for entry in admitted if len(entry[1].request.prompt) > 1])
    for computed in self._prompts.advance(self._prefill_tokens, lambda: self._state, self._prefixes):
      self._insert(*computed)
    self.statistics.overflow = self.statistics.overflow + self._prompts.overflow
    self._prompts.overflow = 0

  def _free_slots(self) -> list[int]:
    """Free slots, starting with the parts of the mesh that have the most, and of a part with what is oldest."""
    free, parts = collections.defaultdict(list), self.engine.part_of
    taken = {*self._resident, *(slot for slot, _ in self._prompts.entries)}
    for slot in sorted(range(self.engine.slots), key=self._prefixes.last_use):
      if slot not in taken:
        free[parts(slot)].append(slot)
    return [
      slots[-left]
      for left in range(self.engine.slots, 0, -1)
      for slots in free.values()
      if left <= len(slots)
    ]

  def _insert(self, prefix, lane: int, slot: int, result: Result) -> None:
    self._state = self.engine.insert(self._state, prefix, lane, slot, result.request)
    self._resident[slot] = result
    self._prefixes.keep(
      slot, result.request, np.array(result.request.prompt[:-1] if prefix else (), np.int32)
    )

  def _collect(self) -> list[Result]:
    """Fetches new tokens and returns the results that have finished."""
    state = self._state
    is_wanted = any(result.request.logprobs for result in self._resident.values())
    phase_N, known_N, tokens_NT, depths_NT, said = jax.device_get(
      (state.phase_N, state.known_N, state.tokens_NT, state.depths_NT, state.scores if is_wanted else None)
    )
    now, ended = time.perf_counter(), []
    for slot, result in list(self._resident.items()):
      start, known = len(result.request.prompt), int(known_N[slot])
      if known > start:  # the last one is still to be computed
        self._prefixes.keep(slot, result.request, tokens_NT[slot, : known - 1])
      tokens = [*result.tokens, *tokens_NT[slot, start + len(result.tokens) : known].tolist()]
      if tokens and not result.first_token:
        result.first_token = now
        self.statistics.first_token_seconds.append(now - result.submitted)
      stopped = bool(tokens) and tokens[-1] in result.request.stop_tokens
      result.tokens, result.end_token = (tokens[:-1], tokens[-1]) if stopped else (tokens, None)
      result.depths = [*result.depths, *depths_NT[slot, len(result.depths) : max(known - 1, 0)].tolist()]
      if said is not None and result.request.logprobs:
        _take_scores(result, said, slot, start + len(tokens))
      reason = ''
      if phase_N[slot] == IDLE:
        reason = 'stop_token' if stopped else 'length'
      if self._tokenizer is not None and self._update_text(result):
        reason = 'stop_string'
      if reason:
        self._free(slot, is_running=bool(phase_N[slot] != IDLE))
        self._finish(result, reason)
        ended.append(result)
    return ended

  def _update_text(self, result: Result) -> bool:
    """Decodes the tokens; if the text contains a stop string, truncates it there and returns True."""
    prompt = result.request.prompt
    if result not in self._texts:
      self._texts[result] = Continuation(self._tokenizer, prompt)
    text = self._texts[result].update(result.tokens)
    places = [text.find(stop) for stop in result.request.stop_strings]
    found = min((place for place in places if place >= 0), default=None)
    result.text = text if found is None else text[:found]
    if found is None:
      return False
    # Tokens after those that the text needs. Their number of characters does not tell: several may make one.
    while result.tokens and self._tokenizer.continuation(result.tokens[:-1], prompt).startswith(result.text):
      result.tokens.pop()
    for of_tokens in (result.depths, result.logprobs, result.top_logprobs):
      del of_tokens[len(prompt) + len(result.tokens) :]
    return True

  def _free(self, slot: int, is_running: bool = True) -> None:
    if is_running:
      self._state = self.engine.release(self._state, slot)
    del self._resident[slot]

  def _finish(self, result: Result, reason: str) -> None:
    result.finish, result.finished = reason, time.perf_counter()
    self._texts.pop(result, None)
    if len(result.tokens) > 1:
      seconds = (result.finished - result.first_token) / (len(result.tokens) - 1)
      self.statistics.token_seconds.append(seconds)


def _take_scores(result: Result, said: Scores, slot: int, count: int) -> None:
  """Adds the scores of new tokens; with the prompt there are `count`."""
  if not result.logprobs:
    unsaid = 1 if result.request.prompt_logprobs else len(result.request.prompt)
    result.logprobs, result.top_logprobs = [None] * unsaid, [[] for _ in range(unsaid)]
  new = slice(len(result.logprobs), count)
  result.logprobs += said.logprob_NT[slot, new].tolist()
  tops = zip(said.top_NTK[slot, new].tolist(), said.top_logprob_NTK[slot, new].tolist(), strict=True)
  result.top_logprobs += [list(zip(ids, logprobs, strict=True)) for ids, logprobs in tops]
