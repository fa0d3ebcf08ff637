"""The whole model: embed -> first layer -> recursions -> last layer -> norm -> logits."""

import functools

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from mor_jax.config import ModelConfig
from mor_jax.model import (
  axes,
  expert_choice,
  kernels,
  recursion,
  relaxation,
  router,
  sharing,
  stack,
  token_choice,
)
from mor_jax.model.context import TokenContext
from mor_jax.model.embedding import Embedding
from mor_jax.model.layers import RMSNorm
from mor_jax.model.memory import Row
from mor_jax.model.recursion import Given
from mor_jax.model.rotary import rotation
from mor_jax.model.router import RoutingOutput


@struct.dataclass
class ModelOutput:
  """What a forward pass gives.

  Attributes:
    logits: (B, T, V), float32; None if they were not asked for.
    routing: what the routers did; None for vanilla and recursive models.
    hidden: normed final states (B, T, D), to which the output head applies.
  """

  logits: jax.Array | None
  routing: RoutingOutput | None
  hidden: jax.Array


class Transformer(nn.Module):
  """A vanilla, recursive or Mixture-of-Recursions language model, as `config.kind` says.

  Parameters: embed/embedding (V, D), or two tables with `embed_factor`; block/..., the layers that are shared, or all layers of a vanilla model,
  every leaf with a leading axis N; first/... and last/..., the layers around it, where `config.unique_ends` says so;
  router/... and aux_router/..., for expert-choice with a leading axis of the R recursions; steps/..., with that axis,
  for relaxed sharing; lora/..., low-rank changes of these layers in all recursions; final_norm/scale (D,); head/kernel (D, V) unless embeddings are tied.

  Some routers keep a state of their own, collection 'routing' (`router.init_state`), which the trainer updates.
  A random router draws from the rng stream 'routing', the noise on a choice in training from 'noise'.
  """

  config: ModelConfig

  def setup(self):
    cfg = self.config
    init = nn.initializers.normal(cfg.weight_std)
    self.embed = Embedding(cfg)
    self.block = stack.stacked_layers(cfg)
    if cfg.unique_ends:
      self.first, self.last = stack.single_layer(cfg), stack.single_layer(cfg)
    if cfg.kind != 'vanilla':
      self.steps = relaxation.Steps(cfg)
    if cfg.adapted_parts:
      self.lora = relaxation.Adapters(cfg)
    if cfg.kind == 'mor' and not cfg.random_router:
      self.router = router.stacked_heads(cfg)
      if cfg.has_aux_router:
        self.aux_router = router.stacked_heads(cfg)
    self.routing_state = {
      name: self.variable('routing', name, lambda value=value: value)
      for name, value in router.init_state(cfg).items()
    }
    self.final_norm = RMSNorm(cfg)
    if not cfg.tie_embeddings:
      self.head = kernels.Matrix((cfg.d_model, cfg.vocab_size), ('embed', 'vocab'), init)

  def __call__(
    self,
    tokens_BT: jax.Array,
    routing: str = 'topk',
    max_len: int | None = None,
    slack: float | None = None,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
    max_recursions: int | None = None,
    with_logits: bool = True,
    given: Given | None = None,
  ) -> ModelOutput:
    """Logits for every token.

    Args:
      tokens_BT: token ids.
      routing: 'topk', as in training, which looks at the whole row; or 'threshold', which is causal.
      max_len: under threshold routing, the sequence length that places are counted for; default T.
      slack: under threshold routing, places per token expected; default config.threshold_slack.
      segment_ids: (B, T) document of each token, 0 for padding; default: one document a row.
      positions: (B, T) position in the document; default: counted from the document's start.
      max_recursions: recursions a token takes at most; default: R.
      with_logits: False leaves the output head to the caller (`states_and_head`).
      given: depths of the tokens, in place of those that the routers choose.

    Raises:
      ValueError: unknown routing, max_len shorter than the row, or max_recursions that the model cannot have.
    """
    chex.assert_rank(tokens_BT, 2)
    chex.assert_type(tokens_BT, int)
    rule = recursion.make_rule(self.config, tokens_BT.shape[1], routing, max_len, slack, max_recursions)
    context = token_context(tokens_BT, segment_ids, positions)
    x_BTD = self.embedded(tokens_BT)
    if self.is_initializing():
      self._make_parameters()
      routed, x_BTD = None, self.final_norm(x_BTD)
    else:
      x_BTD, routed, _ = self._recursions(self._begin(x_BTD, context), context, rule, given or Given())
      x_BTD = self._end(x_BTD, context)
    return ModelOutput(self.logits(x_BTD) if with_logits else None, routed, x_BTD)

  def trajectory(
    self,
    tokens_BT: jax.Array,
    routing: str = 'threshold',
    max_len: int | None = None,
    slack: float | None = None,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
    max_recursions: int | None = None,
    given: Given | None = None,
  ) -> tuple[jax.Array, RoutingOutput | None]:
    """The residual stream (R + 1, B, T, D) before the recursions and after each, for `read`; and the routing.

    Arguments as in `__call__`. A token that left keeps its stream.

    Raises:
      ValueError: the model has no recursions that it could stop after, or as in `__call__`.
    """
    if not self.config.can_stop_early:
      raise ValueError(f'a {self.config.kind} model, sharing={self.config.sharing}, has no exits')
    rule = recursion.make_rule(
      self.config, tokens_BT.shape[1], routing, max_len, slack, max_recursions, keeps_states=True
    )
    context = token_context(tokens_BT, segment_ids, positions)
    x_BTD = self._begin(self.embedded(tokens_BT), context)
    _, routed, states_RBTD = self._recursions(x_BTD, context, rule, given or Given())
    return jnp.concatenate([x_BTD[None], states_RBTD]), routed

  def read(
    self, states_EBTD: jax.Array, segment_ids: jax.Array, positions: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Normed final states (E, B, T, D) if the recursions left each of these streams; and `head_kernel`."""
    exits, batch = states_EBTD.shape[:2]
    # Rows stay the major axis, along which they lie on different devices.
    x_BTD = jnp.moveaxis(states_EBTD, 0, 1).reshape(batch * exits, *states_EBTD.shape[2:])
    context = TokenContext(*(jnp.repeat(a_BT, exits, axis=0) for a_BT in (positions, segment_ids)))
    x_BTD = self._end(x_BTD, context)
    return jnp.moveaxis(x_BTD.reshape(batch, exits, *x_BTD.shape[1:]), 1, 0), self.head_kernel()

  def router_logits(self, states_RBTD: jax.Array) -> jax.Array:
    """Logits (R, B, T) by which each step decides causally on tokens with these streams (expert-choice)."""
    routers = {'router': self.router.variables['params']}
    if self.config.has_aux_router:
      routers['aux_router'] = self.aux_router.variables['params']
    routers = jax.tree.map(lambda leaf_R: leaf_R[: states_RBTD.shape[0]], nn.unbox(routers))
    _, causal_RBT = jax.vmap(functools.partial(expert_choice.scores, self.config))(routers, states_RBTD)
    return causal_RBT

  def states_and_head(self, *args, **kwargs) -> tuple[jax.Array, jax.Array, RoutingOutput | None]:
    """For a loss that makes the logits itself: normed final states (B, T, D), `head_kernel`, and the routing.

    Arguments as in `__call__`.
    """
    output = self(*args, **kwargs, with_logits=False)
    return output.hidden, self.head_kernel(), output.routing

  def embedded(self, tokens_BT: jax.Array) -> jax.Array:
    """The residual stream (B, T, D) at its beginning.

    Rounded to the model's dtype after the lookup: the gradient of a frequent token has thousands of terms, which
    would stop counting if they were added up in bfloat16.
    """
    dtype = jnp.dtype(self.config.dtype)
    embedding_VD = axes.gather_parameter(kernels.whole(self.embed()), ('vocab', 'embed'), dtype)

    def look_up(embedding_VD, tokens_BT):
      return jnp.take(embedding_VD, tokens_BT, axis=0).astype(dtype)

    x_BTD = axes.per_shard(look_up, [(), ('batch',)], ('batch',))(embedding_VD, tokens_BT)
    return axes.constrain(x_BTD, 'batch', 'length', 'width')

  def head_kernel(self) -> jax.Array:
    """Kernel (D, V) of the output head, float32; from other devices it travels in the model's dtype."""
    table = self.embed() if self.config.tie_embeddings else self.head()
    kernel_DV = kernels.whole(table).T if self.config.tie_embeddings else kernels.whole(table)
    return axes.gather_parameter(kernel_DV, ('embed', 'vocab'), jnp.dtype(self.config.dtype))

  def logits(self, x_BTD: jax.Array) -> jax.Array:
    """Output head: logits (..., V) in float32."""
    x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
    logits_NV = head_product(self.config, x_ND, self.head_kernel())
    return axes.constrain(logits_NV.reshape(*x_BTD.shape[:-1], -1), 'batch', 'length', 'vocab')

  def _begin(self, x_BTD, context):
    if self.config.unique_ends:
      turns = rotation(self.config, context.positions_BC)
      rotates = sharing.rotating(self.config, 'first')
      own = self._adapters('first')
      x_BTD, _ = stack.run_layers(self.first, x_BTD, Row(context), turns, own=own, rotates=rotates)
    return x_BTD

  def _end(self, x_BTD, context):
    if self.config.unique_ends:
      turns = rotation(self.config, context.positions_BC)
      rotates = sharing.rotating(self.config, 'last')
      own = self._adapters('last')
      x_BTD, _ = stack.run_layers(self.last, x_BTD, Row(context), turns, own=own, rotates=rotates)
    return self.final_norm(x_BTD)

  def _adapters(self, part):
    """What `relaxation.relax` adds to the kernels of a part of the model wherever it is used."""
    return {'lora': self.lora()[part]} if part in self.config.adapted_parts else {}

  def _with_block(self, function, *args):
    """function(block, *args), of the block with its adapters merged once for all passes."""
    change = self._adapters('block')
    if change:
      function = stack.relaxed(function, self.config, change)
    return function(self.block, *args)

  def _recursions(self, x_BTD, context, rule, given):
    cfg = self.config
    if (given.depths_BT is not None or given.most_B is not None) and not cfg.can_stop_early:
      raise ValueError(f'a {cfg.kind} model, sharing={cfg.sharing}, has no depths to be given')
    if cfg.kind == 'mor':
      return self._route(x_BTD, context, rule, given)
    if cfg.kind == 'recursive':
      x_BTD, states_RBTD = self._with_block(recursion.repeat, self.steps(), x_BTD, context, rule, given)
      return x_BTD, None, states_RBTD
    if cfg.passes > 1:
      return self._with_block(recursion.share_memory, x_BTD, context), None, None
    rotates = sharing.rotating(cfg, 'block')
    return *self._with_block(recursion.run_pass, {}, x_BTD, context, None, cfg.shared_depth, rotates), None

  def _route(self, x_BTD, context, rule, given):
    cfg, own_R = self.config, self.steps()
    zeros_R = jnp.zeros((cfg.recursions,))
    if cfg.random_router:
      key = self.make_rng('routing') if self.has_rng('routing') else jax.random.key(0)
      routers = jax.random.split(key, cfg.recursions)
    else:
      routers = nn.unbox(self.router.variables['params'])
    if cfg.router == 'token_choice':
      bias_R = self.routing_state['bias'].value if 'bias' in self.routing_state else zeros_R
      return self._with_block(token_choice.route, routers, own_R, bias_R, x_BTD, context, rule, given)
    steps_R = {'own': own_R, 'threshold': self.get_variable('routing', 'threshold', zeros_R)}
    steps_R['key' if cfg.random_router else 'router'] = routers
    if cfg.has_aux_router:
      steps_R['aux_router'] = nn.unbox(self.aux_router.variables['params'])
    if cfg.noise_scale and self.has_rng('noise'):
      steps_R['noise'] = jax.random.split(self.make_rng('noise'), cfg.recursions)
    steps_R = jax.tree.map(lambda leaf_R: leaf_R[: rule.steps], steps_R)
    if cfg.dispatch == 'gather' and rule.routing == 'topk' and given.depths_BT is None:
      return self._with_block(expert_choice.route_gathered, steps_R, x_BTD, context, rule, given)
    return self._with_block(expert_choice.route_masked, steps_R, x_BTD, context, rule, given)

  def _make_parameters(self):
    """Runs every part of the model once, on a single token, which is enough to make its parameters."""
    cfg = self.config
    zeros_BC = jnp.zeros((1, 1), jnp.int32)
    memory = Row(TokenContext(zeros_BC, zeros_BC))
    with nn.logical_axis_rules(()):  # one token is not a batch to be split
      stack.make_parameters(self.block, memory, cfg.shared_depth)
      for name in ('first', 'last')[: 2 * cfg.unique_ends]:
        stack.make_parameters(getattr(self, name), memory)
      if cfg.kind != 'vanilla':
        self.steps()
      if cfg.adapted_parts:
        self.lora()
      if cfg.kind == 'mor' and not cfg.random_router:
        x_BTD = jnp.zeros((1, 1, cfg.d_model))
        self.router(x_BTD)
        if cfg.has_aux_router:
          self.aux_router(x_BTD)
      self.head_kernel()


def head_product(config: ModelConfig, x_ND: jax.Array, kernel_DV: kernels.Kernel) -> jax.Array:
  """Logits (N, V): operands in the model's dtype, sums in float32."""
  dtype = jnp.dtype(config.dtype)
  if isinstance(kernel_DV, kernels.Quantised):
    return kernel_DV.product(x_ND.astype(dtype).astype(jnp.float32))
  return jnp.dot(x_ND.astype(dtype), kernel_DV.astype(dtype), preferred_element_type=jnp.float32)


def token_context(
  tokens_BT: jax.Array, segment_ids_BT: jax.Array | None, positions_BT: jax.Array | None
) -> TokenContext:
  """Positions and segments of a row's tokens, with the defaults that `Transformer` documents."""
  if segment_ids_BT is None:
    segment_ids_BT = jnp.ones(tokens_BT.shape, jnp.int32)
  if positions_BT is None:
    index_T = jnp.arange(tokens_BT.shape[1])
    before_BT = jnp.pad(segment_ids_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    starts_BT = segment_ids_BT != before_BT
    positions_BT = index_T - jax.lax.cummax(jnp.where(starts_BT, index_T, 0), axis=1)
  chex.assert_equal_shape([tokens_BT, segment_ids_BT, positions_BT])
  return TokenContext(positions_BT, segment_ids_BT)


@functools.cache
def parameter_axes(config: ModelConfig) -> dict[str, axes.Names]:
  """Logical names of the axes of every parameter of a model by its path, 'block/mlp/up/kernel'."""
  return axes.parameter_names(abstract_variables(config)['params'])


def abstract_variables(config: ModelConfig) -> dict:
  """Shapes of a model's variables, as `init` makes them: in boxes with the names of their axes."""
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  with nn.logical_axis_rules(()):
    return jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens)
