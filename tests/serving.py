"""A server of a tiny model in the process of the tests, for clients over HTTP."""

import contextlib
import functools
import threading
import time
from collections.abc import Iterator

import httpx
import tiny_run
import uvicorn

from mor_jax.data import tokenizer as tokenizers
from mor_jax.data.chats import Chats
from mor_jax.data.templates import Template
from mor_jax.evaluation.recursions import Recursions
from mor_jax.inference.requests import Request, Result
from mor_jax.inference.scheduler import Scheduler
from mor_jax.serving.application import Application
from mor_jax.serving.schemas import Served
from mor_jax.serving.server import Server
from mor_jax.serving.worker import Worker
from tests import tiny_engine

NAME, KEY = 'tiny', 'open sesame'
COMPLETIONS, CHATS = '/v1/completions', '/v1/chat/completions'
CHAT = (
  "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
  '{% if add_generation_prompt %}[assistant] {% endif %}'
)


@functools.cache
def tokenizer() -> tokenizers.Tokenizer:
  """Bytes."""
  return tokenizers.build(tiny_run.CONFIG.data)


@functools.cache
def engine():
  """Two slots of 64 tokens, with scores."""
  run = tiny_run.run()
  return tiny_engine.engine(run.model, run.initial().variables, slots=2, top_logprobs=5, slack=1.25)


def served(**changes) -> Served:
  """What the tiny model is like for requests."""
  defaults = {
    'name': NAME,
    'tokenizer': tokenizer(),
    'max_len': 64,
    'ends': (tokenizer().end_of_text,),
    'chats': Chats(Template(CHAT, {}), tokenizer()),
    'thresholds': True,
    'recursions': 2,
    'looks': True,
  }
  return Served(**{**defaults, **changes})


@contextlib.contextmanager
def running(
  max_queue: int = 8, api_key: str = '', max_body_bytes: int = 20_000, **changes
) -> Iterator[tuple]:
  """(address, application) of a server that answers."""
  worker = Worker(Scheduler(engine(), tokenizer(), ticks_per_call=4), max_queue)
  run = tiny_run.run()
  recursions = Recursions(run.model, run.initial().variables, tokenizer(), max_len=64)
  app = Application(
    served(**changes),
    {'kind': 'mor', 'recursions': 2, 'routing': 'threshold'},
    worker,
    max_body_bytes,
    api_key,
    recursions,
  )
  config = uvicorn.Config(app.asgi, port=0, log_level='warning', lifespan='off')
  server = Server(app, config, drain_seconds=5.0, report=lambda line: None)
  worker.start()
  app.is_warm = True
  thread = threading.Thread(target=server.run, daemon=True)
  thread.start()
  while not server.started:
    time.sleep(0.01)
  port = server.servers[0].sockets[0].getsockname()[1]
  try:
    yield f'http://127.0.0.1:{port}', app
  finally:
    server.should_exit = True
    thread.join(timeout=10)
    worker.stop()
    worker.join(timeout=10)


def post(address: str, path: str, body: object, **options) -> httpx.Response:
  """The answer to a JSON body."""
  return httpx.post(f'{address}{path}', json=body, timeout=60, **options)


def complete(address: str, **fields) -> dict:
  """The answer to a completion, of 'the boats ' if no field says otherwise."""
  answer = post(address, COMPLETIONS, {'model': NAME, 'prompt': 'the boats ', **fields})
  assert answer.status_code == 200, answer.text
  return answer.json()


def direct(prompt: str, **options) -> Result:
  """What the engine says itself."""
  request = Request(tuple(prompt.encode()), stop_tokens=(256,), **options)
  return Scheduler(engine(), tokenizer()).run([request])[0]
