"""Decoder layers, one alone or many as one scan over stacked parameters, and how they are run.

A stack is `nn.scan` over `nn.remat(DecoderLayer)`: one tree of parameters whose leaves have a leading
layer axis, one layer compiled whatever their number.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mor_jax.config import ModelConfig
from mor_jax.model import kernels, relaxation
from mor_jax.model.layers import LAYER_INPUT, DecoderLayer, PerLayer
from mor_jax.model.memory import Memory, Row
from mor_jax.model.rotary import Rotation, rotation

# What the backward pass keeps of a layer beside its input (None: nothing).
_POLICIES = {
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  'full': None,
  'block': None,
  'offload': jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[LAYER_INPUT],
    offload_src='device',
    offload_dst='pinned_host',
  ),
}


def single_layer(config: ModelConfig) -> nn.Module:
  """One decoder layer, recomputed in the backward pass as `config.remat` says."""
  return _rematerialized(config, in_loop=False)(config)


def stacked_layers(config: ModelConfig) -> nn.Module:
  """The block: N = `config.shared_depth` layers, each leaf of their parameters with a leading axis N.

  It takes and returns what one layer does, `PerLayer` and what the memory keeps with a leading layer axis. How
  many layers a call runs is for that axis to say: under `sequence` sharing, passes over one layer at a time.
  """
  cut = config.passes if config.kind == 'vanilla' else 1  # parts of the stack that are run one by one
  at_once = 1 if config.sharing.endswith('sequence') and config.passes > 1 else config.shared_depth // cut
  scanned = nn.scan(
    _rematerialized(config, in_loop=at_once > 1 and not config.unroll_layers),
    variable_axes={'params': 0},
    split_rngs={'params': True},
    in_axes=(0, nn.broadcast, nn.broadcast),
    unroll=config.unroll_layers,
    metadata_params={nn.PARTITION_NAME: 'layers'},
    check_constancy_invariants=False,  # the check would trace every layer once more
  )
  return scanned(config, config.recursions)


def _rematerialized(config: ModelConfig, in_loop: bool) -> type[DecoderLayer]:
  if config.remat == 'none':
    return DecoderLayer
  # The compiler merges what is computed again with what was computed first, unless a loop keeps them apart. It
  # makes no loop of a single layer, and would then keep all activations of the first and the last.
  return nn.remat(DecoderLayer, prevent_cse=not in_loop, policy=_POLICIES[config.remat])


def make_parameters(layers: nn.Module, memory: Row, count: int | None = None) -> None:
  """Runs a layer, or a stack of `count`, on tokens of zeros, as `init` needs it."""
  config, positions_BC = layers.config, memory.context.positions_BC
  x_BCD = jnp.zeros((*positions_BC.shape, config.d_model), config.dtype)
  index = jnp.zeros(() if count is None else (count,), jnp.int32)
  layers(x_BCD, PerLayer(index), memory, rotation(config, positions_BC))


def run_layers(
  layers: nn.Module,
  x_BCD: jax.Array,
  memory: Memory,
  turns: Rotation,
  count: int | None = None,
  kept: Any = None,
  own: dict | None = None,
  rotates: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
  """Applies a bound layer or stack, with kernels in the dtype that products take.

  Cast here, and not layer by layer, the gradients of a whole stack wait in this dtype too until those of all
  recursions are added up (in float32). The values are the same: a product's gradient has the dtype of its operands.

  Args:
    layers: bound `single_layer` or `stacked_layers`.
    x_BCD: the tokens' residual stream.
    memory: what they attend to.
    turns: rotation of the tokens.
    count: layers of a stack; None: a single layer.
    kept: what the memory has of each layer, leaves with a leading layer axis.
    own: changes of the layers' parameters in this recursion step (`relaxation`).
    rotates: whether each layer rotates queries and keys (`sharing.rotating`).

  Returns:
    The residual stream, and what the memory keeps of each layer.
  """
  index = jnp.zeros((), jnp.int32) if count is None else jnp.arange(count)
  layer = PerLayer(index, kept, rotates=rotates)

  def call(bound, *inputs):
    return bound(*inputs)

  call = relaxed(call, layers.config, own or {}, partial(_cast, layers.config))
  return call(layers, x_BCD, layer, memory, turns)


def relaxed(
  function: Callable, config: ModelConfig, changes: dict, then: Callable[[dict], dict] = lambda params: params
) -> Callable:
  """`function(layers, ...)`, which sees the layers' parameters as `relaxation.relax` changes them.

  Args:
    then: is applied to the changed parameters.
  """

  def prepare(variables):
    return {'params': then(relaxation.relax(config, nn.unbox(variables['params']), changes))}

  return nn.map_variables(function, 'params', trans_in_fn=prepare)


def _cast(config: ModelConfig, params: dict) -> dict:
  def cast(path, leaf):
    return kernels.cast(leaf, config.dtype) if path.endswith('kernel') else leaf

  return kernels.map_paths(cast, params)
