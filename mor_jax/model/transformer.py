"""The whole model: embed -> first layer -> recursions -> last layer -> norm -> logits."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from mor_jax.config import ModelConfig
from mor_jax.model import axes, expert_choice, recursion, relaxation, sharing, token_choice
from mor_jax.model.context import TokenContext
from mor_jax.model.layers import norm
from mor_jax.model.router import RoutingOutput, init_router, init_state
from mor_jax.model.stack import apply_stack, init_stack


@struct.dataclass
class ModelOutput:
  """Logits (B, T, V) in float32, and what the routers did (None for vanilla and recursive models)."""

  logits: jax.Array
  routing: RoutingOutput | None


class Transformer(nn.Module):
  """A vanilla, recursive or Mixture-of-Recursions language model, as `config.kind` says.

  Parameters: embed/embedding (V, D); layers/..., every leaf with a leading axis of the U
  unique layers, first and last included; router/... (and aux_router/...), for expert-choice
  with a leading axis of the R recursions; steps/... with that axis for relaxed sharing;
  final_norm/scale (D,); head/kernel (D, V) unless embeddings are tied. Some routers keep a
  state of their own, collection 'routing' (`router.init_state`), which the trainer updates.
  A random router draws from the rng stream 'routing'.
  """

  config: ModelConfig

  def setup(self):
    cfg = self.config
    init = nn.initializers.normal(cfg.init_std)
    self.embed = nn.Embed(cfg.vocab_size, cfg.d_model, dtype=jnp.dtype(cfg.dtype), embedding_init=init)
    self.layers = self.param('layers', lambda key: init_stack(cfg, key))
    if cfg.kind != 'vanilla':
      block = sharing.split_stack(cfg, self.layers)[1]
      own_R = jax.eval_shape(lambda: relaxation.init_steps(cfg, block, jax.random.key(0)))
      self.steps = self.param('steps', lambda key: relaxation.init_steps(cfg, block, key)) if own_R else {}
    if cfg.kind == 'mor' and not cfg.random_router:
      self.router = self.param('router', lambda key: init_router(cfg, key))
      if cfg.has_aux_router:
        self.aux_router = self.param('aux_router', lambda key: init_router(cfg, key))
    self.routing_state = {
      name: self.variable('routing', name, lambda value=value: value)
      for name, value in init_state(cfg).items()
    }
    self.final_norm = norm(cfg, None)
    if not cfg.tie_embeddings:
      self.head = self.param('head', lambda key: {'kernel': init(key, (cfg.d_model, cfg.vocab_size))})

  def __call__(
    self,
    tokens_BT: jax.Array,
    routing: str = 'topk',
    max_len: int | None = None,
    slack: float | None = None,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
    max_recursions: int | None = None,
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

    Raises:
      ValueError: unknown routing, max_len shorter than the row, or max_recursions that the model cannot have.
    """
    x_BTD, routed = self.hidden(tokens_BT, routing, max_len, slack, segment_ids, positions, max_recursions)
    return ModelOutput(self.logits(x_BTD), routed)

  def hidden(
    self,
    tokens_BT: jax.Array,
    routing: str = 'topk',
    max_len: int | None = None,
    slack: float | None = None,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
    max_recursions: int | None = None,
  ) -> tuple[jax.Array, RoutingOutput | None]:
    """Normed final states (B, T, D), to which `logits` applies the head; arguments as in `__call__`."""
    cfg = self.config
    if routing not in ('topk', 'threshold'):
      raise ValueError(f"routing={routing!r} is not one of 'topk', 'threshold'")
    length = tokens_BT.shape[1]
    max_len = length if max_len is None else max_len
    if max_len < length:
      raise ValueError(f'max_len={max_len} is shorter than the row of {length} tokens')
    slack = cfg.threshold_slack if slack is None else slack
    steps = cfg.recursions if max_recursions is None else max_recursions
    if not (1 <= steps < cfg.recursions and cfg.can_stop_early) and steps != cfg.recursions:
      raise ValueError(
        f'max_recursions={steps} cannot be had of {cfg.recursions} under sharing={cfg.sharing}'
      )
    context = token_context(tokens_BT, segment_ids, positions)
    x_BTD = self.embedded(tokens_BT)
    routed = None
    if cfg.kind == 'vanilla' and cfg.passes == 1:
      x_BTD, _ = apply_stack(cfg, self.layers, x_BTD, context)
    else:
      first, block, last = sharing.split_stack(cfg, self.layers)
      x_BTD, _ = apply_stack(cfg, first, x_BTD, context)
      if cfg.kind == 'vanilla':
        x_BTD = recursion.share_memory(cfg, block, x_BTD, context)
      elif cfg.kind == 'recursive':
        x_BTD = recursion.repeat(cfg, block, self.steps, x_BTD, context, steps)
      else:
        x_BTD, routed = self._route(block, x_BTD, context, routing, max_len, slack, steps)
      x_BTD, _ = apply_stack(cfg, last, x_BTD, context)
    return self.final_norm(x_BTD), routed

  def embedded(self, tokens_BT: jax.Array) -> jax.Array:
    """The residual stream (B, T, D) at its beginning."""
    embedding_VD = self.embed.embedding.astype(jnp.dtype(self.config.dtype))
    embedding_VD = axes.gather_parameter(embedding_VD, ('vocab', 'embed'))

    def look_up(embedding_VD, tokens_BT):
      return jnp.take(embedding_VD, tokens_BT, axis=0)

    x_BTD = axes.per_shard(look_up, [(), ('batch',)], ('batch',))(embedding_VD, tokens_BT)
    return axes.constrain(x_BTD, 'batch', 'length', 'width')

  def _route(self, block, x_BTD, context, routing, max_len, slack, steps):
    cfg = self.config
    zeros_R = jnp.zeros((cfg.recursions,))
    if cfg.random_router:
      key = self.make_rng('routing') if self.has_rng('routing') else jax.random.key(0)
      router = jax.random.split(key, cfg.recursions)
    else:
      router = self.router
    if cfg.router == 'token_choice':
      bias_R = self.routing_state['bias'].value if 'bias' in self.routing_state else zeros_R
      return token_choice.route(
        cfg, block, router, self.steps, bias_R, x_BTD, context, routing, max_len, slack, steps
      )
    steps_R = {'own': self.steps, 'threshold': self.get_variable('routing', 'threshold', zeros_R)}
    steps_R['key' if cfg.random_router else 'router'] = router
    if cfg.has_aux_router:
      steps_R['aux_router'] = self.aux_router
    steps_R = jax.tree.map(lambda leaf_R: leaf_R[:steps], steps_R)
    if cfg.dispatch == 'gather' and routing == 'topk':
      return expert_choice.route_gathered(cfg, block, steps_R, x_BTD, context)
    return expert_choice.route_masked(cfg, block, steps_R, x_BTD, context, routing, max_len, slack)

  def head_kernel(self) -> jax.Array:
    """Kernel (D, V) of the output head, float32, or what has come of it on the way from other devices."""
    kernel_DV = self.embed.embedding.T if self.config.tie_embeddings else self.head['kernel']
    return axes.gather_parameter(kernel_DV, ('embed', 'vocab'), jnp.dtype(self.config.dtype))

  def hidden_and_head(self, *args, **kwargs) -> tuple[jax.Array, jax.Array, RoutingOutput | None]:
    """`hidden` and `head_kernel`, for a loss that makes the logits itself: (x_BTD, kernel_DV, routing)."""
    x_BTD, routed = self.hidden(*args, **kwargs)
    return x_BTD, self.head_kernel(), routed

  def logits(self, x_BTD: jax.Array) -> jax.Array:
    """Output head: logits (..., V) in float32."""
    dtype = jnp.dtype(self.config.dtype)
    x_ND = x_BTD.reshape(-1, x_BTD.shape[-1]).astype(dtype)
    logits_NV = jnp.dot(x_ND, self.head_kernel().astype(dtype), preferred_element_type=jnp.float32)
    return axes.constrain(logits_NV.reshape(*x_BTD.shape[:-1], -1), 'batch', 'length', 'vocab')


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
  return TokenContext(positions_BT, segment_ids_BT)
