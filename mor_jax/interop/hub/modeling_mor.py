"""Mixture-of-Recursions language models (arXiv 2507.10524) in PyTorch, for transformers.

A token passes a block of shared layers up to R times; routers decide, causally, how often. A recursion computes on the
tokens that take it and on no others, and under kv=recursion_wise they see only one another there.

`configuration_mor.Settings` lists the letters in names of tensors.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_mor import MoRConfig
from .layers_mor import NOTHING, DecoderLayer, FactoredEmbedding, LowRank, RMSNorm, Router, Step, rotation
from .memory_mor import HybridMemory, LayerUse, Memory, MoRCache, Region, Tokens, layer_uses, take


@dataclasses.dataclass
class MoROutput(CausalLMOutputWithPast):
  """What a forward pass gives, beside loss, logits and cache of language models in transformers.

  Attributes:
    hidden_states: if asked for, the residual stream (B, T, D) at its beginning, after the first layer, after each
      recursion, and the normed one that the head is applied to.
    depths: recursions (B, T) that each token took, 0 for padding; None where all take the same.
    last_hidden_state: the normed final states (B, T, D); None from `MoRForCausalLM`.
  """

  depths: torch.Tensor | None = None
  last_hidden_state: torch.Tensor | None = None


# Earlier versions of transformers have another name for it.
CACHE = 'cache' if 'cache' in MoROutput.__dataclass_fields__ else 'past_key_values'


class MoRPreTrainedModel(PreTrainedModel):
  config_class = MoRConfig
  base_model_prefix = 'model'
  supports_gradient_checkpointing = False  # a pass writes keys and values, which must not be done twice
  _supports_sdpa = True
  _no_split_modules = ['MoRModel']  # noqa: RUF012 (tokens and memory go from layer to layer on one device)
  _keep_in_fp32_modules_strict = [  # noqa: RUF012
    'router',
    'aux_router',
    'steps',
    'norm',
    'input_layernorm',
    'post_attention_layernorm',
    'q_norm',
    'k_norm',
  ]

  def _init_weights(self, module: nn.Module) -> None:
    super()._init_weights(module)
    std = self.config.initializer_range
    if isinstance(module, LowRank):
      nn.init.normal_(module.down, std=module.down.shape[1] ** -0.5)
      nn.init.zeros_(module.up)
    elif isinstance(module, Step):
      for change in module.norms.values():
        nn.init.zeros_(change)
      if module.encoding is not None:
        nn.init.normal_(module.encoding, std=std)
    elif isinstance(module, FactoredEmbedding):
      for rows in (module.quotient, module.remainder):
        nn.init.normal_(rows, std=std)


class MoRModel(MoRPreTrainedModel):
  """embed -> first layer -> recursions -> last layer -> norm."""

  def __init__(self, config: MoRConfig):
    super().__init__(config)
    settings = self.settings = config.settings
    recursions, ends, depth = settings.recursions, settings.unique_ends, settings.shared_depth
    if settings.routes and settings.random_router:
      raise ValueError('random_router=True chooses by noise of JAX, which cannot be drawn here')
    plain = settings.embed_factor is None
    self.embed_tokens = (
      nn.Embedding(settings.vocab_size, settings.d_model) if plain else FactoredEmbedding(settings)
    )
    self.layers = nn.ModuleList(DecoderLayer(settings, ends + slot) for slot in range(depth))
    self.first, self.last = (
      DecoderLayer(settings, slot) if ends else None for slot in (0, settings.num_unique_layers - 1)
    )
    self.norm = RMSNorm(settings.d_model, settings.norm_epsilon)
    is_relaxed = settings.lora_rank or not settings.share_norms or settings.recursion_encoding
    self.steps = nn.ModuleList(Step(settings) for _ in range(recursions if is_relaxed else 0))
    if settings.routes == 'expert_choice':
      self.router = nn.ModuleList(Router(settings, 1) for _ in range(recursions))
      if settings.causality == 'aux_router':
        self.aux_router = nn.ModuleList(Router(settings, 1) for _ in range(recursions))
      if settings.selection == 'ema_threshold':
        self.register_buffer('router_threshold', torch.zeros(recursions))
        self.register_buffer('router_updates', torch.zeros(recursions))
    elif settings.routes == 'token_choice':
      self.router = Router(settings, recursions)
      if settings.balancing == 'loss_free' or settings.balance_warmup_steps:
        self.register_buffer('router_bias', torch.zeros(recursions))
    self.uses = layer_uses(settings)
    self.post_init()

  def forward(
    self,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    past_key_values: MoRCache | None = None,
    inputs_embeds: torch.Tensor | None = None,
    use_cache: bool | None = None,
    output_hidden_states: bool | None = None,
    cache: MoRCache | None = None,
    **kwargs,
  ) -> MoROutput:
    """Normed final states, under causal (threshold) routing.

    Args:
      attention_mask: (B, tokens in the cache + T), 0 for padding, which takes no place and is seen by nobody.
      position_ids: (B, T); default: counted from the first token that is not padding. One text a row.
    """
    if (input_ids is None) == (inputs_embeds is None):
      raise ValueError('give one of input_ids and inputs_embeds')
    cache = cache if cache is not None else past_key_values
    if cache is not None and not isinstance(cache, MoRCache):
      raise ValueError(f'a cache of type {type(cache).__name__} cannot hold recursions; use MoRCache(config)')
    if use_cache is None:
      use_cache = cache is not None or (self.config.use_cache and not self.training)
    kept = MoRCache(self.config) if cache is None else cache
    x_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
    tokens = self._tokens(x_BTD, attention_mask, position_ids, kept.length)

    states = [x_BTD]
    x_BTD = self._end(self.first, x_BTD, tokens, kept.first)
    states.append(x_BTD)
    route = {'expert_choice': self._expert_choice, 'token_choice': self._token_choice}
    x_BTD, depths_BT = route.get(self.settings.routes, self._repeat)(x_BTD, tokens, kept, states)
    x_BTD = self._end(self.last, x_BTD, tokens, kept.last)
    x_BTD = self.norm(x_BTD, x_BTD.dtype)
    states.append(x_BTD)
    kept.add(depths_BT)
    return MoROutput(
      **{CACHE: kept if use_cache else None},
      hidden_states=tuple(states) if output_hidden_states else None,
      depths=depths_BT if self.settings.routes else None,
      last_hidden_state=x_BTD,
    )

  def _tokens(self, x_BTD, attention_mask, position_ids, past: int) -> Tokens:
    batch, length, _ = x_BTD.shape
    columns_BT = torch.arange(past, past + length, device=x_BTD.device).expand(batch, -1)
    positions_BT = columns_BT
    if attention_mask is not None:
      if attention_mask.shape != (batch, past + length):
        raise ValueError(
          f'attention_mask has shape {tuple(attention_mask.shape)}; for {length} tokens after {past} in the cache '
          f'it must be {(batch, past + length)}, 0 for padding'
        )
      real_BS = attention_mask.bool()
      positions_BT = (real_BS.cumsum(1) - 1).clamp(min=0)[:, past:]
      columns_BT = columns_BT.masked_fill(~real_BS[:, past:], -1)
    if position_ids is not None:
      positions_BT = position_ids.expand(batch, -1)
    return Tokens(columns_BT, rotation(self.settings, positions_BT))

  def _end(self, layer: DecoderLayer | None, x_BTD, tokens: Tokens, region: Region) -> torch.Tensor:
    """The layer before the recursions or that after them, which all tokens pass."""
    if layer is None:
      return x_BTD
    return layer(x_BTD, Memory(region, tokens, True, self.settings.sliding_window), LayerUse(0, 0), NOTHING)

  def _pass(self, recursion: int, x_BCD: torch.Tensor, memory: Memory) -> torch.Tensor:
    """A pass over the block."""
    step = self.steps[recursion] if len(self.steps) else None
    if step is not None and step.encoding is not None:
      x_BCD = (x_BCD.float() + step.encoding).to(x_BCD.dtype)
    for use in self.uses:
      own = NOTHING
      if step is not None:
        own = self.steps[recursion if use.recursion is None else use.recursion].of_layer(use.layer)
      x_BCD = self.layers[use.layer](x_BCD, memory, use, own)
    return x_BCD

  def _memory(self, recursion: int, tokens: Tokens, cache: MoRCache) -> Memory:
    is_shared = self.settings.kv == 'shared'
    region = cache.block[0 if is_shared else recursion]
    return Memory(region, tokens, recursion == 0 or not is_shared, self.settings.sliding_window)

  def _repeat(self, x_BTD, tokens, cache, states):
    """Every token takes every recursion."""
    passes = self.settings.recursions if self.settings.is_cyclic else 1
    for recursion in range(passes):
      x_BTD = self._pass(recursion, x_BTD, self._memory(recursion, tokens, cache))
      states.append(x_BTD)
    return x_BTD, (tokens.columns_BC >= 0).long() * self.settings.recursions

  def _expert_choice(self, x_BTD, tokens, cache, states):
    """Each recursion takes the tokens whose logit passes its threshold, while places last (paper, section 2.2.1)."""
    settings, takes_BT = self.settings, tokens.columns_BC >= 0
    thresholds = self._thresholds()
    depths_BT, latest = torch.zeros_like(tokens.columns_BC), {}

    def update(x, y, gate):
      if settings.gating == 'additive':
        return x + y
      gain = y - x if settings.gating == 'residual' else y
      return x + (gate * gain.float()).to(x.dtype)

    for recursion, places in enumerate(self._places()):
      logits_BT, causal_BT = self._scores(recursion, x_BTD)
      if places is not None:
        takes_BT = takes_BT & (causal_BT > thresholds[recursion] + self.config.threshold_shift)
        takes_BT = self._with_place(recursion, takes_BT, places, cache)
      gate_BT1 = self._gate(logits_BT)[..., None]
      x_BTD = self._take(recursion, x_BTD, takes_BT, gate_BT1, update, tokens, cache, latest)
      depths_BT = depths_BT + takes_BT
      states.append(x_BTD)
    return x_BTD, depths_BT

  def _token_choice(self, x_BTD, tokens, cache, states):
    """Each token chooses at the start how many recursions it takes; places may be limited."""
    settings, takes_BT = self.settings, tokens.columns_BC >= 0
    gates_BTR = self._gate(self.router(x_BTD.float() / settings.router_temperature))
    bias_R = self.router_bias.float() if hasattr(self, 'router_bias') else 0.0
    choice_BT1 = (gates_BTR + bias_R).argmax(-1, keepdim=True)
    gate_BT1 = gates_BTR.gather(-1, choice_BT1)
    every_step = settings.token_gating == 'every_step'

    def update(x, y, gate):
      return (gate * y.float()).to(y.dtype) if every_step else y

    h_BTD, depths_BT = x_BTD, torch.zeros_like(tokens.columns_BC)
    for recursion, places in enumerate(self._places()):
      takes_BT = takes_BT & (choice_BT1[..., 0] >= recursion)
      takes_BT = self._with_place(recursion, takes_BT, places, cache)
      h_BTD = self._take(recursion, h_BTD, takes_BT, gate_BT1, update, tokens, cache, {})
      depths_BT = depths_BT + takes_BT
      states.append(h_BTD)
    if settings.gating == 'weighted' and not every_step:
      h_BTD = (gate_BT1 * h_BTD.float()).to(h_BTD.dtype)
    return x_BTD + h_BTD, depths_BT

  def _places(self) -> list[int | None]:
    # Not those of `self.settings`: the capacities may have been changed since.
    return self.config.settings.places(self.config.max_position_embeddings)

  def _with_place(self, recursion: int, wants_BT, places: int | None, cache: MoRCache) -> torch.Tensor:
    """Of the tokens that want to take a recursion, those that come before its places have been taken."""
    if places is None:
      return wants_BT
    return wants_BT & (cache.taken(recursion) + wants_BT.cumsum(1) <= places)

  def _thresholds(self) -> list[float] | torch.Tensor:
    """Logits above which tokens take a recursion: those that were calibrated, learned, or 0."""
    if self.config.capacities is not None:
      for entry in self.config.calibrations:
        if list(entry['capacities']) == list(self.config.capacities):
          return entry['thresholds']
      known = [entry['capacities'] for entry in self.config.calibrations]
      raise ValueError(f'capacities={self.config.capacities} have not been calibrated; there are {known}')
    if hasattr(self, 'router_threshold'):
      return self.router_threshold.float()
    return [0.0] * self.settings.recursions

  def _scores(self, recursion: int, x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, T) of which the gate is made, and those that decide."""
    x_BTD = x_BTD.detach().float() if self.settings.learns_benefit else x_BTD.float()
    logits_BT = self.router[recursion](x_BTD / self.settings.router_temperature)[..., 0]
    if not hasattr(self, 'aux_router'):
      return logits_BT, logits_BT
    return logits_BT, self.aux_router[recursion](x_BTD.detach())[..., 0]

  def _gate(self, logits: torch.Tensor) -> torch.Tensor:
    """alpha * activation(logits), in float32; softmax acts on the last axis."""
    scale, squash = self.settings.gate_scale, self.settings.squash
    if self.settings.learns_benefit:
      return torch.full_like(logits, scale)
    if squash == 'softmax':
      return scale * logits.softmax(-1)
    return scale * {'sigmoid': torch.sigmoid, 'tanh': torch.tanh, 'identity': lambda z: z}[squash](logits)

  def _take(self, recursion, x_BTD, takes_BT, gate_BT1, update, tokens, cache, latest) -> torch.Tensor:
    """The streams after a recursion, `update(x, y, gate)` of the tokens that take it; y is the block's output."""
    if self.settings.kv == 'hybrid':
      region, window = cache.block[recursion], self.settings.sliding_window
      memory = HybridMemory(region, tokens.only(takes_BT), tokens, latest, window)
      if not takes_BT.any():
        memory.carry_on()
        return x_BTD
      y_BTD = self._pass(recursion, x_BTD, memory)
      return torch.where(takes_BT[..., None], update(x_BTD, y_BTD, gate_BT1), x_BTD)
    count = int(takes_BT.sum(1).max())
    if not count:
      return x_BTD
    # Those that take it, in their order, then others where a row has fewer than the fullest.
    indices_BC = takes_BT.byte().argsort(dim=1, descending=True, stable=True)[:, :count]
    chosen_BC = takes_BT.gather(1, indices_BC)
    x_BCD, gate_BC1 = take(x_BTD, indices_BC), take(gate_BT1, indices_BC)
    memory = self._memory(recursion, tokens.take(indices_BC, chosen_BC), cache)
    y_BCD = update(x_BCD, self._pass(recursion, x_BCD, memory), gate_BC1)
    kept_BCD = torch.where(chosen_BC[..., None], y_BCD, x_BCD)
    return x_BTD.scatter(1, indices_BC[..., None].expand_as(kept_BCD), kept_BCD)


