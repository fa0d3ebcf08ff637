"""Generation: vanilla against MoR R = 2, 3, 4 in the same engine, and against Hugging Face generate.

  python -m benchmarks.decode [--width=192] [--slots=32] [--ticks=200] [--rounds=3]
  python -m benchmarks.decode --huggingface [--rounds=3]

The first takes the 360m shape, narrower: 32 layers (34 for R = 4), 3 query heads a key/value head. A queue that
never ends feeds the slots; outputs have 256 tokens on average (standard deviation 64), prompts one, as in the
paper (appendix E), but keys and values are written within the time measured. Depths are drawn with the shares
of a trained router under balanced capacities, which are the paper's ideal: every depth equally often (mean
(R + 1) / 2); --shares sets others. "Bound" is what vanilla's time for a layer pass would give if only the passes
that the tokens' depths require were run. Contenders take turns; medians count.

The second times the vanilla 135m shape with random weights, greedy, at batch 1 and 16, against transformers in
this process. Both write benchmarks/results/decode*.json and .md.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console

from benchmarks import results
from mor_jax import cli
from mor_jax.config import Config, ConfigError
from mor_jax.inference.engine import Engine
from mor_jax.inference.requests import Request
from mor_jax.inference.scheduler import Scheduler
from mor_jax.model import cache as cache_lib
from mor_jax.model import flops
from mor_jax.model.transformer import Transformer

FLAGS = flags.FLAGS
flags.DEFINE_integer('width', 192, 'model width, a multiple of 192')
flags.DEFINE_integer('vocab_size', 9216, 'vocabulary: as large beside the layers as at full width')
flags.DEFINE_integer('slots', 32, 'sequences that the vanilla model holds')
flags.DEFINE_integer('max_len', 512, 'longest sequence')
flags.DEFINE_integer('ticks', 200, 'ticks of the vanilla model in a round; the others get the same time')
flags.DEFINE_integer('rounds', 3, 'rounds that are timed')
flags.DEFINE_list('shares', None, 'shares of the tokens that take 1, 2, 3 recursions, for R = 3 alone')
flags.DEFINE_boolean('huggingface', False, 'compare with Hugging Face generate')
flags.DEFINE_boolean('unroll', True, 'compile layers separately; compiling takes minutes')
flags.DEFINE_integer('new_tokens', 64, 'tokens that Hugging Face and we generate')

MEAN_LENGTH, LENGTH_DEVIATION = 256, 64


def main() -> None:
  """Measures and writes the tables."""
  (_against_huggingface if FLAGS.huggingface else _against_vanilla)()


# ---- vanilla against MoR ----


def _against_vanilla() -> None:
  contenders = {}
  for layers in (32, 34):
    contenders[f'vanilla, {layers} layers'] = Contender(layers, 1, FLAGS.slots, FLAGS.slots, FLAGS.slots)
  for recursions in (2, 3, 4):
    layers = 34 if recursions == 4 else 32
    config = shape(layers, recursions)
    bytes_each = [flops.kv_cache_bytes(c, FLAGS.max_len, 4) for c in (flops.vanilla_of(config), config)]
    more = FLAGS.slots * bytes_each[0] // bytes_each[1]
    unit = max(1, FLAGS.slots // 4)
    name = f'MoR R={recursions}, {layers} layers'
    contenders[f'{name}, equal batch'] = Contender(layers, recursions, FLAGS.slots, FLAGS.slots, unit)
    contenders[f'{name}, equal memory'] = Contender(layers, recursions, more, FLAGS.slots, unit)
  if FLAGS.shares:
    wanted = tuple(float(share) for share in FLAGS.shares)
    if len(wanted) != 3 or abs(sum(wanted) - 1) > 1e-3:
      raise ConfigError(f'--shares={",".join(FLAGS.shares)} must be three numbers that add up to 1')
    contenders['MoR R=3, 32 layers, --shares, equal memory'] = Contender(
      32, 3, FLAGS.slots * 3 // 2 - 2, FLAGS.slots, max(1, FLAGS.slots // 4), wanted
    )
  for name, contender in contenders.items():
    begin = time.perf_counter()
    contender.run(seconds=0.5)
    print(f'{name}: ready after {time.perf_counter() - begin:.0f} s', flush=True)
  measured = {name: [] for name in contenders}
  window = None
  for _ in range(FLAGS.rounds):
    for name, contender in contenders.items():
      found = contender.run(window) if window else contender.run(ticks=FLAGS.ticks)
      window = window or found['seconds']
      measured[name].append(found)
  rows = _rows(contenders, measured)
  settings = {
    flag: FLAGS[flag].value
    for flag in ('width', 'vocab_size', 'slots', 'max_len', 'ticks', 'rounds', 'unroll')
  }
  table = results.keep('decode', COLUMNS, rows, settings, rounds=measured)
  Console().print(table, highlight=False, soft_wrap=True)


COLUMNS = (
  'model',
  'slots',
  'lanes',
  'cache, MB',
  'tokens/s',
  'mean depth',
  'ratio',
  'bound',
  'of the bound',
  'lanes in use',
  'boundary in use',
  'tick, ms',
)


def shape(layers: int, recursions: int, **change):
  """The 360m shape at the width of the flags."""
  heads = FLAGS.width // 64
  return (
    Config()
    .replace(
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
      }
    )
    .model
  )


def random_variables(model: Transformer, seed: int = 0) -> dict:
  """Variables like fresh ones."""
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
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
    lanes: int,
    boundary_lanes: int,
    shares: tuple[float, ...] | None = None,
  ):
    """Draws depths with these shares (default: all alike), in which what a router costs is not contained."""
    change = {} if recursions == 1 else {'random_router': True, 'causality': 'none'}
    self.config = shape(layers, recursions, **change)
    model = Transformer(self.config)
    variables = random_variables(model)
    if recursions > 1:
      shares = np.full(recursions, 1 / recursions) if shares is None else np.array(shares)
      entering = np.cumsum(shares[::-1])[::-1]  # shares of the tokens that take step r or more
      going_on = np.r_[0.5, entering[1:] / entering[:-1]]  # of those that took the step before
      variables['routing'] = {'threshold': jnp.asarray(np.log(1 - going_on) - np.log(going_on), jnp.float32)}
    self.engine = Engine(
      model,
      variables,
      slots=slots,
      max_len=FLAGS.max_len,
      lanes=lanes,
      boundary_lanes=boundary_lanes,
      slack=1.0,
      cache_dtype='float32',
      unroll=FLAGS.unroll,
    )
    self._scheduler = Scheduler(self.engine, ticks_per_call=32)
    self._rng = np.random.default_rng(1)
    # Sequences that begin together shall not end together.
    for _ in range(slots):
      self._submit(self._rng.uniform())

  def _submit(self, part: float = 1.0) -> None:
    length = np.clip(self._rng.normal(MEAN_LENGTH, LENGTH_DEVIATION), 16, FLAGS.max_len - 1)
    token = int(self._rng.integers(FLAGS.vocab_size))
    self._scheduler.submit(Request((token,), max_new_tokens=max(1, int(length * part))))

  def run(self, seconds: float | None = None, ticks: int | None = None) -> dict[str, float]:
    """Generates for so many seconds or ticks; what was done, as `Statistics.summary` has it."""
    statistics_before = self._scheduler.statistics
    fresh = type(statistics_before)(
      statistics_before.slots, statistics_before.lanes, statistics_before.boundary_lanes_each
    )
    self._scheduler.statistics = fresh
    while fresh.seconds < seconds if seconds else fresh.ticks < ticks:
      for _ in range(4):
        self._submit()
      self._scheduler.step()
      while len(self._scheduler._queue) > 8:
        self._scheduler._queue.pop()
    return fresh.summary() | {'ticks': fresh.ticks}


def _rows(contenders: dict[str, Contender], measured: dict[str, list[dict[str, float]]]) -> list[list[str]]:
  rows, vanilla = [], {}
  for name, contender in contenders.items():
    found = {key: statistics.median(entry[key] for entry in measured[name]) for key in measured[name][0]}
    config, engine = contender.config, contender.engine
    depth = config.num_layers - 2 * config.unique_ends
    required = 2 * config.unique_ends + depth // cache_lib.num_steps(config) * found['mean_depth']
    if config.kind == 'vanilla':
      vanilla[config.num_layers] = found['tokens_per_second']
    base = vanilla[config.num_layers]
    ratio, bound = found['tokens_per_second'] / base, config.num_layers / required
    rows.append(
      [
        name,
        engine.slots,
        engine.batches.block,
        f'{engine.cache_bytes() / 1e6:.1f}',
        f'{found["tokens_per_second"]:,.0f}',
        f'{found["mean_depth"]:.2f}',
        f'{ratio:.3f}',
        f'{bound:.3f}',
        f'{ratio / bound:.0%}',
        f'{found["lane_occupancy"]:.1%}',
        f'{found["boundary_occupancy"]:.1%}',
        f'{found["seconds"] / found["ticks"] * 1e3:.1f}',
      ]
    )
  return rows


# ---- against Hugging Face ----


def _against_huggingface() -> None:
  import torch
  from transformers import LlamaConfig, LlamaForCausalLM

  cores = torch.get_num_threads()
  shape_135m = {
    'vocab_size': 49152,
    'hidden_size': 576,
    'intermediate_size': 1536,
    'num_hidden_layers': 30,
    'num_attention_heads': 9,
    'num_key_value_heads': 3,
    'tie_word_embeddings': True,
    'max_position_embeddings': 2048,
  }
  theirs = LlamaForCausalLM(LlamaConfig(**shape_135m, bos_token_id=None, eos_token_id=None)).eval()
  config = (
    Config()
    .replace(
      model={
        'kind': 'vanilla',
        'num_layers': 30,
        'd_model': 576,
        'num_heads': 9,
        'num_kv_heads': 3,
        'mlp_dim': 1536,
        'vocab_size': 49152,
        'dtype': 'float32',
      }
    )
    .model
  )
  model = Transformer(config)
  variables = random_variables(model)
  rows, prompt = [], np.random.default_rng(0).integers(0, 49152, 16)
  for size in (1, 16):
    engine = Engine(
      model, variables, slots=size, max_len=16 + FLAGS.new_tokens, boundary_lanes=size, chunks=(16,)
    )
    request = Request(tuple(prompt.tolist()), max_new_tokens=FLAGS.new_tokens)

    def ours(engine=engine, request=request, size=size):
      return Scheduler(engine, ticks_per_call=FLAGS.new_tokens).run([request] * size)

    def huggingface(size=size):
      tokens = torch.tensor(np.tile(prompt, (size, 1)))
      options = {'max_new_tokens': FLAGS.new_tokens, 'min_new_tokens': FLAGS.new_tokens, 'do_sample': False}
      with torch.inference_mode():
        return theirs.generate(tokens, attention_mask=torch.ones_like(tokens), pad_token_id=0, **options)

    seconds = {ours: [], huggingface: []}
    for index in range(FLAGS.rounds + 1):
      for side, taken in seconds.items():
        begin = time.perf_counter()
        side()
        if index:  # the first round warms up
          taken.append(time.perf_counter() - begin)
    speeds = [size * FLAGS.new_tokens / statistics.median(taken) for taken in seconds.values()]
    rows.append([size, *(f'{speed:,.1f}' for speed in speeds), f'{speeds[0] / speeds[1]:.2f}'])
  columns = ('batch', 'mor_jax, tokens/s', 'transformers, tokens/s', 'ratio')
  settings = {
    'new_tokens': FLAGS.new_tokens,
    'rounds': FLAGS.rounds,
    'torch threads': cores,
    'torch': torch.__version__,
  }
  Console().print(
    results.keep('decode_huggingface', columns, rows, settings), highlight=False, soft_wrap=True
  )


if __name__ == '__main__':
  cli.run(main, __doc__, with_config=False)
