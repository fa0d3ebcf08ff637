"""Generation: vanilla against MoR R = 2, 3, 4 in the same engine (decode_huggingface.py: beside transformers).

  python -m benchmarks.decode [--width=192] [--slots=32] [--ticks=120] [--rounds=5] [--shares=0.2,0.5,0.3]

Takes the 360m shape, narrower: 32 layers (34 for R = 4), 3 query heads a key/value head. A queue that never ends
feeds the slots; outputs have 256 tokens on average (standard deviation 64), prompts one, as in the paper
(appendix E), but keys and values are written within the time measured. Depths are drawn with the paper's ideal
shares, every depth equally often (mean (R + 1) / 2); --shares adds R = 3 with those of a trained router. What the
scores of a router cost, a product with D numbers a recursion, is left out. Slots begin in the middle of texts.

"Bound" is what vanilla's time for a layer pass would give if only the passes that the tokens' depths require were
run. Contenders take turns of equal time; a ratio is that to the mean of vanilla's turns before and after it, and
the median over rounds counts, beside the smallest and the largest. Time of the CPU, all threads, tells more than
that on the wall where a machine is not quiet. Writes benchmarks/results/decode.json and .md.
"""

import statistics
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import linen as nn
from rich.console import Console

from benchmarks import results
from mor_jax import cli
from mor_jax.config import Config, ConfigError, with_changes
from mor_jax.inference import prefill
from mor_jax.inference.engine import Engine
from mor_jax.inference.prefill import Prefix
from mor_jax.inference.requests import Request
from mor_jax.inference.scheduler import Scheduler
from mor_jax.model import cache as cache_lib
from mor_jax.model import flops
from mor_jax.model.transformer import Transformer, abstract_variables

FLAGS = flags.FLAGS
flags.DEFINE_integer('width', 192, 'model width, a multiple of 192')
flags.DEFINE_integer('vocab_size', 9216, 'vocabulary: as large beside the layers as at full width')
flags.DEFINE_integer('slots', 32, 'sequences that the vanilla model holds')
flags.DEFINE_integer('max_len', 512, 'longest sequence')
flags.DEFINE_integer('ticks', 120, 'ticks of the vanilla model in a round; the others get the same time')
flags.DEFINE_integer('rounds', 5, 'rounds that are timed')
flags.DEFINE_list('shares', None, 'shares of the tokens that take 1, 2, 3 recursions, for R = 3 alone')
flags.DEFINE_boolean('unroll', True, 'compile layers separately; compiling takes minutes')

MEAN_LENGTH, LENGTH_DEVIATION = 256, 64
RATIOS = {'tokens_per_second': 'ratio', 'tokens_per_cpu_second': 'cpu_ratio'}


def main() -> None:
  """Measures and writes the table. Raises ConfigError for flags that cannot work."""
  groups = {32: _contenders(32, (2, 3)), 34: _contenders(34, (4,))}
  if FLAGS.shares:
    groups[32]['MoR R=3, 32 layers, --shares, equal memory'] = _equal_memory(32, 3, _shares())
  for contenders in groups.values():
    for name, contender in contenders.items():
      begin = time.perf_counter()
      contender.run(seconds=0.5)
      print(f'{name}: ready after {time.perf_counter() - begin:.0f} s', flush=True)
  window = groups[32]['vanilla, 32 layers'].run(ticks=FLAGS.ticks)['seconds']
  measured = {name: [] for contenders in groups.values() for name in contenders}
  for _ in range(FLAGS.rounds):
    for contenders in groups.values():
      found = {name: contender.run(window) for name, contender in contenders.items()}
      vanilla, other = next(iter(contenders.items()))
      again = other.run(window)
      for key, ratio in RATIOS.items():
        base = (found[vanilla][key] + again[key]) / 2
        for name, entry in found.items():
          entry[ratio] = 1.0 if name == vanilla else entry[key] / base
      for name, entry in found.items():
        measured[name].append(entry)
  rows = [
    _row(name, contender, measured[name])
    for contenders in groups.values()
    for name, contender in contenders.items()
  ]
  names = 'width', 'vocab_size', 'slots', 'max_len', 'ticks', 'rounds', 'unroll', 'shares'
  settings = {name: FLAGS[name].value for name in names} | {'dtype': 'float32, caches, too'}
  table = results.keep('decode', COLUMNS, rows, settings, rounds=measured)
  Console().print(table, highlight=False, soft_wrap=True)


