"""The least time of a token on TPUs: the engine's own programs, compiled for chips that need not be there.

  python -m benchmarks.roofline [--sizes=360m,1p7b] [--contexts=512,2048,8192] [--topologies=v5e:1x1,v6e:1x1,v5p:1x1x1]

Every model has as many texts as fit into the memory of the chip beside its weights, all of them at full length, in
bfloat16, caches too, which are written. A program takes at least the larger of its bytes over the bandwidth of the memory
and its FLOPs over the peak of the chip (`mor_jax/planning/chips.py` has both, from data sheets); a token takes passes of
the block and of the boundary as often as its depth needs, lanes out of use included. Depths are those of the
capacities: every depth equally often. Requests are greedy; prompts are left out.

The second table is of drafts of K tokens: what a round must give, of at most K + 1 tokens, to be as fast as ticks.
Writes benchmarks/results/roofline and roofline_drafts; results that are there are not repeated.
"""

from collections.abc import Iterator

from absl import flags

from benchmarks import ahead
from mor_jax import cli
from mor_jax.units import quantity

FLAGS = flags.FLAGS
flags.DEFINE_list('sizes', ['360m', '1p7b'], 'configs')
flags.DEFINE_list(
  'contexts', ['2048', '512', '8192'], 'longest texts; on other chips than the first, its first alone'
)
flags.DEFINE_list('topologies', ['v5e:1x1', 'v6e:1x1', 'v5p:1x1x1'], 'chips')
flags.DEFINE_list('drafts', ['4'], 'tokens of a draft, on the first chip at the first context')
flags.DEFINE_boolean('again', False, 'repeat what is in results/ already')

MODELS = {**ahead.MODELS, 'mor R=4': ('', ['--config.model.num_recursions=4'])}
VOCABULARY = 49152  # of SmolLM
GOALS = {'mor R=3': 2.06, 'mor R=4': 2.5}  # the paper's, without the writing of caches


def main() -> None:
  """Compiles all programs and writes both tables."""
  programs = {}
  for size in FLAGS.sizes:
    for number, topology in enumerate(FLAGS.topologies):
      for context in FLAGS.contexts[: 1 if number else None]:
        for model in MODELS:
          programs[f'{size}, {topology}, {context}, {model}'] = _flags(size, topology, context, model)
  settings = {'caches': 'bfloat16, written', 'texts': 'as many as fit, all at full length'}
  ahead.compile_all('roofline', programs, _table, settings, FLAGS.again)

  drafts = {}
  topology, context = FLAGS.topologies[0], FLAGS.contexts[0]
  for length in filter(None, FLAGS.drafts):
    for slots in (None, 1):
      for model in (name for name in MODELS if name != 'vanilla'):
        more = [f'--speculate={length}', *([f'--slots={slots}'] if slots else [])]
        label = f'360m, {topology}, {context}, {model}, K={length}, {slots or "most"}'
        drafts[label] = _flags('360m', topology, context, model) + more
  ahead.compile_all('roofline_drafts', drafts, _drafts_table, settings, FLAGS.again)


def _flags(size: str, topology: str, context: str, model: str) -> list[str]:
  variant, more = MODELS[model]
  return [
    f'--config=configs/{size}.py{variant}',
    *more,
    f'--config.model.vocab_size={VOCABULARY}',
    f'--topology={topology}',
    '--program=decode',
    f'--max_len={context}',
  ]


def _bytes_of_token(one: ahead.Compiled) -> dict[str, float]:
  """Bytes moved for a token: weights of the layers, keys and values, the head, and all else."""
  found = {'all': 0.0, 'weights': 0.0, 'caches': 0.0, 'head': 0.0}
  for name, times in (('block', one['ticks_per_token']), ('boundary', one['boundaries_per_token'])):
    program = one['programs'][name]
    for part, size in {'all': program['traffic_bytes'], **program['parts']}.items():
      found[part] += times * size
  found['others'] = found['all'] - found['weights'] - found['caches'] - found['head']
  return found


def _table(programs: dict[str, ahead.Compiled]):
  columns = (
    'size',
    'chip',
    'context',
    'model',
    'texts',
    'lanes',
    'block',
    'boundary',
    'a token',
    'keys and values',
    'weights',
    'head',
    'others',
    'FLOPs of a token',
    'tokens/s at most',
    'ratio',
    'goal',
    'by keys and values alone',
  )
  return columns, list(_rows(programs))


def _rows(programs: dict[str, ahead.Compiled]) -> Iterator[list[str]]:
  for label, one in programs.items():
    size, topology, context, model = label.split(', ')
    moved, vanilla = _bytes_of_token(one), programs[f'{size}, {topology}, {context}, vanilla']
    flops = one['ticks_per_token'] * one['programs']['block']['flops']
    flops += one['boundaries_per_token'] * one['programs']['boundary']['flops']
    caches = _bytes_of_token(vanilla)['caches'] / moved['caches']
    yield [
      size,
      topology.partition(':')[0],
      context,
      model,
      one['slots'],
      f'{one["block_lanes"]}, {one["boundary_lanes"]}',
      *(_pass(one['programs'][name]) for name in ('block', 'boundary')),
      *(_mega(moved[part]) for part in ('all', 'caches', 'weights', 'head', 'others')),
      quantity(flops),
      f'{one["tokens_per_second"]:,.0f}',
      f'{one["tokens_per_second"] / vanilla["tokens_per_second"]:.2f}',
      GOALS.get(model, ''),
      f'{caches:.2f}',
    ]


def _pass(program: dict) -> str:
  return f'{program["traffic_bytes"] / 1e9:.2f} GB, {program["seconds"] * 1e3:.2f} ms'


def _mega(size: float) -> str:
  return f'{size / 1e6:.1f} MB'


def _drafts_table(programs: dict[str, ahead.Compiled]):
  columns = (
    'size',
    'chip',
    'context',
    'model',
    'draft',
    'texts',
    'a round',
    'ticks: tokens/s',
    'all right: tokens/s',
    'tokens of a round to be as fast',
  )
  rows = []
  for label, one in programs.items():
    size, topology, context, model, draft, _ = label.split(', ')
    round_of, ticks = one['programs']['round'], one['tokens_per_second']
    rounds = one['slots'] / round_of['seconds']  # of a text, in a second
    most = 1 + int(draft.removeprefix('K='))
    row = [size, topology.partition(':')[0], context, model, draft, one['slots'], _pass(round_of)]
    rows.append([*row, f'{ticks:,.0f}', f'{most * rounds:,.0f}', f'{ticks / rounds:.2f} of {most}'])
  return columns, rows


if __name__ == '__main__':
  cli.run(main, __doc__, with_config=False)
