"""Settings of the model and the values derived from them. `mor_jax/config/__init__.py` lists the shape letters."""

import dataclasses
import math

from mor_jax.config.typed import setting

SHARING_SCHEMES = ('cycle', 'sequence', 'middle_cycle', 'middle_sequence')
PLAIN_STD = 0.02  # the authors'
SCALED_STD, EMBED_STD = 0.5, 0.1  # the best of benchmarks/depth.py, part init, for vanilla and MoR alike
AUTO = {  # what auto stands for, with router_target=benefit and without
  'gating': ('residual', 'weighted'),
  'causality': ('none', 'aux_loss'),
  'kv': ('shared', 'recursion_wise'),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The architecture. Defaults are the paper's MoR at 360M (arXiv 2507.10524, Tables 3 and 6)."""

  kind: str = setting('mor', 'what to build', ('vanilla', 'recursive', 'mor'))
  vocab_size: int | None = setting(None, 'entries of the vocabulary; none: the tokenizer decides')
  num_layers: int = setting(32, 'unrolled depth: layers a token passes when it takes every recursion')
  d_model: int = setting(960, 'width D of the residual stream')
  num_heads: int = setting(15, 'query heads H')
  num_kv_heads: int = setting(5, 'key/value heads K (grouped-query attention)')
  head_dim: int | None = setting(None, 'width E of a head; none: d_model / num_heads')
  mlp_dim: int = setting(2560, 'hidden width F of the SwiGLU MLP')
  attention_bias: str = setting(
    'none',
    'biases in attention: qkv, of queries, keys and values, as Qwen2; all, also of the output',
    ('none', 'qkv', 'all'),
  )
  qk_norm: bool = setting(
    False, 'RMSNorm of every head of queries and keys, before they are rotated, as Qwen3'
  )
  sliding_window: int | None = setting(
    None,
    'positions that a token attends to in every layer, its own and those right before it, as Mistral; none: all',
  )
  rope_theta: float = setting(10000.0, 'base of the rotary position embedding')
  no_rope_layers: tuple[int, ...] = setting(
    (),
    'layers that do not rotate queries and keys, as SmolLM3; numbers of unique layers, counted from 0: the first '
    'layer, those of the block, the last',
  )
  rope_scaling: str = setting(
    'none',
    'slower rotations for longer texts: linear, all by rope_scaling_factor; llama3, as Llama 3.1: the slow ones; yarn, '
    'the slow ones, and larger scores; dynamic: a larger rope_theta, for texts of rope_length',
    ('none', 'linear', 'llama3', 'yarn', 'dynamic'),
  )
  rope_scaling_factor: float = setting(1.0, 'rope_scaling: how many times slower')
  rope_low_frequency_factor: float = setting(
    1.0, 'llama3: rotations that turn less often than this in rope_original_length are slowed down in full'
  )
  rope_high_frequency_factor: float = setting(
    4.0, 'llama3: those that turn more often than this are left alone, those between in part'
  )
  rope_beta_fast: float = setting(
    32.0, 'yarn: rotations that turn more often than this in rope_original_length are left alone'
  )
  rope_beta_slow: float = setting(
    1.0, 'yarn: those that turn less often are slowed down in full, those between in part'
  )
  rope_truncate: bool = setting(True, 'yarn: round the borders between those to whole rotations')
  rope_attention_factor: float | None = setting(
    None,
    'yarn: factor of rotated queries and of rotated keys; none: 0.1 * ln(rope_scaling_factor) + 1, but at least 1',
  )
  rope_original_length: int = setting(8192, 'llama3, yarn, dynamic: longest text that the model saw before')
  rope_length: int | None = setting(
    None,
    'dynamic: length of the texts that rotations are made for, the same for all of them; none: rope_original_length, '
    'for which nothing changes',
  )
  norm_epsilon: float = setting(1e-5, 'epsilon of RMSNorm')
  tie_embeddings: bool = setting(True, 'use the embedding matrix as output head')
  embed_factor: int | None = setting(
    None,
    'embeddings as sums of two rows that tokens share, i // embed_factor of one table and i modulo embed_factor '
    'of another, for vocabularies of pairs; none: a row for each token',
  )
  init: str = setting(
    'scaled',
    'initial weights; plain: all alike, as the authors; scaled: by the width, with kernels that write to the residual '
    'stream smaller, by 1 / sqrt(2 * num_layers * uses), where a shared layer is used once in every recursion',
    ('plain', 'scaled'),
  )
  init_std: float | None = setting(
    None, 'standard deviation of initial weights; none: 0.02 with init=plain, 0.5 / sqrt(d_model) with scaled'
  )
  embed_std: float | None = setting(
    None,
    'standard deviation of initial embeddings; none: that of the weights with init=plain, 0.1 with scaled',
  )

  num_recursions: int = setting(
    2, 'times R the shared block is applied (recursive and mor); passes that share keys and values (vanilla)'
  )
  sharing: str = setting(
    'middle_cycle',
    'which layers share parameters (recursive and mor), or keys and values (vanilla with kv=shared)',
    SHARING_SCHEMES,
  )

  share_norms: bool = setting(True, 'also share the norm scales of the shared layers, as the authors do')
  lora_rank: int = setting(0, 'LoRA: rank of the changes of kernels; 0: none')
  lora_alpha: float = setting(32.0, 'LoRA: the low-rank change is scaled by lora_alpha / lora_rank')
  lora_targets: str = setting('all', 'LoRA: kernels with a low-rank change', ('all', 'query_value'))
  lora_sharing: str = setting(
    'own',
    'LoRA: own, each recursion changes the shared kernels in its own way; one, all recursions alike, so that the '
    'changes can be merged into the kernels (python -m mor_jax.convert --merge_lora)',
    ('own', 'one'),
  )
  lora_layers: str = setting(
    'shared',
    'LoRA: shared, only the layers that are shared have changes; all, the first and the last layer, too, and all '
    'layers of a vanilla model',
    ('shared', 'all'),
  )
  recursion_encoding: bool = setting(False, "add a learned vector to each recursion's input")

  router: str = setting(
    'expert_choice',
    'mor: expert_choice, each recursion chooses its best tokens; token_choice, each token chooses its depth',
    ('expert_choice', 'token_choice'),
  )
  router_head: str = setting(
    'linear', 'scores by a linear map, or an MLP of 2 or 4 times the width', ('linear', 'mlp', 'wide_mlp')
  )
  router_target: str = setting(
    'gate',
    "what routers learn from: gate, the loss's gradient through the gate, as in the paper; benefit, whether "
    'a later exit lowers the loss of the token by more than benefit_margin, told by a pass without gradient in which '
    'tokens take all recursions (expert_choice)',
    ('gate', 'benefit'),
  )
  benefit_margin: float = setting(
    0.05, 'benefit: nats by which a later exit must be better for a token to go on'
  )
  benefit_rows: float = setting(0.125, 'benefit: share of the rows of a micro-batch that labels are made for')
  depth_prior_weight: float = setting(
    0.0,
    'benefit: weight of the squared difference between the mean depth that routers expect and that of the capacities',
  )
  router_noise: float | None = setting(
    None,
    'scale of the logistic noise that is added to logits for the choice in training (expert_choice); none: 1 with '
    'router_target=benefit, else 0',
  )
  router_activation: str = setting(
    'auto',
    'activation of the scores; auto: sigmoid for expert_choice, softmax for token_choice; identity: none',
    ('auto', 'sigmoid', 'tanh', 'softmax', 'identity'),
  )
  router_alpha: float | None = setting(
    None,
    'scale of the gate, alpha * activation(score), alpha alone with router_target=benefit; none: 0.1 with sigmoid '
    'and tanh, else 1',
  )
  router_temperature: float = setting(1.0, 'divides the router input')
  router_z_loss_weight: float = setting(0.0, 'weight of the squared log-partition of the scores')
  gating: str = setting(
    'auto',
    "update of a token, w its gate: weighted x + w*f(x), the authors' code, where f has residuals of its "
    'own; additive x + f(x); residual x + w*(f(x) - x), the paper (expert_choice); auto: residual with '
    'router_target=benefit, else weighted',
    ('auto', 'weighted', 'additive', 'residual'),
  )
  capacities: tuple[float, ...] | None = setting(
    None, 'fraction of tokens that enter each recursion, not rising; none: (R - r) / R'
  )
  selection: str = setting(
    'top_k',
    'threshold of causal routing (expert_choice): top_k, a logit of 0; ema_threshold, a moving average '
    'of the logit at the border of the top-k choice, kept in training',
    ('top_k', 'ema_threshold'),
  )
  ema_decay: float = setting(0.99, 'ema_threshold: decay of the moving average')
  random_router: bool = setting(
    False,
    'choose tokens, or depths, at random and give all of them the same gate: a control for the choice alone',
  )
  random_gate: float | None = setting(
    None,
    'gate of a random router; none: half of the gate scale for sigmoid, an equal share of it for softmax, all of it '
    'for others. For a control of the choice alone, the mean gate of the learned router beside it',
  )
  capacity_warmup_steps: int = setting(
    0, 'optimiser steps in which capacities fall from 1 to their values, in at most 8 sizes (expert_choice)'
  )
  causality: str = setting(
    'auto',
    'what teaches routers to decide without the future (expert_choice): aux_loss, a loss on their own '
    'scores; aux_router, a second router on stopped gradients; none; auto: none with router_target=benefit, else '
    'aux_loss',
    ('auto', 'aux_loss', 'aux_router', 'none'),
  )
  aux_loss_weight: float = setting(0.001, 'aux_loss: its weight (expert_choice)')
  token_gating: str = setting(
    'once',
    "token_choice: once, when a token has finished, the authors' code; every_step, the paper",
    ('once', 'every_step'),
  )
  balancing: str = setting(
    'loss',
    'what keeps all depths in use (token_choice): a loss; loss_free, a bias on the choice that follows '
    'the load; none',
    ('loss', 'loss_free', 'none'),
  )
  bias_update_rate: float = setting(
    0.001, 'loss_free: change of the bias in an optimiser step (token_choice)'
  )
  balance_warmup_steps: int = setting(
    0, 'first optimiser steps in which every token takes all recursions (token_choice)'
  )
  balancing_loss_weight: float = setting(0.1, 'weight of the balancing loss (token_choice)')
  token_capacity_factor: float | None = setting(
    None,
    'token_choice: a recursion takes at most factor * (R - r) / R of the tokens, the latest are left out; '
    'none: no limit, so every recursion has room for, and computes on, all tokens',
  )
  dispatch: str = setting(
    'gather',
    'gather: run a step on its selected tokens only; mask: on all, the reference',
    ('gather', 'mask'),
  )
  threshold_slack: float = setting(
    1.25, 'places of a step under threshold routing: ceil(capacity * max_len * slack)'
  )
  kv: str = setting(
    'auto',
    'keys and values of a recursion step: recursion_wise, those of its own tokens, which hides tokens that left; '
    'shared, those of all tokens at the first step; hybrid, shared ones overwritten by the tokens that go on; auto: '
    'shared with router_target=benefit, else recursion_wise',
    ('auto', 'recursion_wise', 'shared', 'hybrid'),
  )

  dtype: str = setting('bfloat16', 'activations and matrix products', ('bfloat16', 'float32'))
  remat: str = setting(
    'none',
    'recomputed in the backward pass: nothing; all but matrix products (dots); every layer (full); '
    "every layer and every recursion step (block); every layer, its input kept in the host's memory (offload, "
    'TPU and GPU)',
    ('none', 'dots', 'full', 'block', 'offload'),
  )
  attention: str = setting(
    'auto',
    'attention backend; auto: splash on TPU, cudnn on GPU (bfloat16), xla elsewhere; reference: the '
    'definition, slow',
    ('auto', 'reference', 'xla', 'splash', 'cudnn'),
  )
  unroll_layers: bool = setting(
    False, 'compile every layer separately instead of scanning (exact XLA FLOP counts, slow compile)'
  )

  def __post_init__(self) -> None:
    for name, value in self.auto().items():
      if getattr(self, name) == 'auto':
        object.__setattr__(self, name, value)

  def auto(self) -> dict[str, str]:
    """What auto stands for, by setting."""
    return {
      name: with_benefit if self.learns_benefit else without for name, (with_benefit, without) in AUTO.items()
    }

  @property
  def weight_std(self) -> float:
    """Standard deviation of initial weights that do not write to the residual stream."""
    if self.init_std is not None:
      return self.init_std
    return PLAIN_STD if self.init == 'plain' else SCALED_STD / math.sqrt(self.d_model)

  @property
  def embedding_std(self) -> float:
    """Standard deviation of initial embeddings."""
    if self.embed_std is not None:
      return self.embed_std
    return self.weight_std if self.init == 'plain' else EMBED_STD

  def output_std(self, uses: int) -> float:
    """Standard deviation of initial kernels that write to the residual stream.

    Under `scaled`, so that all layers together add as much as one pair of plain ones: independent updates add up in
    their squares (GPT-2), and those of a layer that is used again and again in one direction, by their number.

    Args:
      uses: how often a token passes the layer.
    """
    return (
      self.weight_std if self.init == 'plain' else self.weight_std / math.sqrt(2 * self.num_layers * uses)
    )

  @property
  def head_width(self) -> int:
    """Width E of one head."""
    return self.head_dim or self.d_model // self.num_heads

  @property
  def rope_scores_factor(self) -> float:
    """Factor of rotated queries and of rotated keys."""
    if self.rope_scaling != 'yarn':
      return 1.0
    if self.rope_attention_factor is not None:
      return self.rope_attention_factor
    return 0.1 * math.log(max(self.rope_scaling_factor, 1.0)) + 1

  @property
  def recursions(self) -> int:
    """Recursions R; 1 for vanilla, which has no shared block."""
    return 1 if self.kind == 'vanilla' else self.num_recursions

  @property
  def unique_ends(self) -> int:
    """Layers before and after the block that share nothing: 1 each under middle_*, else 0.

    Without sharing there is nothing to keep them from: all layers of a vanilla model are its block.
    """
    shares = self.kind != 'vanilla' or self.kv == 'shared'
    return 1 if shares and self.sharing.startswith('middle') else 0

  @property
  def shared_depth(self) -> int:
    """Layers in the shared block, i.e. per recursion."""
    return (self.num_layers - 2 * self.unique_ends) // self.recursions

  @property
  def own_lora(self) -> bool:
    """Whether each recursion has low-rank changes of its own."""
    return bool(self.lora_rank) and self.kind != 'vanilla' and self.lora_sharing == 'own'

  @property
  def adapted_parts(self) -> tuple[str, ...]:
    """Parts of the model ('first', 'block', 'last') whose low-rank changes are the same whenever they are used."""
    if not self.lora_rank:
      return ()
    ends = self.unique_ends if self.lora_layers == 'all' else 0
    return ('first',) * ends + ('block',) * (not self.own_lora) + ('last',) * ends

  @property
  def can_stop_early(self) -> bool:
    """Whether the first r < R recursions form a model. Not under `sequence` sharing, which repeats each layer."""
    return self.kind != 'vanilla' and self.sharing.endswith('cycle')

  @property
  def passes(self) -> int:
    """Passes over the middle layers that may share keys and values: R, or `num_recursions` under `kv=shared`.

    This differs for a vanilla model only, where R is 1. With `kv=shared` its layers keep their own
    parameters but read the keys and values of the layers whose parameters they would share in a
    recursive model.
    """
    return self.num_recursions if self.kv == 'shared' else self.recursions

  @property
  def num_unique_layers(self) -> int:
    """Parameter slots U."""
    return self.shared_depth + 2 * self.unique_ends

  @property
  def step_capacities(self) -> tuple[float, ...]:
    """Fraction of tokens that enters each recursion: (R - r) / R unless set (paper section 2.2.1)."""
    if self.kind == 'mor' and self.router == 'expert_choice':
      return self.capacities or self.balanced_capacities
    if self.kind == 'mor' and self.token_capacity_factor is not None:
      return tuple(min(1.0, self.token_capacity_factor * capacity) for capacity in self.balanced_capacities)
    return (1.0,) * self.recursions

  @property
  def balanced_capacities(self) -> tuple[float, ...]:
    """Fraction of tokens that enters each recursion when all depths are equally frequent."""
    return tuple((self.recursions - r) / self.recursions for r in range(self.recursions))

  @property
  def has_aux_router(self) -> bool:
    """Whether auxiliary routers make the causal decisions."""
    return self.kind == 'mor' and self.router == 'expert_choice' and self.causality == 'aux_router'

  @property
  def squash(self) -> str:
    """The router activation, with `auto` resolved."""
    if self.router_activation != 'auto':
      return self.router_activation
    return 'sigmoid' if self.router == 'expert_choice' else 'softmax'

  @property
  def learns_benefit(self) -> bool:
    """Whether routers learn which tokens gain by going on."""
    return self.kind == 'mor' and self.router_target == 'benefit'

  @property
  def noise_scale(self) -> float:
    """Scale of the noise on the choice in training."""
    return float(self.learns_benefit) if self.router_noise is None else self.router_noise

  @property
  def constant_gate(self) -> float | None:
    """The gate of routers that only choose, random ones and those that learn the benefit; None: it is learned."""
    if self.learns_benefit:
      return self.gate_scale
    if not self.random_router:
      return None
    if self.random_gate is not None:
      return self.random_gate
    return self.gate_scale * {'sigmoid': 0.5, 'softmax': 1 / self.recursions}.get(self.squash, 1.0)

  @property
  def gate_scale(self) -> float:
    """The gate's alpha, with the default resolved."""
    if self.router_alpha is not None:
      return self.router_alpha
    if self.learns_benefit:
      return 1.0
    return 0.1 if self.squash in ('sigmoid', 'tanh') else 1.0

  def selected_tokens(self, seq_len: int) -> tuple[int, ...]:
    """Tokens C_r that enter each recursion of a row of `seq_len`: max(1, floor(c_r * T))."""
    return tuple(max(1, int(c * seq_len)) for c in self.step_capacities)

  def step_places(self, max_len: int, slack: float) -> tuple[int, ...]:
    """Tokens of one sequence that each step can take under threshold routing (and its cache can hold)."""
    # Rounded first, so that 0.1 * 30 asks for 3 places and not, by a float's error, for 4.
    return tuple(
      min(max_len, max(1, math.ceil(round(capacity * max_len * slack, 6))))
      for capacity in self.step_capacities
    )