def _shares() -> tuple[float, ...]:
  try:
    wanted = tuple(float(share) for share in FLAGS.shares)
  except ValueError:
    wanted = ()
  if len(wanted) != 3 or min(wanted) <= 0 or abs(sum(wanted) - 1) > 1e-2:
    raise ConfigError(
      f'--shares={",".join(FLAGS.shares)} must be three numbers above 0 that add up to 1: the shares of the '
      f'tokens that take 1, 2 and 3 recursions'
    )
  return wanted


def _contenders(layers: int, recursions: tuple[int, ...]) -> dict[str, 'Contender']:
  """Vanilla, which comes first, and MoR with as many sequences or as large a cache."""
  slots = FLAGS.slots
  made = {f'vanilla, {layers} layers': Contender(layers, 1, slots)}
  for count in recursions:
    name = f'MoR R={count}, {layers} layers'
    made[f'{name}, equal batch'] = Contender(layers, count, slots)
    made[f'{name}, equal memory'] = _equal_memory(layers, count)
  return made


def _equal_memory(layers: int, recursions: int, shares: tuple[float, ...] | None = None) -> 'Contender':
  config = shape(layers, recursions)
  bytes_each = [flops.kv_cache_bytes(c, FLAGS.max_len, 4) for c in (flops.vanilla_of(config), config)]
  more = FLAGS.slots * bytes_each[0] // bytes_each[1]
  return Contender(layers, recursions, more, shares)


COLUMNS = (
  'model',
  'slots',
  'lanes',
  'cache, MB',
  'tokens/s',
  'mean depth',
  'ratio',
  'smallest to largest',
  'ratio, CPU time',
  'bound',
  'of the bound',
  'of the bound, CPU time',
  'lanes in use',
  'boundary in use',
  'tick, ms',
  'host between calls',
)


def shape(layers: int, recursions: int, **change):
  """The 360m shape at the width of the flags."""
  heads = FLAGS.width // 64
  return with_changes(
    Config(),
    model={
      'kind': 'vanilla' if recursions == 1 else 'mor',
      'num_layers': layers,
      'num_recursions': recursions,
      'd_model': FLAGS.width,
      'num_heads': heads,
      'num_kv_heads': heads // 3,
      'mlp_dim': FLAGS.width * 8 // 3,
      'vocab_size': FLAGS.vocab_size,
      'dtype': 'float32',
      **change,
    },
  ).model


def random_variables(model: Transformer, seed: int = 0) -> dict:
  """Variables like fresh ones."""
  shapes = nn.unbox(abstract_variables(model.config))
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    if path[-1].key == 'scale':
      return jnp.ones(leaf.shape)
    return jnp.asarray(rng.standard_normal(leaf.shape, np.float32) * 0.02)

  return jax.tree_util.tree_map_with_path(draw, shapes)