class MoRForCausalLM(MoRPreTrainedModel, GenerationMixin):
  """A language model; text is generated by `generate`, with keys and values in a `MoRCache`."""

  def __init__(self, config: MoRConfig):
    super().__init__(config)
    self.model = MoRModel(config)
    is_tied = config.tied_embeddings
    self.lm_head = None if is_tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    self.post_init()

  def get_input_embeddings(self) -> nn.Module:
    return self.model.embed_tokens

  def set_input_embeddings(self, value: nn.Module) -> None:
    self.model.embed_tokens = value

  def get_output_embeddings(self) -> nn.Module | None:
    return self.lm_head

  def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
    self.lm_head = new_embeddings

  def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs) -> None:
    """Puts a MoRCache where `generate` would put one of its own."""
    if generation_config.use_cache is False or model_kwargs.get(CACHE) is not None:
      return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
    if generation_config.cache_implementation is not None:
      raise ValueError(
        f'cache_implementation={generation_config.cache_implementation} cannot hold recursions; leave it unset'
      )
    model_kwargs[CACHE] = MoRCache(self.config)
    return None

  def forward(
    self,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    past_key_values: MoRCache | None = None,
    inputs_embeds: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    use_cache: bool | None = None,
    output_attentions: bool | None = None,
    output_hidden_states: bool | None = None,
    return_dict: bool | None = None,
    logits_to_keep: int | torch.Tensor = 0,
    cache: MoRCache | None = None,
    **kwargs,
  ) -> MoROutput | tuple:
    """Logits, and the loss where labels (B, T) are given, -100 for tokens that do not count.

    The loss is that of the next token alone, under the causal routing of inference. Routers learn through their gates;
    their auxiliary losses and top-k routing, which looks at the whole row, are mor_jax's.
    """
    if output_attentions:
      raise ValueError('output_attentions=True is not supported: attention is fused')
    output = self.model(
      input_ids=input_ids,
      attention_mask=attention_mask,
      position_ids=position_ids,
      past_key_values=past_key_values,
      inputs_embeds=inputs_embeds,
      use_cache=use_cache,
      output_hidden_states=output_hidden_states,
      cache=cache,
    )
    keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    hidden_BTD = output.last_hidden_state[:, keep]
    head = self.model.embed_tokens if self.lm_head is None else self.lm_head
    logits_BTV, loss = F.linear(hidden_BTD, head.weight.to(hidden_BTD.dtype)), None
    if labels is not None:
      sizes = {'vocab_size': self.config.vocab_size}
      loss = self.loss_function(logits=logits_BTV, labels=labels, **sizes, **kwargs)
    given = {CACHE: getattr(output, CACHE), 'hidden_states': output.hidden_states, 'depths': output.depths}
    output = MoROutput(loss=loss, logits=logits_BTV, **given)
    return output.to_tuple() if return_dict is False else output
