"""What the depth study (`benchmarks/depth.py`) compares: its parts, and the contenders of each."""

import dataclasses
from typing import Any

from mor_jax import cli
from mor_jax.config import ConfigError

HOPS = 4
GATE = {'model.router_target': 'gate'}
CHOOSES = {'model.gating': 'residual', 'model.kv': 'shared', 'model.random_gate': 1.0}
RANDOM = {**GATE, **CHOOSES, 'model.random_router': True, 'model.causality': 'none'}
MAIN = ('benefit', 'gate', 'random', 'recursive', 'recursive_flops', 'vanilla_flops', 'one_flops')


@dataclasses.dataclass(frozen=True)
class Contender:
  """A row of the study.

  Attributes:
    name: of its runs.
    title: in tables.
    overrides: settings in which it differs from the part's.
    equal: 'tokens', or 'flops' where it gets as many FLOPs as the part's own model instead.
    tuned_as: whose learning rate it takes; None: it is tuned itself.
    routers: other ways of choosing depths that its weights are evaluated with.
    is_ablation: trained with fewer seeds.
  """

  name: str
  title: str
  overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
  equal: str = 'tokens'
  tuned_as: str | None = None
  routers: tuple[str, ...] = ()
  is_ablation: bool = False


@dataclasses.dataclass(frozen=True)
class Part:
  """A part of the study.

  Attributes:
    config: what all contenders start from; it says what is equal.
    settings: changes of it.
    contenders: what is compared.
    is_task: whether difficulty is known, else it is text (`--source`).
    seeds: of the final runs, if no flag says otherwise.
  """

  config: str
  settings: dict[str, Any]
  contenders: tuple[Contender, ...]
  is_task: bool = True
  seeds: int = 5

  @property
  def mean_depth(self) -> float:
    """Recursions of a token in the mean, as the capacities of its MoR models say."""
    if not self.is_task:
      return (TEXT_RECURSIONS + 1) / 2  # by default the capacities fall in equal steps
    return sum(cli.load_config(self.config, self.settings).model.step_capacities)

  def chosen(self, names: list[str]) -> list[Contender]:
    """The contenders of these names, none: all.

    Raises:
      ConfigError: the part has none of such a name.
    """
    known = [one.name for one in self.contenders]
    for name in set(names) - set(known):
      raise ConfigError(f'--only={name} must be of {", ".join(known)}')
    return [one for one in self.contenders if not names or one.name in names]


