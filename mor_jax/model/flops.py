"""Parameters, FLOPs and KV-cache bytes of a model, in closed form from its ModelConfig.

A FLOP is one multiplication or one addition; a product of (m, k) and (k, n) costs 2mkn.
"""

import dataclasses
import functools

from mor_jax.config import ModelConfig
from mor_jax.model.embedding import rows_of
from mor_jax.model.layers import projections
from mor_jax.model.relaxation import LORA_TARGETS
from mor_jax.model.router import HIDDEN_FACTOR


@dataclasses.dataclass(frozen=True)
class ParameterCount:
  """Numbers of parameters.

  Attributes:
    total: all that is stored.
    embedding: embedding matrix, and the output head where it is not tied.
    non_embedding: the rest, as the paper counts ("N-emb" of its tables).
    unrolled_non_embedding: the same if every unrolled layer had parameters of its own.
  """

  total: int
  embedding: int
  non_embedding: int
  unrolled_non_embedding: int


def layer_parameters(config: ModelConfig) -> int:
  """Parameters of one decoder layer: projections with their biases, and norm scales."""
  biases = sum(kernel.outputs for kernel in projections(config).values() if kernel.has_bias)
  norms = 2 * config.d_model + (2 * config.head_width if config.qk_norm else 0)
  return _layer_kernel_size(config) + biases + norms


def router_parameters(config: ModelConfig) -> int:
  """Parameters of all routers: R with one output each, or one with R outputs; auxiliary ones included."""
  hidden = HIDDEN_FACTOR[config.router_head] * config.d_model
  heads = config.recursions if config.router == 'expert_choice' else 1
  outputs = 1 if config.router == 'expert_choice' else config.recursions
  one = config.d_model * hidden + hidden * outputs if hidden else config.d_model * outputs
  if config.random_router:
    return 0
  copies = 2 if config.has_aux_router else 1
  return copies * heads * one


def relaxation_parameters(config: ModelConfig) -> int:
  """Parameters that layers or recursion steps have beside the kernels, norms and routers (`model/relaxation.py`)."""
  kernels, depth = projections(config), config.shared_depth
  sides = (sum(kernels[name][:2]) for name in LORA_TARGETS[config.lora_targets])
  adapters = config.lora_rank * sum(sides)  # of one layer
  total = adapters * sum(depth if part == 'block' else 1 for part in config.adapted_parts)
  own = adapters * depth if config.own_lora else 0
  if not config.share_norms:
    own += depth * 2 * config.d_model
  if config.recursion_encoding:
    own += config.d_model
  return total + config.recursions * own


def count_parameters(config: ModelConfig) -> ParameterCount:
  """Closed-form parameter counts; equal to the sizes of the initialised tree."""
  head = 0 if config.tie_embeddings else config.vocab_size * config.d_model
  embedding = sum(rows_of(config).values()) * config.d_model + head
  outside_layers = config.d_model  # final norm
  if config.kind == 'mor':
    outside_layers += router_parameters(config)
  outside_layers += relaxation_parameters(config)
  non_embedding = config.num_unique_layers * layer_parameters(config) + outside_layers
  unrolled = config.num_layers * layer_parameters(config) + outside_layers
  return ParameterCount(embedding + non_embedding, embedding, non_embedding, unrolled)


def paper_flops_per_token(config: ModelConfig, seq_len: int, recursions: int | None = None) -> float:
  """Forward FLOPs per token as the paper's tables count them (docs/model.md).

  Sum over unrolled layers at capacity c of c * 2(4D^2 + 3DF) + c^2 * 2TD: all projections
  as D x D, causal half of the attention, no embedding, head, router or backward pass. Where
  keys and values are shared, steps after the first attend to all tokens, c * 2TD, and, unless
  they overwrite (hybrid), save the two projections, c * 4D^2. Token-choice counts as balanced.

  Args:
    recursions: that tokens take at most; None: all.
  """
  d_model = config.d_model
  matrices = 2 * (4 * d_model**2 + 3 * d_model * config.mlp_dim)
  attention = 2 * seq_len * d_model
  balanced = config.kind == 'mor' and config.router == 'token_choice'
  capacities = config.balanced_capacities if balanced else _pass_capacities(config)
  total = 2 * config.unique_ends * (matrices + attention)
  for step, c in enumerate(capacities[:recursions]):
    if config.kv == 'recursion_wise' or step == 0:
      layer = c * matrices + c**2 * attention
    else:
      saved = 4 * d_model**2 if config.kv == 'shared' else 0
      layer = c * (matrices - saved) + c * attention
    total += _pass_depth(config) * layer
  return total


