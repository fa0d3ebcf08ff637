"""The server's routes: OpenAI's API over the engine. `worker.py` has the engine, `schemas.py` and `answers.py` the forms."""

import asyncio
import functools
import hmac
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from mor_jax.evaluation.recursions import Recursions
from mor_jax.files import parse_json
from mor_jax.inference.requests import RequestError
from mor_jax.serving import schemas
from mor_jax.serving.answers import Answers
from mor_jax.serving.errors import ApiError
from mor_jax.serving.fields import Fields
from mor_jax.serving.follow import EventStream, Follow, disconnected
from mor_jax.serving.metrics import Metrics
from mor_jax.serving.schemas import Served, Wanted
from mor_jax.serving.worker import Told, Worker

Handler = Callable[[HttpRequest], Awaitable[Response]]
CLIENT_GONE = 499
PAGE = Path(__file__).with_name('page.html')
POLICY = (
  "default-src 'self' data:; script-src 'unsafe-inline'; style-src 'unsafe-inline'; frame-ancestors 'none'"
)


class Application:
  """The routes, and what they share.

  Attributes:
    is_warm: whether the engine's programs are compiled; until then /health says 503.
  """

  def __init__(
    self,
    served: Served,
    about: dict[str, Any],
    worker: Worker,
    max_body_bytes: int,
    api_key: str,
    recursions: Recursions | None = None,
  ):
    """Args:
    about: what /v1/models tells of the model beyond OpenAI's fields.
    api_key: that clients must send; '': none.
    recursions: looks at texts once more, for models that allow it (`Served.looks`).
    """
    self._recursions = recursions
    self._served, self._about, self.worker = served, about, worker
    self._max_body_bytes, self._api_key = max_body_bytes, api_key
    self.metrics, self.is_warm = Metrics(worker), False
    self._started = int(time.time())
    routes = {
      ('/v1/models', 'GET'): self._models,
      ('/v1/models/{name:path}', 'GET'): self._model,
      ('/v1/completions', 'POST'): functools.partial(self._answer, False),
      ('/v1/chat/completions', 'POST'): functools.partial(self._answer, True),
      ('/tokenizer_info', 'GET'): self._tokenizer_info,
      ('/tokenize', 'POST'): self._tokenize,
      ('/detokenize', 'POST'): self._detokenize,
    }
    made = [
      Route(path, self._guarded(path, handler), methods=[method])
      for (path, method), handler in routes.items()
    ]
    made += [
      Route('/', self._page, methods=['GET']),
      Route('/health', self._health, methods=['GET']),
      Route('/metrics', self._metrics, methods=['GET']),
    ]
    self.asgi = Starlette(routes=made, exception_handlers={HTTPException: _http_error, Exception: _failure})

  @property
  def name(self) -> str:
    """The model's."""
    return self._served.name

  # ---- every route ----

  def _guarded(self, route: str, handler: Handler) -> Handler:
    """The handler for those who have the key, with errors in OpenAI's form, and counted."""

    async def guarded(request: HttpRequest) -> Response:
      try:
        self._check_key(request)
        response = await handler(request)
      except ApiError as error:
        response = JSONResponse(error.body(), error.status, error.headers)
      self.metrics.answers.labels(route, str(response.status_code)).inc()
      return response

    return guarded

  def _check_key(self, request: HttpRequest) -> None:
    if not self._api_key:
      return
    scheme, _, given = request.headers.get('authorization', '').partition(' ')
    if scheme.lower() != 'bearer' or not hmac.compare_digest(given.strip().encode(), self._api_key.encode()):
      headers = {'WWW-Authenticate': 'Bearer'}
      raise ApiError(
        401,
        'the API key is missing or wrong: send Authorization: Bearer KEY',
        None,
        'invalid_api_key',
        headers,
      )

  async def _body(self, request: HttpRequest) -> Any:
    too_large = ApiError(
      413,
      f'the body is larger than the {self._max_body_bytes} bytes that this server takes (--max_body_bytes)',
    )
    told = request.headers.get('content-length', '0')
    if told.isdecimal() and int(told) > self._max_body_bytes:
      raise too_large
    body = bytearray()
    async for piece in request.stream():
      body += piece
      if len(body) > self._max_body_bytes:
        raise too_large
    try:
      return parse_json(bytes(body))
    except ValueError as error:
      raise ApiError(400, f'the body is not JSON: {error}') from None

  # ---- about the server ----

  async def _models(self, _: HttpRequest) -> Response:
    return JSONResponse({'object': 'list', 'data': [self._card()]})

  async def _model(self, request: HttpRequest) -> Response:
    name = request.path_params['name']
    if name != self._served.name:
      message = f'the model {name} does not exist; this server has {self._served.name}'
      raise ApiError(404, message, 'model', 'model_not_found')
    return JSONResponse(self._card())

  def _card(self) -> dict[str, Any]:
    card = {'id': self._served.name, 'object': 'model', 'created': self._started, 'owned_by': 'mor_jax'}
    return {**card, 'max_model_len': self._served.max_len, **self._about}

  async def _page(self, _: HttpRequest) -> Response:
    """The page for people, which needs nothing but this server."""
    headers = {'Content-Security-Policy': POLICY, 'X-Content-Type-Options': 'nosniff'}
    return HTMLResponse(PAGE.read_text(encoding='utf-8'), headers=headers)

  async def _health(self, _: HttpRequest) -> Response:
    state = 'draining' if self.worker.is_draining else 'ready' if self.is_warm else 'compiling'
    alive = self.worker.is_alive()
    return JSONResponse({'status': state if alive else 'dead'}, 200 if state == 'ready' and alive else 503)

  async def _metrics(self, _: HttpRequest) -> Response:
    return Response(self.metrics.text(), media_type='text/plain; version=0.0.4; charset=utf-8')

  # ---- tokens ----

  async def _tokenize(self, request: HttpRequest) -> Response:
    fields = Fields(await self._body(request))
    text = fields.text('prompt')
    if text is None:
      raise fields.refuse('prompt', 'a text')
    tokenizer = self._served.tokenizer
    is_special = fields.boolean('add_special_tokens', True)
    tokens = tokenizer.encode_text(text) if is_special else tokenizer.encode(text)
    if text in (tokenizer.separator, tokenizer.begin):  # clients learn in this way what these tokens are
      tokens = [tokenizer.token_to_id(text)]
    return JSONResponse({'tokens': tokens, 'count': len(tokens), 'max_model_len': self._served.max_len})

  async def _tokenizer_info(self, _: HttpRequest) -> Response:
    """As vLLM has it, for clients that have no tokenizer, such as lm-evaluation-harness."""
    tokenizer, chats = self._served.tokenizer, self._served.chats
    return JSONResponse(
      {
        'eos_token': tokenizer.separator,
        'bos_token': tokenizer.begin,
        'pad_token': None,
        'chat_template': chats and chats.template.source,
      }
    )

  async def _detokenize(self, request: HttpRequest) -> Response:
    fields = Fields(await self._body(request))
    tokens, most = fields.get('tokens'), self._served.tokenizer.vocab_size
    if not isinstance(tokens, list) or not all(type(one) is int and 0 <= one < most for one in tokens):
      raise fields.refuse('tokens', f'a list of ids from 0 to {most - 1}')
    return JSONResponse({'prompt': self._served.tokenizer.decode(tokens)})

  # ---- completions ----

  async def _answer(self, is_chat: bool, request: HttpRequest) -> Response:
    body = await self._body(request)
    wanted = (schemas.chat if is_chat else schemas.completion)(body, self._served)
    try:
      for one in wanted.requests:
        self.worker.scheduler.engine.check(one)
    except RequestError as error:
      raise ApiError(400, str(error)) from None
    follow = Follow(self.worker, wanted, self.metrics)
    answers = Answers(self._served, wanted, is_chat)
    if wanted.stream:
      return EventStream(follow, answers, wanted, self._look)
    gone = asyncio.create_task(disconnected(request.receive))
    try:
      async for _ in follow.changes(gone):
        pass
    finally:
      gone.cancel()
      follow.end()
    job = follow.job
    if not job.is_finished:
      return Response(status_code=CLIENT_GONE)
    follow.raise_error()
    return JSONResponse(answers.whole(job.told, await self._look(wanted, job.told)))

  async def _look(
    self, wanted: Wanted, told: Sequence[Told], starts: Sequence[int] | None = None
  ) -> list[Any] | None:
    """What was said after each recursion of every request's tokens, from those at `starts` on, if it is wanted."""
    if wanted.depths != schemas.FULL or self._recursions is None:
      return None
    look = self._recursions.look
    calls = [
      self.worker.call(
        functools.partial(look, (*one.prompt, *so_far.tokens), so_far.depths, one.threshold_shift, start)
      )
      for one, so_far, start in zip(wanted.requests, told, starts or [0] * len(told), strict=True)
    ]
    return [await asyncio.wrap_future(call) for call in calls]


async def _http_error(_: HttpRequest, error: Exception) -> Response:
  """What Starlette refuses itself: paths and methods that do not exist."""
  assert isinstance(error, HTTPException)
  return JSONResponse(ApiError(error.status_code, str(error.detail)).body(), error.status_code, error.headers)


async def _failure(_: HttpRequest, error: Exception) -> Response:
  return JSONResponse(ApiError(500, f'the server failed: {type(error).__name__}').body(), 500)
