"""Configuration of Mixture-of-Recursions language models (arXiv 2507.10524) for transformers."""

import math
from typing import Any

from transformers import PretrainedConfig

# Settings that models exported before they existed do not have.
LATER = {
  'embed_factor': None,
  'router_target': 'gate',
  'random_router': False,
  'attention_bias': 'none',
  'qk_norm': False,
  'sliding_window': None,
  'no_rope_layers': (),
  'rope_beta_fast': 32.0,
  'rope_beta_slow': 1.0,
  'rope_truncate': True,
  'rope_attention_factor': None,
  'rope_length': None,
}


class MoRConfig(PretrainedConfig):
  """Settings of a vanilla, recursive or Mixture-of-Recursions model.

  Args:
    mor: settings of the model as mor_jax names them, which alone decide what is computed.
    max_position_embeddings: longest text that recursions have places for: recursion r takes at most
      ceil(capacity_r * max_position_embeddings * threshold_slack) tokens of a text, the first that want to. A model of
      which every recursion takes all tokens reads longer texts too.
    calibrations: thresholds that were calibrated for other capacities: {'capacities': [...], 'thresholds': [...]} each.
    capacities: those of the calibration to use; None: as trained.
    threshold_shift: added to the routers' thresholds (expert-choice): above 0 saves computation, below 0 spends more.
  """

  model_type = 'mor_jax'
  keys_to_ignore_at_inference = ['cache', 'past_key_values', 'depths']  # noqa: RUF012

  def __init__(
    self,
    mor: dict[str, Any] | None = None,
    max_position_embeddings: int = 2048,
    calibrations: list[dict[str, Any]] | None = None,
    capacities: list[float] | None = None,
    threshold_shift: float = 0.0,
    **kwargs,
  ):
    self.mor = dict(mor or {})
    self.max_position_embeddings = max_position_embeddings
    self.calibrations = calibrations or []
    self.capacities = capacities
    self.threshold_shift = threshold_shift
    self.bos_token_id = kwargs.pop('bos_token_id', None)
    self.eos_token_id = kwargs.pop('eos_token_id', None)
    self.pad_token_id = kwargs.pop('pad_token_id', None)
    self.use_cache = kwargs.pop('use_cache', True)
    super().__init__(**kwargs)

  # What others ask a configuration for, under their names.

  @property
  def vocab_size(self) -> int:
    return self.mor['vocab_size']

  @vocab_size.setter
  def vocab_size(self, size: int) -> None:
    self.mor['vocab_size'] = size

  @property
  def hidden_size(self) -> int:
    return self.mor['d_model']

  @property
  def intermediate_size(self) -> int:
    return self.mor['mlp_dim']

  @property
  def num_hidden_layers(self) -> int:
    return self.mor['num_layers']

  @property
  def num_attention_heads(self) -> int:
    return self.mor['num_heads']

  @property
  def num_key_value_heads(self) -> int:
    return self.mor['num_kv_heads']

  @property
  def head_dim(self) -> int:
    return self.mor['head_dim'] or self.mor['d_model'] // self.mor['num_heads']

  @property
  def initializer_range(self) -> float:
    """Standard deviation of weights that are drawn anew."""
    plain = 0.02 if self.mor['init'] == 'plain' else 0.5 / math.sqrt(self.mor['d_model'])
    return plain if self.mor['init_std'] is None else self.mor['init_std']

  @property
  def tied_embeddings(self) -> bool:
    """Whether the embedding is the output head. It then is so by construction: no tensor has to be tied to another."""
    return self.mor['tie_embeddings']

  @property
  def settings(self) -> 'Settings':
    return Settings(self.mor, self.capacities)


class Settings:
  """The settings as attributes, under the names of mor_jax, and what follows from them.

  Letters in names of tensors: B rows, T tokens of a row, C tokens that a recursion takes, S keys, D width, H query
  heads, K key and value heads, E width of a head, V vocabulary, R recursions.
  """

  def __init__(self, mor: dict[str, Any], capacities: list[float] | None = None):
    self.__dict__.update(LATER | mor)
    if capacities is not None:
      self.capacities = capacities

  @property
  def head_width(self) -> int:
    return self.head_dim or self.d_model // self.num_heads

  @property
  def recursions(self) -> int:
    """R; 1 for vanilla models."""
    return 1 if self.kind == 'vanilla' else self.num_recursions

  @property
  def unique_ends(self) -> int:
    """Layers before the shared ones, and as many after, that share nothing."""
    shares = self.kind != 'vanilla' or self.kv == 'shared'
    return int(shares and self.sharing.startswith('middle'))

  @property
  def middle_layers(self) -> int:
    """Layers between the ends that a token passes when it takes every recursion."""
    return self.num_layers - 2 * self.unique_ends

  @property
  def shared_depth(self) -> int:
    """Layers in between that have parameters of their own."""
    return self.middle_layers // self.recursions

  @property
  def num_unique_layers(self) -> int:
    """Layers with parameters of their own."""
    return self.shared_depth + 2 * self.unique_ends

  @property
  def is_cyclic(self) -> bool:
    """Whether recursions are passes over all shared layers; else each layer is repeated before the next."""
    return self.sharing.endswith('cycle')

  @property
  def routes(self) -> str | None:
    """The kind of router; None: every token takes every recursion."""
    return self.router if self.kind == 'mor' else None

  @property
  def step_capacities(self) -> list[float]:
    """Share of the tokens that each recursion is meant for."""
    balanced = [(self.recursions - r) / self.recursions for r in range(self.recursions)]
    if self.routes == 'expert_choice':
      return list(self.capacities or balanced)
    if self.routes == 'token_choice' and self.token_capacity_factor is not None:
      return [min(1.0, self.token_capacity_factor * capacity) for capacity in balanced]
    return [1.0] * self.recursions

  def places(self, longest: int) -> list[int | None]:
    """Tokens of a text that each recursion can take, for texts of up to so many tokens; None: all."""
    # Rounded first, so that 0.1 * 30 asks for 3 places and not, by a float's error, for 4.
    return [
      None
      if capacity == 1.0
      else min(longest, max(1, math.ceil(round(capacity * longest * self.threshold_slack, 6))))
      for capacity in self.step_capacities
    ]

  @property
  def squash(self) -> str:
    """What makes a gate of a router's logit."""
    if self.router_activation != 'auto':
      return self.router_activation
    return 'sigmoid' if self.router == 'expert_choice' else 'softmax'

  @property
  def learns_benefit(self) -> bool:
    """Whether routers only choose; the gate of all tokens then is the same."""
    return self.router_target == 'benefit'

  @property
  def gate_scale(self) -> float:
    """Factor of the gate."""
    if self.router_alpha is not None:
      return self.router_alpha
    return 0.1 if self.squash in ('sigmoid', 'tanh') and not self.learns_benefit else 1.0

  @property
  def router_hidden(self) -> int:
    """Hidden width of a router; 0: it is a linear map."""
    return {'linear': 0, 'mlp': 2, 'wide_mlp': 4}[self.router_head] * self.d_model