class Contender:
  """A model in an engine whose queue never ends."""

  def __init__(
    self,
    layers: int,
    recursions: int,
    slots: int,
    shares: tuple[float, ...] | None = None,
  ):
    """Draws depths with these shares (default: all alike). Lanes are measured; vanilla has as many as slots."""
    change = {} if recursions == 1 else {'random_router': True, 'causality': 'none'}
    self.config = shape(layers, recursions, **change)
    model = Transformer(self.config)
    variables = random_variables(model)
    shares = np.full(recursions, 1 / recursions) if shares is None else np.array(shares)
    self._entering = np.cumsum(shares[::-1])[::-1]  # shares of the tokens that take step r or more
    if recursions > 1:
      going_on = np.r_[0.5, self._entering[1:] / self._entering[:-1]]  # of those that took the step before
      variables['routing'] = {'threshold': jnp.asarray(np.log(1 - going_on) - np.log(going_on), jnp.float32)}
    self.engine = Engine(
      model,
      variables,
      slots=slots,
      max_len=FLAGS.max_len,
      lanes=slots if recursions == 1 else None,
      boundary_lanes=slots if recursions == 1 else None,
      measure=recursions > 1,
      slack=1.0,
      cache_dtype='float32',
      unroll=FLAGS.unroll,
    )
    self.engine.prefill = self._as_if_computed
    self._scheduler = Scheduler(self.engine, ticks_per_call=32)
    self._rng = np.random.default_rng(1)
    for _ in range(slots):
      self._submit(self._rng.uniform())

  def _submit(self, done: float = 0.0) -> None:
    """Queues a text of which a part is done, beside its first token."""
    length = int(np.clip(self._rng.normal(MEAN_LENGTH, LENGTH_DEVIATION), 16, FLAGS.max_len - 1))
    prompt = self._rng.integers(FLAGS.vocab_size, size=1 + int(done * length))
    new_tokens = max(1, length - len(prompt))
    self._scheduler.submit(Request(tuple(prompt.tolist()), max_new_tokens=new_tokens))

  def _as_if_computed(self, requests: Sequence[Request | None]) -> Prefix:
    """In place of prefill: as many places of the caches are taken as if, but keys and values are 0."""
    layout = self.engine.cached.layout
    prefix = prefill.empty(self.engine.cached, self.engine.prefill_lanes, 'float32')
    lengths_B = np.zeros(self.engine.prefill_lanes, np.int32)
    lengths_B[: len(requests)] = [len(request.prompt) - 1 if request else 0 for request in requests]
    counts_BP = np.minimum(lengths_B[:, None] * self._entering, layout.places).astype(np.int32)
    return prefix.replace(lengths_B=jnp.asarray(lengths_B), counts_BP=jnp.asarray(counts_BP))

  def run(self, seconds: float | None = None, ticks: int | None = None) -> dict[str, float]:
    """Generates for so many seconds or ticks; what was done, as `Statistics.summary` has it."""
    statistics_before = self._scheduler.statistics
    fresh = type(statistics_before)(
      statistics_before.slots, statistics_before.lanes, statistics_before.boundary_lanes_each
    )
    self._scheduler.statistics = fresh
    cpu_seconds = -time.process_time()
    while fresh.seconds < seconds if seconds else fresh.ticks < ticks:
      for _ in range(4):
        self._submit()
      self._scheduler.step()
      while len(self._scheduler._queue) > 8:
        self._scheduler._queue.pop()
    cpu_seconds += time.process_time()
    return fresh.summary() | {'ticks': fresh.ticks, 'tokens_per_cpu_second': fresh.sampled / cpu_seconds}


def _row(name: str, contender: Contender, measured: list[dict[str, float]]) -> list[str]:
  found = {key: statistics.median(entry[key] for entry in measured) for key in measured[0]}
  config, engine = contender.config, contender.engine
  depth = config.num_layers - 2 * config.unique_ends
  required = 2 * config.unique_ends + depth // cache_lib.num_steps(config) * found['mean_depth']
  bound = config.num_layers / required
  ratios = [entry['ratio'] for entry in measured]
  return [
    name,
    engine.slots,
    f'{engine.batches.block}, {engine.batches.boundary}',
    f'{engine.cache_bytes() / 1e6:.1f}',
    f'{found["tokens_per_second"]:,.0f}',
    f'{found["mean_depth"]:.2f}',
    f'{found["ratio"]:.3f}',
    f'{min(ratios):.2f} to {max(ratios):.2f}',
    f'{found["cpu_ratio"]:.3f}',
    f'{bound:.3f}',
    f'{found["ratio"] / bound:.0%}',
    f'{found["cpu_ratio"] / bound:.0%}',
    f'{found["lane_occupancy"]:.1%}',
    f'{found["boundary_occupancy"]:.1%}',
    f'{found["seconds"] / found["ticks"] * 1e3:.1f}',
    f'{found["host_share"]:.1%}',
  ]


if __name__ == '__main__':
  cli.run(main, __doc__, with_config=False)