def forward_flops_per_token(
  config: ModelConfig, seq_len: int, attention: float = 1.0, recursions: int | None = None
) -> float:
  """FLOPs of the matrix products of a training forward pass, per token of a full row.

  With grouped-query projections, attention, routers and output head; a step computes on the C_r tokens
  it selected (on all under mask dispatch). Low-rank changes cost no token anything: they are merged into the kernels,
  2 * rank FLOPs for each number of a kernel, however many tokens there are.

  Args:
    attention: share of all pairs of queries and keys that counts: 1, or 0.5 for those that causality leaves.
    recursions: that tokens take at most; None: all.
  """
  layer_flops = functools.partial(_layer_forward_flops, config, attention=attention)
  everywhere = config.kind == 'vanilla' or config.dispatch == 'mask'
  per_step = (seq_len,) * config.passes if everywhere else config.selected_tokens(seq_len)
  per_row = 2 * config.unique_ends * layer_flops(seq_len, seq_len)
  for step, count in enumerate(per_step[:recursions]):
    if config.kv == 'recursion_wise' or step == 0:
      layer = layer_flops(count, count)
    else:
      layer = layer_flops(count, seq_len, own_keys=config.kv == 'hybrid')
    per_row += _pass_depth(config) * layer
  if config.kind == 'mor':
    per_row += 2 * seq_len * router_parameters(config)
  return per_row / seq_len + 2 * config.d_model * config.vocab_size


def train_flops_per_token(
  config: ModelConfig, seq_len: int, attention: float = 1.0, recursions: int | None = None
) -> float:
  """FLOPs of matrix products per token of a training step: forward, and twice that backward; labels of routers.

  What remat computes a second time is not counted: it is the price, not the work. Arguments as in
  `forward_flops_per_token`.
  """
  labels = label_flops_per_token(config, seq_len, attention, recursions)
  return 3 * forward_flops_per_token(config, seq_len, attention, recursions) + labels


def label_flops_per_token(
  config: ModelConfig, seq_len: int, attention: float = 1.0, recursions: int | None = None
) -> float:
  """FLOPs, per token of a training step, of the forward pass that makes labels for `router_target=benefit`.

  `benefit_rows` of the rows take all recursions and are read out after each, by last layer and head.
  """
  if not config.learns_benefit or recursions == 1:
    return 0.0
  head = 2 * config.d_model * config.vocab_size
  exits = (recursions or config.recursions) - 1  # beside the one that a forward pass has
  last = config.unique_ends * _layer_forward_flops(config, seq_len, seq_len, attention=attention) / seq_len
  everything = forward_flops_per_token(_all_tokens(config), seq_len, attention, recursions)
  return config.benefit_rows * (everything + exits * (head + last))


def paper_label_flops_per_token(config: ModelConfig, seq_len: int, recursions: int | None = None) -> float:
  """`label_flops_per_token` as `paper_flops_per_token` counts."""
  if not config.learns_benefit or recursions == 1:
    return 0.0
  exits = (recursions or config.recursions) - 1
  last = 2 * (4 * config.d_model**2 + 3 * config.d_model * config.mlp_dim) + 2 * seq_len * config.d_model
  everything = paper_flops_per_token(_all_tokens(config), seq_len, recursions)
  return config.benefit_rows * (everything + exits * config.unique_ends * last)


def _all_tokens(config: ModelConfig) -> ModelConfig:
  return dataclasses.replace(config, capacities=(1.0,) * config.recursions)


def vanilla_of(config: ModelConfig) -> ModelConfig:
  """The vanilla model of the same depth and width, to compare with."""
  plain = {'lora_rank': 0, 'share_norms': True, 'recursion_encoding': False}
  return dataclasses.replace(config, kind='vanilla', capacities=None, kv='recursion_wise', **plain)


def kv_cache_bytes(
  config: ModelConfig, max_len: int, bytes_per_element: float = 2, scale_bytes: int = 0, slack: float = 1.0
) -> int:
  """Bytes of keys and values cached for one sequence of `max_len` tokens (paper, Table 2).

  Unique layers cache every token; a shared layer caches, per recursion, as many as may take it, or
  under KV sharing every token once. Hybrid sharing saves nothing: a token's earlier versions are
  read by later tokens that leave earlier.

  Args:
    scale_bytes: beside each head's elements, for the scale of a quantised cache.
    slack: places of a recursion per token that it takes on average (`ModelConfig.step_places`).
  """
  shared_entries = max_len
  if config.kv != 'shared':
    places = config.step_places(max_len, slack)
    always = (capacity == 1.0 for capacity in config.step_capacities)
    shared_entries = sum(max_len if full else size for full, size in zip(always, places, strict=True))
  entries = 2 * config.unique_ends * max_len + _pass_depth(config) * shared_entries
  return int(2 * entries * config.num_kv_heads * (config.head_width * bytes_per_element + scale_bytes))


def _pass_depth(config: ModelConfig) -> int:
  """Layers in one of `config.passes`."""
  return (config.num_layers - 2 * config.unique_ends) // config.passes


def _pass_capacities(config: ModelConfig) -> tuple[float, ...]:
  return (1.0,) * config.passes if config.kind == 'vanilla' else config.step_capacities


def _layer_kernel_size(config: ModelConfig, own_keys: bool = True) -> int:
  query_and_output = 2 * config.d_model * config.num_heads * config.head_width
  key_and_value = 2 * config.d_model * config.num_kv_heads * config.head_width if own_keys else 0
  return query_and_output + key_and_value + 3 * config.d_model * config.mlp_dim


def _layer_forward_flops(
  config: ModelConfig, queries: int, keys: int, own_keys: bool = True, attention: float = 1.0
) -> float:
  """One layer on `queries` tokens that attend to `keys` tokens, with or without projecting their own."""
  projections = 2 * queries * _layer_kernel_size(config, own_keys)
  return projections + attention * 2 * 2 * queries * keys * config.num_heads * config.head_width
