"""The shared block, applied up to R times: to all tokens, or to those that a router selects.

The block is one bound module (`stack.stacked_layers`), so that steps share its parameters by construction.
Where all steps have one shape they are an `nn.scan` with the parameters broadcast, and what a step has of its
own comes in on a scanned axis; where shapes differ the block is called once for each step.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from mor_jax.config import ModelConfig
from mor_jax.model import relaxation, sharing
from mor_jax.model.context import TokenContext
from mor_jax.model.memory import HybridMemory, KeysAndValues, Memory, Row, SharedMemory
from mor_jax.model.rotary import rotation
from mor_jax.model.stack import run_layers


class Rule(NamedTuple):
  """How tokens are chosen in a call.

  Attributes:
    routing: 'topk', which looks at the whole row, or 'threshold', which is causal.
    max_len: under threshold routing, the longest sequence that places are counted for.
    slack: under threshold routing, places of a step per token expected (`ModelConfig.step_places`).
    steps: recursions that a token may take, at most R.
    keeps_states: return the residual stream after every recursion, too.
  """

  routing: str
  max_len: int
  slack: float
  steps: int
  keeps_states: bool = False


@struct.dataclass
class Given:
  """Depths that tokens are given in a call; None: the rule decides.

  Attributes:
    depths_BT: recursions that each token takes, whatever routers say and however many others do.
    most_B: recursions that the tokens of a row take at most.
  """

  depths_BT: jax.Array | None = None
  most_B: jax.Array | None = None

  def may_go_on(self, active_BT: jax.Array, step: int | jax.Array) -> jax.Array:
    """Which of the active tokens their row lets take this step, counted from 0."""
    return active_BT if self.most_B is None else active_BT & (self.most_B > step)[:, None]


def make_rule(
  config: ModelConfig,
  length: int,
  routing: str,
  max_len: int | None,
  slack: float | None,
  max_recursions: int | None,
  keeps_states: bool = False,
) -> Rule:
  """The rule for rows of `length` tokens, with the defaults and errors that `Transformer` documents."""
  if routing not in ('topk', 'threshold'):
    raise ValueError(f"routing={routing!r} is not one of 'topk', 'threshold'")
  max_len = length if max_len is None else max_len
  if max_len < length:
    raise ValueError(f'max_len={max_len} is shorter than the row of {length} tokens')
  steps = config.recursions if max_recursions is None else max_recursions
  if not (1 <= steps < config.recursions and config.can_stop_early) and steps != config.recursions:
    raise ValueError(
      f'max_recursions={steps} is not possible with {config.recursions} recursions and sharing={config.sharing}'
    )
  return Rule(routing, max_len, config.threshold_slack if slack is None else slack, steps, keeps_states)


def limits(config: ModelConfig, rule: Rule, length: int) -> tuple[int, ...]:
  """Tokens that each of the R steps can take: of a row under 'topk', of a sequence under 'threshold'."""
  if rule.routing == 'topk':
    return config.selected_tokens(length)
  return config.step_places(rule.max_len, rule.slack)


@struct.dataclass
class Remembered:
  """Keys and values (N, B, S, K, E) of the N layers of a pass, and whose they are."""

  keys_and_values: KeysAndValues
  context: TokenContext


def repeat(
  block: nn.Module, own_R: dict, x_BTD: jax.Array, context: TokenContext, rule: Rule, given: Given
) -> tuple[jax.Array, jax.Array | None]:
  """Applies the block `rule.steps` times, or under `sequence` sharing each of its layers R times.

  Args:
    own_R: what each step has of its own (`relaxation.Steps`).
    given: where tokens stop.

  Returns:
    The residual stream, and those after each recursion (R, B, T, D) if the rule keeps them.
  """
  config = block.config
  rotates_N = sharing.rotating(config, 'block')
  if config.sharing.endswith('cycle'):
    own_steps = jax.tree.map(lambda leaf_R: leaf_R[: rule.steps], own_R)
    return _repeat_layers(block, own_steps, rotates_N, x_BTD, context, rule, given)

  def repeat_layer(layer, x_BTD, own_and_rotates):
    own_R, rotates_1 = own_and_rotates
    own_R = jax.tree.map(lambda leaf_R: leaf_R[:, None], own_R)
    return _repeat_layers(layer, own_R, rotates_1, x_BTD, context, rule, given, count=1)

  own_N = jax.tree.map(lambda leaf_RN: leaf_RN.swapaxes(0, 1), own_R)
  per_layer = own_N, None if rotates_N is None else rotates_N[:, None]
  layer_by_layer = _scan_parts(config, repeat_layer, config.shared_depth)
  return _with_parameters(lambda leaf_N: leaf_N[:, None], layer_by_layer)(block, x_BTD, per_layer)[0], None


def _repeat_layers(layers, own_R, rotates_N, x_BTD, context, rule, given, count=None):
  """Passes over the same `count` layers, all of the block by default."""
  count = count or layers.config.shared_depth

  def one_pass(layers, carry, own_and_step):
    x_BTD, remembered = carry
    own, step = own_and_step
    encoded_BTD = relaxation.encode(x_BTD, own)
    y_BTD, remembered = run_pass(layers, own, encoded_BTD, context, remembered, count, rotates_N)
    if given.depths_BT is not None:  # who left keeps its stream, of which others still read keys and values
      y_BTD = jnp.where((given.depths_BT > step)[..., None], y_BTD, x_BTD)
    if given.most_B is not None:
      y_BTD = jnp.where((given.most_B > step)[:, None, None], y_BTD, x_BTD)
    return (y_BTD, remembered), y_BTD if rule.keeps_states else None

  per_step = own_R, jnp.arange(rule.steps)
  (x_BTD, _), states = scan_steps(layers, one_pass, (x_BTD, None), per_step, rule.steps)
  return x_BTD, states


def share_memory(block: nn.Module, x_BTD: jax.Array, context: TokenContext) -> jax.Array:
  """Layers of their own parameters, which in every pass but the first read keys and values of the first.

  Under `cycle` layer n of each pass reads those of layer n of the first pass; under
  `sequence` the layers of a group follow one another and read those of its first.
  """
  config, passes = block.config, block.config.passes
  rotates_N = sharing.rotating(config, 'block')

  def run_passes(layers_Rn, x_BTD, rotates_Rn, count):
    def one_pass(layers_n, carry, rotates_n):
      x_BTD, remembered = carry
      return run_pass(layers_n, {}, x_BTD, context, remembered, count, rotates_n), None

    def first(leaf_Rn):
      return leaf_Rn[0]

    def rest(leaf_Rn):
      return leaf_Rn[1:]

    start = (x_BTD, None), jax.tree.map(first, rotates_Rn)
    carry = _with_parameters(first, one_pass)(layers_Rn, *start)[0]
    others = _scan_parts(config, one_pass, passes - 1)
    return _with_parameters(rest, others)(layers_Rn, carry, jax.tree.map(rest, rotates_Rn))[0][0]

  parts = config.shared_depth // passes
  is_cycle = config.sharing.endswith('cycle')

  def cut(leaf_N):
    sizes = (passes, parts) if is_cycle else (parts, passes, 1)
    return leaf_N.reshape(*sizes, *leaf_N.shape[1:])

  run = partial(run_passes, count=parts)
  if not is_cycle:

    def run_group(layers, x_BTD, rotates):
      return run_passes(layers, x_BTD, rotates, count=1), None

    scanned = _scan_parts(config, run_group, parts)

    def run(*inputs):
      return scanned(*inputs)[0]

  return _with_parameters(cut, run)(block, x_BTD, jax.tree.map(cut, rotates_N))


def run_step(
  block: nn.Module,
  own: dict,
  x_BCD: jax.Array,
  context: TokenContext,
  indices_BC: jax.Array,
  chosen_BC: jax.Array,
  remembered: Remembered | None,
) -> tuple[jax.Array, Remembered | None]:
  """One pass of the block over C tokens of each row, with the keys and values `config.kv` asks for.

  Args:
    own: what this step has of its own (`relaxation.Steps`).
    x_BCD: the tokens' residual stream.
    context: positions and segments of the tokens.
    indices_BC: their places in the row, ascending.
    chosen_BC: which of them take the step; the others only fill the static size, and no token sees them.
    remembered: what the step before returned; None at the first.

  Returns:
    The block's output, and what the next step is to be given.
  """
  context, x_BCD = context.only(chosen_BC), relaxation.encode(x_BCD, own)
  count, rotates_N = block.config.shared_depth, sharing.rotating(block.config, 'block')
  return run_pass(block, own, x_BCD, context, remembered, count, rotates_N, (indices_BC, chosen_BC))


def run_pass(
  layers: nn.Module,
  own: dict,
  x_BCD: jax.Array,
  context: TokenContext,
  remembered: Remembered | None,
  count: int,
  rotates_N: jax.Array | None,
  places: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, Remembered | None]:
  """A pass over `count` layers: its output, and what the next pass is to be given.

  Args:
    rotates_N: whether each layer rotates queries and keys; None: all do.
    places: where the tokens stand in the row and which of them are chosen; None: all tokens of it, of which
      under `kv=hybrid` nothing of an earlier pass would be left to read.
  """
  config = layers.config
  shares = config.kv == 'shared' or (config.kv == 'hybrid' and places is not None)
  memory: Memory = Row(context, remembers=shares)
  if shares and remembered is not None:
    memory = SharedMemory(context, remembered.context)
    if config.kv == 'hybrid':
      memory = HybridMemory(context, remembered.context, *places)
  run = partial(run_layers, count=count)
  if config.remat == 'block':
    run = nn.remat(run)
  turns = rotation(config, context.positions_BC)
  kept = None if remembered is None else remembered.keys_and_values
  x_BCD, kept = run(layers, x_BCD, memory, turns, kept=kept, own=own, rotates=rotates_N)
  if kept is None:
    return x_BCD, remembered
  return x_BCD, Remembered(kept, context if remembered is None else remembered.context)


# ---- lifted transformations ----


def scan_steps(
  layers: nn.Module, step: Callable, carry: tuple, per_step: Any, steps: int
) -> tuple[tuple, Any]:
  """Scans `step(layers, carry, inputs)` over so many recursions, which all use the same parameters.

  The last entry of the carry is what is remembered. Where keys and values are shared, the first step turns a carry
  without it into one with it, so it stands apart.
  """
  config = layers.config

  def scanned(length):
    return nn.scan(
      step,
      variable_broadcast='params',
      split_rngs={'params': False},
      length=length,
      unroll=config.unroll_layers,
      check_constancy_invariants=False,  # the check would trace every step once more
    )

  if config.kv == 'recursion_wise':
    return scanned(steps)(layers, carry, per_step)
  carry, first = step(layers, carry, jax.tree.map(lambda leaf_R: leaf_R[0], per_step))
  others = jax.tree.map(lambda leaf_R: leaf_R[1:], per_step)
  if steps == 1:
    return carry, jax.tree.map(lambda one: one[None], first)
  carry, rest = scanned(steps - 1)(layers, carry, others)
  return carry, jax.tree.map(lambda one, more: jnp.concatenate([one[None], more]), first, rest)


def _scan_parts(config: ModelConfig, function: Callable, length: int) -> Callable:
  """`function(layers, carry, inputs)`, scanned over parts of a stack along the leading axis of its parameters."""
  return nn.scan(
    function,
    variable_axes={'params': 0},
    split_rngs={'params': False},
    length=length,
    unroll=config.unroll_layers,
    check_constancy_invariants=False,
  )


def _with_parameters(change: Callable[[jax.Array], jax.Array], function: Callable) -> Callable:
  """`function(layers, ...)`, which sees every leaf of the layers' parameters changed so."""

  def prepare(variables):
    return {'params': jax.tree.map(change, nn.unbox(variables['params']))}

  return nn.map_variables(function, 'params', trans_in_fn=prepare)
