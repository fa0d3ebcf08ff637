"""What the server counts, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mor_jax.serving.worker import Worker

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
  """Counters of one server."""

  def __init__(self, worker: Worker):
    self._worker, self.registry = worker, CollectorRegistry()
    made = {'namespace': 'mor_jax', 'registry': self.registry}
    self.answers = Counter('answers', 'answers by route and status', ['route', 'status'], **made)
    self.prompt_tokens = Counter('prompt_tokens', 'tokens of prompts that were answered', **made)
    self.completion_tokens = Counter('completion_tokens', 'tokens that were generated', **made)
    self.block_passes = Counter('block_passes', 'passes of tokens through the shared block', **made)
    self.cancelled = Counter('cancelled', 'requests whose client went away', **made)
    self.first_token = Histogram(
      'time_to_first_token_seconds', 'from the request to its first token', buckets=SECONDS, **made
    )
    self.duration = Histogram('request_seconds', 'from the request to its end', buckets=SECONDS, **made)
    computed = Gauge('engine_prompt_tokens', 'tokens of prompts, copied ones included', **made)
    computed.set_function(lambda: worker.scheduler.prompt_tokens[0])
    copied = Gauge('engine_reused_tokens', 'those copied from sequences that begin alike', **made)
    copied.set_function(lambda: worker.scheduler.prompt_tokens[1])
    Gauge('waiting', 'requests without a slot', **made).set_function(lambda: worker.waiting)
    Gauge('slots', 'slots of the engine', **made).set(worker.scheduler.engine.slots)
    Gauge('slots_in_use', 'slots with a request', **made).set_function(lambda: worker.scheduler.resident)

  def text(self) -> bytes:
    """All of them, as Prometheus reads them."""
    return generate_latest(self.registry)
