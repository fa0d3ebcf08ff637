"""Stacks of decoder layers: one parameter tree with a leading layer axis, run as one scan."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from mor_jax.config import ModelConfig
from mor_jax.model.context import TokenContext
from mor_jax.model.layers import DecoderLayer, LayerInputs, Memory, rotation

LAYER_INPUT = 'layer_input'
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


def init_stack(config: ModelConfig, key: jax.Array) -> dict:
  """Parameters of all U unique layers: the tree of one DecoderLayer, every leaf with a leading U axis."""
  x_BCD = jnp.zeros((1, 1, config.d_model), jnp.dtype(config.dtype))
  inputs = layer_inputs(config, TokenContext(*(jnp.zeros((1, 1), jnp.int32),) * 2))
  layer = DecoderLayer(config, parent=None)
  keys_U = jax.random.split(key, config.num_unique_layers)
  with nn.logical_axis_rules(()):  # the one token above is not a batch to be split
    return jax.vmap(lambda layer_key: layer.init(layer_key, x_BCD, inputs)['params'])(keys_U)


def layer_inputs(config: ModelConfig, context: TokenContext, memory: Memory | None = None) -> LayerInputs:
  """Rotations of the tokens and what each may attend to: one another, or the memory."""
  keys = None if memory is None else memory.context
  return LayerInputs(*rotation(config, context.positions_BC), context, keys)


def in_computing_dtype(config: ModelConfig, layers_N: dict) -> dict:
  """The layers with kernels as matrix products take them.

  Done here, and not layer by layer, the gradients of a whole stack wait in this dtype too until those of all
  recursions are added up (in float32). The values are the same: a product's gradient has the dtype of its operands.
  """

  def cast(path, leaf):
    return leaf.astype(config.dtype) if path[-1].key == 'kernel' else leaf

  return jax.tree_util.tree_map_with_path(cast, layers_N)


def apply_stack(
  config: ModelConfig,
  layers_N: dict,
  x_BCD: jax.Array,
  context: TokenContext,
  memory: Memory | None = None,
  remember: bool = False,
) -> tuple[jax.Array, Memory | None]:
  """Applies N stacked layers in order, as one scan; N may be 0.

  Activations are kept for the backward pass as `config.remat` says.

  Args:
    layers_N: parameters, every leaf with a leading axis N.
    x_BCD: the tokens' residual stream.
    context: where the tokens come from.
    memory: keys and values of every layer to attend to, in place of the tokens' own.
    remember: return the keys and values attended to.

  Returns:
    The residual stream, and the memory of all N layers if asked for (else None).
  """
  if jax.tree.leaves(layers_N)[0].shape[0] == 0:
    return x_BCD, None
  layer = DecoderLayer(config, parent=None)
  inputs = layer_inputs(config, context, memory)
  layers_N = in_computing_dtype(config, layers_N)

  def body(x_BCD, params_and_memory):
    x_BCD = checkpoint_name(x_BCD, LAYER_INPUT)
    params, key_values = params_and_memory
    own_memory = None if memory is None else memory.replace(keys=key_values[0], values=key_values[1])
    x_BCD, key_values = layer.apply({'params': params}, x_BCD, inputs, own_memory)
    return x_BCD, key_values if remember else None

  if config.remat != 'none':
    # The compiler merges what is computed again with what was computed first, unless a loop keeps them apart;
    # it makes no loop of a single layer, and then would keep all activations of the first and the last.
    in_loop = jax.tree.leaves(layers_N)[0].shape[0] > 1 and not config.unroll_layers
    body = jax.checkpoint(body, prevent_cse=not in_loop, policy=_POLICIES[config.remat])
  key_values_N = None if memory is None else (memory.keys, memory.values)
  x_BCD, kept = jax.lax.scan(body, x_BCD, (layers_N, key_values_N), unroll=config.unroll_layers)
  if not remember:
    return x_BCD, None
  return x_BCD, Memory(*kept, context if memory is None else memory.context)
