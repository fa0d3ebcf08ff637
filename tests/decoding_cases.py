"""Models for tests of decoding: every router with every KV strategy, every kind of sharing and gate.

Seeds and slack are chosen so that every depth takes a tenth of the tokens or more, that limited regions are full
before the end, and that no choice hangs on rounding: `assert_choices_show_something` holds them to it.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.inference.requests import Result
from mor_jax.model import router
from mor_jax.model.cached_attention import READS
from tests import tiny, tiny_engine

MAX_LEN = 216
PROMPTS = (1, 14, 90, 5)  # none of it, less than a chunk, several chunks
MARGIN = 1e-3  # that every number a choice hangs on keeps from the border
SMALLEST_SHARE = 0.1  # of the tokens, at every depth

ADAPTED = {'lora_rank': 2, 'lora_sharing': 'one', 'lora_layers': 'all'}
RELAXED = {'lora_rank': 2, 'share_norms': False}
EXPERT = {'num_layers': 5, 'num_recursions': 3, 'router_alpha': 0.8}
AUXILIARY = {**EXPERT, 'causality': 'aux_router', 'router_head': 'mlp', 'gating': 'residual'}
MOVING = {**EXPERT, 'selection': 'ema_threshold', 'router_temperature': 0.2}
NOT_ALL_ENTER = {'num_layers': 8, 'capacities': (0.8, 0.6, 0.5)}
BENEFIT = {
  'num_layers': 5,
  'num_recursions': 3,
  'router_target': 'benefit',
  'embed_factor': 8,
  'router_temperature': 0.05,
}
RANDOM = {**EXPERT, 'random_router': True, 'causality': 'none'}
TOKEN = {'num_layers': 5, 'num_recursions': 3, 'router': 'token_choice', 'router_temperature': 0.1}
LIMITED = {**TOKEN, 'token_capacity_factor': 1.0}


@dataclasses.dataclass(frozen=True)
class Case:
  """A model and how the engine runs it.

  Attributes:
    change: settings of the model.
    seed: of its variables.
    slack: places of a step per token expected.
    options: how the engine compiles and reads.
    is_slow: too long for the default suite.
  """

  change: dict[str, Any]
  seed: int = 0
  slack: float = 1.0
  options: dict[str, Any] = dataclasses.field(default_factory=dict)
  is_slow: bool = True


LANES, GATHER, GROUPS, UNROLL = *({'read': read} for read in READS), {'unroll': True}

CASES = {
  'vanilla': Case({'kind': 'vanilla'}, options=UNROLL | LANES, is_slow=False),
  'vanilla adapted': Case({'kind': 'vanilla', 'kv': 'shared', **ADAPTED}, options=GROUPS),
  'vanilla cycle': Case({'kind': 'vanilla', 'sharing': 'cycle'}, options=GATHER),
  'vanilla shared': Case({'kind': 'vanilla', 'kv': 'shared'}, options=LANES),
  'vanilla shared sequence': Case(
    {'kind': 'vanilla', 'kv': 'shared', 'sharing': 'middle_sequence'}, options=UNROLL
  ),
  'recursive': Case({'kind': 'recursive'}, options=GROUPS),
  'recursive relaxed': Case({'kind': 'recursive', **RELAXED, 'recursion_encoding': True}, options=UNROLL),
  'recursive shared': Case({'kind': 'recursive', 'kv': 'shared'}, options=GATHER),
  'recursive sequence': Case({'kind': 'recursive', 'sharing': 'sequence', **RELAXED}, options=GATHER),
  'recursive sequence adapted': Case(
    {'kind': 'recursive', 'sharing': 'middle_sequence', **ADAPTED}, options=GATHER
  ),
  'recursive sequence shared': Case(
    {'kind': 'recursive', 'sharing': 'middle_sequence', 'kv': 'shared', **RELAXED}, options=GATHER
  ),
  'expert': Case(EXPERT, 9, 0.8, UNROLL),
  'expert relaxed': Case({**EXPERT, **RELAXED, 'recursion_encoding': True}, 3, 1.0, LANES),
  'expert adapted': Case({**EXPERT, **RELAXED, **ADAPTED}, 4, 1.0, UNROLL),
  'expert adapted ends': Case({**EXPERT, **RELAXED, 'lora_layers': 'all'}, 3, 1.0, LANES),
  'expert cycle additive': Case(
    {'sharing': 'cycle', 'num_recursions': 3, 'gating': 'additive'}, 2, 0.8, GROUPS
  ),
  'expert untied': Case(
    {'num_layers': 8, 'num_recursions': 3, 'tie_embeddings': False, 'router_head': 'wide_mlp'}, 6, 0.8
  ),
  'expert shared': Case({**EXPERT, 'kv': 'shared'}, 6, 0.8, GATHER | UNROLL, is_slow=False),
  'expert hybrid': Case({**EXPERT, 'kv': 'hybrid'}, 6, 0.8, UNROLL),
  'auxiliary': Case(AUXILIARY, 37, 0.8, GROUPS),
  'auxiliary shared': Case({**AUXILIARY, 'kv': 'shared'}, 37, 0.8, GATHER),
  'auxiliary hybrid': Case({**AUXILIARY, 'kv': 'hybrid'}, 37, 0.8),
  'moving threshold': Case({**MOVING, **NOT_ALL_ENTER}, 14, 0.65, GROUPS),
  'moving threshold shared': Case({**MOVING, 'kv': 'shared'}, 1, 0.8, LANES),
  'moving threshold hybrid': Case({**MOVING, 'kv': 'hybrid'}, 1, 0.8),
  'benefit': Case(BENEFIT, 36, 0.9, GROUPS, is_slow=False),
  'benefit hybrid': Case({**BENEFIT, 'kv': 'hybrid', 'gating': 'additive'}, 2, 0.9, GATHER),
  'random': Case(RANDOM, 0, 0.55, GATHER),
  'random shared': Case({**RANDOM, 'kv': 'shared'}, 0, 0.55, GROUPS),
  'random hybrid': Case({**RANDOM, 'kv': 'hybrid'}, 0, 0.55),
  'token': Case(TOKEN, 1, 1.0, UNROLL),
  'token shared': Case({**TOKEN, 'kv': 'shared'}, 10, 1.0, GROUPS),
  'token limited': Case(LIMITED, 1, 1.0, LANES, is_slow=False),
  'token limited shared': Case({**LIMITED, 'kv': 'shared'}, 3, 1.0, GATHER),
  'token random': Case({**LIMITED, 'random_router': True, 'balancing': 'none'}, 1, 1.0, GROUPS),
  'token every step': Case(
    {**LIMITED, 'token_gating': 'every_step', 'balancing': 'loss_free', **RELAXED}, 1, 1.0, LANES
  ),
}
NAMES = [pytest.param(name, marks=pytest.mark.slow) if CASES[name].is_slow else name for name in CASES]


def build(case: Case):
  """The model and its variables, in which a moving threshold and a balancing bias are not 0."""
  made, variables = tiny.model(seed=case.seed, **case.change)
  if not variables.get('routing'):
    return made, variables
  routing = {name: leaf + 0.02 * (1 + jnp.arange(len(leaf))) for name, leaf in variables['routing'].items()}
  return made, {**variables, 'routing': routing}


def decode(
  case: Case, made, variables, drafting: bool | None = None, **options
) -> tuple[tiny_engine.KeepingScheduler, list[Result]]:
  """Random continuations of PROMPTS up to MAX_LEN, in fewer slots than there are prompts.

  Args:
    drafting: of the scheduler.
    options: of the engine, beside those of the case.
  """
  batches = {'lanes': 2, 'boundary_lanes': 2}
  engine = tiny_engine.engine(
    made, variables, max_len=MAX_LEN, slack=case.slack, keep_logits=True, **batches, **case.options, **options
  )
  scheduler = tiny_engine.KeepingScheduler(engine, ticks_per_call=50, drafting=drafting)
  return scheduler, scheduler.run(tiny_engine.requests(PROMPTS, max_new_tokens=MAX_LEN, temperature=1.0))


def assert_choices_show_something(case: Case, made, variables, rows: list[tiny_engine.Row]) -> None:
  """Every depth in use, and no choice of a router so close that rounding could turn it."""
  config, routing = made.config, variables.get('routing', {})
  depths = np.concatenate([row.full.routing.depth_BT[0, : row.computed] for row in rows])
  shares = np.bincount(depths, minlength=config.recursions + 1) / len(depths)
  possible = shares if config.step_capacities[0] < 1 else shares[1:]
  assert possible.min() >= SMALLEST_SHARE, f'shares of the depths: {shares}'
  if config.router == 'token_choice':
    for row in rows:
      logits_BTR = jnp.moveaxis(row.full.routing.logits_RBT, 0, -1)
      gates_TR = (logits_BTR if config.random_router else router.activate(config, logits_BTR))[0]
      best_T2 = np.sort(gates_TR + routing.get('bias', 0.0), axis=-1)[: row.computed, -2:]
      assert np.diff(best_T2).min() > MARGIN, 'rounding could turn a choice of depth'
    return
  # Whichever of a model's routers decides: no choice turns when the thresholds move.
  threshold_R = routing.get('threshold', jnp.zeros(config.recursions))
  apply = tiny.apply(made, 'threshold')
  for shift in (-MARGIN, MARGIN):
    moved = {**variables, 'routing': {**routing, 'threshold': threshold_R + shift}}
    for row in rows:
      other = apply(moved, jnp.asarray(row.tokens_T[None]), max_len=MAX_LEN, slack=case.slack).routing
      for name in ('selected_RBT', 'overflow_RBT'):
        same = getattr(row.full.routing, name) == getattr(other, name)
        assert same[..., : row.computed].all(), 'rounding could turn a choice of the router'