def on_tasks() -> tuple[Contender, ...]:
  """Contenders for a task whose questions need up to HOPS steps."""
  everything = (1.0,) * HOPS
  without = {**GATE, 'model.capacities': None, 'model.capacity_warmup_steps': 0}
  recursive = {**without, 'model.kind': 'recursive', 'model.kv': 'shared'}
  vanilla = {**without, 'model.kind': 'vanilla'}
  shallow = {**vanilla, 'model.num_layers': HOPS // 2}
  one = {**without, 'model.kind': 'recursive', 'model.num_recursions': 1, 'model.num_layers': 1}

  def ablation(name: str, title: str, changes: dict[str, Any], of: str = 'benefit', **options) -> Contender:
    return Contender(name, title, changes, tuned_as=of, is_ablation=True, **options)

  return (
    Contender('benefit', 'MoR, benefit', routers=('random', 'oracle')),
    Contender('gate', 'MoR as shipped', GATE),
    Contender('random', 'MoR, random choice, gate 1', RANDOM, routers=('oracle',)),
    Contender('recursive', 'recursive', recursive, routers=('confidence', 'oracle')),
    Contender('recursive_flops', 'recursive', recursive, equal='flops', routers=('confidence',)),
    Contender('vanilla', f'vanilla, {HOPS} layers', vanilla),
    Contender('vanilla_flops', f'vanilla, {HOPS} layers', vanilla, equal='flops'),
    Contender('shallow_flops', f'vanilla, {HOPS // 2} layers', shallow, equal='flops'),
    Contender('one_flops', 'one recursion', one, equal='flops'),
    ablation('benefit_all_rows', 'MoR, benefit, labels on all rows', {'model.benefit_rows': 1.0}),
    ablation('benefit_hybrid', 'MoR, benefit, hybrid KV', {'model.kv': 'hybrid'}),
    ablation('benefit_recursion_wise', 'MoR, benefit, recursion-wise KV', {'model.kv': 'recursion_wise'}),
    ablation('benefit_no_noise', 'MoR, benefit, no noise', {'model.router_noise': 0.0}),
    ablation('benefit_prior', 'MoR, benefit, depth prior', {'model.depth_prior_weight': 1.0}),
    ablation(
      'gate_residual',
      'MoR, gate, residual at strength 1, shared KV',
      {**GATE, 'model.gating': 'residual', 'model.router_alpha': 1.0, 'model.kv': 'shared'},
      of='gate',
    ),
    ablation(
      'readouts',
      'recursive, readouts on a quarter of the rows',
      {**recursive, 'train.readout_rows': 0.25},
      of='recursive',
      routers=('confidence',),
    ),
    ablation(
      'growing',
      'recursive, growing',
      {**recursive, 'train.growth': tuple((i + 1) / (2 * HOPS) for i in range(HOPS - 1))},
      of='recursive',
    ),
    ablation('all', 'MoR, all tokens', {**RANDOM, 'model.capacities': everything}, of='recursive'),
  )


def _some(contenders: tuple[Contender, ...]) -> tuple[Contender, ...]:
  return tuple(one for one in contenders if one.name in MAIN)


# ---- text ----

TEXT = 'configs/study.py:vanilla'
TEXT_RECURSIONS = 3
TEXT_SETTINGS = {
  'model.num_layers': 5,
  'model.num_recursions': TEXT_RECURSIONS,
  'model.d_model': 64,
  'model.num_heads': 4,
  'model.num_kv_heads': 4,
  'model.mlp_dim': 192,
  'data.vocab_size': 512,
  'data.seq_len': 128,
  'train.global_batch': 16,
  'train.eval_rows': 256,
  'train.eval_every': 1000,
  'train.log_every': 100,
  'checkpoint.every_steps': 1000,
}
SMALL, MIDDLE, LARGE = (
  {'model.init': 'scaled', 'model.init_std': std, 'model.embed_std': 0.1} for std in (0.02, 0.06, 0.12)
)
INITS: dict[str, dict[str, Any]] = {
  'plain': {},
  'plain, embeddings 0.1': {'model.embed_std': 0.1},
  'plain, embeddings 0.3': {'model.embed_std': 0.3},
  'scaled': {**SMALL, 'model.embed_std': 0.02},
  'scaled, embeddings 0.1': SMALL,
  'scaled, embeddings 0.3': {**SMALL, 'model.embed_std': 0.3},
  'scaled from 0.06, embeddings 0.1': MIDDLE,
  'scaled from 0.12, embeddings 0.1': LARGE,
  'plain from 0.06, embeddings 0.1': {'model.init_std': 0.06, 'model.embed_std': 0.1},
}
DEFAULT = {'model.init': 'scaled'}
KINDS = {
  'vanilla': {},
  'recursive': {'model.kind': 'recursive'},
  'gate': {'model.kind': 'mor'},
  'benefit': {'model.kind': 'mor', 'model.router_target': 'benefit'},
}


def of_inits() -> tuple[Contender, ...]:
  """Every kind of model with every initialisation."""
  return tuple(
    Contender(f'{kind}_{index}', f'{kind}, {title}', {**changes, **KINDS[kind]})
    for kind in ('vanilla', 'gate', 'benefit')
    for index, (title, changes) in enumerate(INITS.items())
  )


def on_text() -> tuple[Contender, ...]:
  """Contenders for prose, which start from the default."""
  vanilla, recursive, gate, benefit = ({**DEFAULT, **changes} for changes in KINDS.values())
  random = {**DEFAULT, **RANDOM, 'model.kind': 'mor'}
  layers = TEXT_SETTINGS['model.num_layers']
  shallow = {**vanilla, 'model.num_layers': layers - TEXT_RECURSIONS + 1}
  return (
    Contender('vanilla', f'vanilla, {layers} layers', vanilla),
    Contender(
      'shallow_flops',
      f'vanilla, {shallow["model.num_layers"]} layers',
      shallow,
      equal='flops',
      tuned_as='vanilla',
    ),
    Contender('recursive', 'recursive', recursive, routers=('confidence', 'random', 'oracle')),
    Contender(
      'readouts',
      'recursive, readouts on a quarter of the rows',
      {**recursive, 'train.readout_rows': 0.25},
      tuned_as='recursive',
      routers=('confidence', 'random', 'oracle'),
    ),
    Contender('gate', 'MoR as shipped', gate, routers=('random', 'oracle')),
    Contender('gate_flops', 'MoR as shipped', gate, equal='flops', tuned_as='gate'),
    Contender('benefit', 'MoR, benefit', benefit, routers=('random', 'oracle')),
    Contender('benefit_flops', 'MoR, benefit', benefit, equal='flops', tuned_as='benefit'),
    Contender('random', 'MoR, random choice, gate 1', random, tuned_as='benefit', routers=('oracle',)),
  )


def of_first_study() -> tuple[Contender, ...]:
  """Models of the first study (`benchmarks/study.py`) from its initial weights and from better ones."""
  starts = {'plain': INITS['plain'], 'plain_embeddings': INITS['plain, embeddings 0.1'], 'scaled': DEFAULT}
  return tuple(
    Contender(f'{kind}_{start}', f'{kind}, {start.replace("_", ", larger ")}', {**changes, **KINDS[kind]})
    for kind in ('vanilla', 'gate')
    for start, changes in starts.items()
  )


CHASE = 'configs/depth.py:benefit'
PARTS = {
  'shown': Part(CHASE, {}, on_tasks()),
  'hidden': Part(
    CHASE,
    {
      'data.source': 'synthetic:chase,nodes=12,hops=4,questions=16,hidden=true',
      'data.seq_len': 33,
      'model.capacities': (1.0, 0.364, 0.243, 0.122),
      'train.steps': 3500,
    },
    _some(on_tasks()),
  ),
  'automaton': Part(
    CHASE,
    {
      'data.source': 'synthetic:automaton,states=8,letters=2,hops=4,questions=16',
      'data.seq_len': 33,
      'model.embed_factor': 8,
      'model.capacities': (1.0, 0.364, 0.243, 0.122),
      'model.capacity_warmup_steps': 1500,
      'train.steps': 4000,
    },
    _some(on_tasks()),
  ),
  'init': Part(TEXT, {**TEXT_SETTINGS, 'train.steps': 500}, of_inits(), is_task=False, seeds=1),
  'first': Part(TEXT, {'train.steps': 500}, of_first_study(), is_task=False, seeds=2),
  'text': Part(
    TEXT,
    {**TEXT_SETTINGS, 'train.steps': 3000},
    on_text(),
    is_task=False,
    seeds=3,
  ),
}
