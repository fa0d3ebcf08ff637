"""Serves a trained model: python -m mor_jax.serve --checkpoint=runs/tiny-mor [--port=8000]

An OpenAI-compatible server on the engine of mor_jax.generate, for a run or a checkpoint of Hugging Face:

  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
    -d '{"model": "tiny-mor", "prompt": "def ", "max_tokens": 32, "depths": true}'

  from openai import OpenAI
  client = OpenAI(base_url='http://127.0.0.1:8000/v1', api_key='none')
  client.completions.create(model='tiny-mor', prompt='def ', max_tokens=32, extra_body={'max_recursions': 2})

The page at / shows texts in the colours of their depth. Beside it there are /v1/models, /v1/completions,
/v1/chat/completions, /tokenize, /detokenize, /health and /metrics (docs/serving.md).
Only this machine can reach it unless --host says otherwise; then set --api_key, or the environment variable
MOR_JAX_API_KEY. SIGTERM or Ctrl-C: new requests are refused, those that run end; once more: at once.

One device is used, unless the settings below ask for all: --config.parallel.tensor=4 splits heads and matrices over
four, texts are divided among the rest.
"""

import importlib.util
import os
from functools import partial
from typing import TYPE_CHECKING, Any

from absl import flags

from mor_jax import cli
from mor_jax.cli import engines
from mor_jax.config import Config, ConfigError
from mor_jax.console import open_console, print_line
from mor_jax.evaluation.recursions import Recursions
from mor_jax.inference.engine import Engine
from mor_jax.inference.scheduler import Scheduler
from mor_jax.inference.state import STOP_TOKENS
from mor_jax.runs.restore import LoadedRun

if TYPE_CHECKING:
  from mor_jax.serving import schemas

FLAGS = flags.FLAGS
PACKAGES = ('starlette', 'uvicorn', 'prometheus_client', 'jinja2')


def define_flags() -> None:
  """Defines the flags of this command."""
  cli.define_checkpoint()
  flags.DEFINE_string('name', None, 'name of the model in requests; default: that of the folder')
  flags.DEFINE_string('host', '127.0.0.1', 'address to listen at; 0.0.0.0: all of this machine')
  flags.DEFINE_integer('port', 8000, 'port to listen at; 0: any that is free')
  flags.DEFINE_string('api_key', None, 'key that clients must send; default: MOR_JAX_API_KEY, or none')
  flags.DEFINE_integer('max_queue', 256, 'requests that may wait for a slot')
  flags.DEFINE_integer('max_body_bytes', 2**22, 'largest body of a request')
  engines.define_flags(16, 'texts generated together')
  flags.DEFINE_integer(
    'prefill_tokens',
    256,
    'tokens of prompts that are computed between two pieces of the streams, so that a long prompt does not stall them; '
    '0: whole prompts',
  )
  flags.DEFINE_integer('ticks_per_call', 8, 'passes of the block between two pieces of a stream, at most')
  flags.DEFINE_float(
    'call_seconds',
    0.05,
    'time between two pieces of a stream, for which passes are left out; 0: however long they take',
  )
  flags.DEFINE_float('drain_seconds', 30.0, 'time that running requests have to end after SIGTERM')


def main() -> int:
  """Serves until a signal; returns the exit code. Raises ConfigError for flags that cannot work."""
  cli.require_checkpoint()
  cli.check_least(
    max_queue=0,
    max_body_bytes=1,
    slots=1,
    max_len=2,
    ticks_per_call=1,
    call_seconds=0,
    prefill_tokens=0,
    port=0,
    drain_seconds=0,
  )
  missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
  if missing:
    raise ConfigError(f"the server needs {', '.join(missing)}: pip install 'mor_jax[serve]'")
  from mor_jax.serving import server
  from mor_jax.serving.application import Application
  from mor_jax.serving.worker import Worker

  run, served, scheduler = prepare()
  engine = scheduler.engine
  recursions = None
  if served.looks:
    recursions = Recursions(run.model, run.variables, served.tokenizer, engine.max_len)
  key = FLAGS.api_key if FLAGS.api_key is not None else os.environ.get('MOR_JAX_API_KEY', '')
  about = _about(run.config, run.step, engine)
  app = Application(served, about, Worker(scheduler, FLAGS.max_queue), FLAGS.max_body_bytes, key, recursions)
  report = partial(print_line, open_console(lost=lambda: None))
  return server.serve(app, FLAGS.host, FLAGS.port, FLAGS.drain_seconds, report)


def prepare() -> tuple[LoadedRun, 'schemas.Served', Scheduler]:
  """The run of the flags, what requests must know of it, and an idle engine for it.

  Raises:
    ConfigError: the run or the flags cannot be used.
  """
  from mor_jax.data.chats import Chats
  from mor_jax.serving import schemas

  mesh = engines.make_mesh()
  run = engines.load_as_asked(mesh)
  cli.use_compilation_cache(run.config)
  tokenizer = engines.tokenizer_of(run)
  conventions = run.folder.conventions(run.config, tokenizer)
  top = min(schemas.MOST_LOGPROBS, run.config.model.vocab_size)
  engine = engines.make_engine(run, FLAGS.slots, mesh, top, may_measure=True)
  model = run.config.model
  served = schemas.Served(
    FLAGS.name or run.folder.path.resolve().name,
    tokenizer,
    engine.max_len,
    conventions.ends[:STOP_TOKENS],
    Chats.of(conventions, tokenizer),
    thresholds=model.kind == 'mor' and model.router == 'expert_choice',
    recursions=engine.steps,
    looks=Recursions.can_look(run.model),
    drafts=engine.speculate,
  )
  scheduler = Scheduler(
    engine,
    tokenizer,
    FLAGS.ticks_per_call,
    FLAGS.prefill_tokens or None,
    engines.drafting(),
    FLAGS.call_seconds or None,
  )
  return run, served, scheduler


def _about(config: Config, step: int, engine: Engine) -> dict[str, Any]:
  """What /v1/models tells of the model beyond OpenAI's fields: how scores come about."""
  model = config.model
  about = {'kind': model.kind, 'step': step, 'dtype': model.dtype, 'recursions': engine.steps}
  if model.kind == 'mor':
    slack = model.threshold_slack if FLAGS.slack is None else FLAGS.slack
    about |= {'routing': 'threshold', 'capacities': list(model.step_capacities), 'slack': slack}
  return about


if __name__ == '__main__':
  define_flags()
  cli.run(main, __doc__, with_config=False, sections=('parallel',))
