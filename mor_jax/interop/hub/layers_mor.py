"""The decoder layer of Llama, what a recursion may change in it, and routers."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_mor import Settings
from .memory_mor import LayerUse, Memory

LORA = {
  'query_value': ('attention_query', 'attention_value'),
  'all': (
    'attention_query',
    'attention_key',
    'attention_value',
    'attention_output',
    'mlp_gate',
    'mlp_up',
    'mlp_down',
  ),
}


class Own(NamedTuple):
  """What a layer has of its own in a recursion.

  Attributes:
    norms: changes (D,) of the scales of its norms, by name.
    lora: factors (I, r) and (r, O) of changes of its kernels, by name.
    scale: factor of these.
  """

  norms: dict[str, torch.Tensor]
  lora: dict[str, tuple[torch.Tensor, torch.Tensor]]
  scale: float

  def add(self, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """y, the product of x with a kernel, if that is changed as it is here."""
    if name not in self.lora:
      return y
    down, up = self.lora[name]
    return (y + self.scale * (x.float() @ down.float() @ up.float())).to(y.dtype)


def rotation(settings: Settings, positions_BC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
  """Cosines and sines (B, C, 1, E/2) of the rotary embedding."""
  frequencies_E = frequencies(settings).to(positions_BC.device)
  angles_BC1E = positions_BC[:, :, None, None].float() * frequencies_E
  factor = 1.0
  if settings.rope_scaling == 'yarn':  # larger scores
    factor = settings.rope_attention_factor
    factor = 0.1 * math.log(max(settings.rope_scaling_factor, 1.0)) + 1 if factor is None else factor
  return angles_BC1E.cos() * factor, angles_BC1E.sin() * factor


def frequencies(settings: Settings) -> torch.Tensor:
  """Angles (E/2,) by which neighbours differ, scaled."""
  half, theta, scaling = settings.head_width // 2, settings.rope_theta, settings.rope_scaling
  factor, original = settings.rope_scaling_factor, settings.rope_original_length
  if scaling == 'dynamic':
    stretch = factor * (settings.rope_length or original) / original - (factor - 1)
    theta *= stretch ** (half / (half - 1))
  numbers_E = torch.arange(half, dtype=torch.float32)
  frequencies_E = theta ** (-numbers_E / half)
  if scaling in ('none', 'dynamic'):
    return frequencies_E
  if scaling == 'linear':
    return frequencies_E / factor
  if scaling == 'llama3':
    turns_E = original * frequencies_E / (2 * math.pi)
    low, high = settings.rope_low_frequency_factor, settings.rope_high_frequency_factor
    kept_E = ((turns_E - low) / (high - low)).clamp(0, 1)
  elif scaling == 'yarn':
    # Which rotation turns so often in the original length.
    first, last = (
      half * math.log(original / (turns * 2 * math.pi)) / math.log(theta)
      for turns in (settings.rope_beta_fast, settings.rope_beta_slow)
    )
    if settings.rope_truncate:
      first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    kept_E = 1 - ((numbers_E - first) / (last - first or 0.001)).clamp(0, 1)
  else:
    raise ValueError(f'rope_scaling={scaling!r} is not known to this modeling_mor.py')
  return frequencies_E * (kept_E + (1 - kept_E) / factor)


def rotate(x_BCHE: torch.Tensor, turns_BC1E: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
  """Rotates element i together with element i + E/2."""
  (left, right), (cos, sin) = x_BCHE.float().chunk(2, dim=-1), turns_BC1E
  return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(x_BCHE.dtype)


class RMSNorm(nn.Module):
  """Root mean square norm, with statistics in float32."""

  def __init__(self, width: int, epsilon: float):
    super().__init__()
    self.weight, self.epsilon = nn.Parameter(torch.ones(width)), epsilon

  def forward(self, x: torch.Tensor, dtype: torch.dtype, change: torch.Tensor | float = 0.0) -> torch.Tensor:
    x32 = x.float()
    root = torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.epsilon)
    return (x32 * (root * (self.weight.float() + change))).to(dtype)


class Attention(nn.Module):
  """Grouped-query attention of tokens to what the memory gives them."""

  def __init__(self, settings: Settings, rotates: bool):
    super().__init__()
    self.settings, self.rotates, width = settings, rotates, settings.d_model
    heads, kv_heads = (n * settings.head_width for n in (settings.num_heads, settings.num_kv_heads))
    biased = settings.attention_bias != 'none'
    self.q_proj = nn.Linear(width, heads, bias=biased)
    self.k_proj = nn.Linear(width, kv_heads, bias=biased)
    self.v_proj = nn.Linear(width, kv_heads, bias=biased)
    self.o_proj = nn.Linear(heads, width, bias=settings.attention_bias == 'all')
    if settings.qk_norm:
      self.q_norm, self.k_norm = (RMSNorm(settings.head_width, settings.norm_epsilon) for _ in range(2))

  def forward(self, x_BCD: torch.Tensor, memory: Memory, use: LayerUse, own: Own) -> torch.Tensor:
    def heads(projection, name):
      return own.add(name, x_BCD, projection(x_BCD)).unflatten(-1, (-1, self.settings.head_width))

    def turned(x_BCHE, norm):
      x_BCHE = getattr(self, norm)(x_BCHE, x_BCHE.dtype) if self.settings.qk_norm else x_BCHE
      return rotate(x_BCHE, memory.tokens.turns_BC1E) if self.rotates else x_BCHE

    def keys_and_values():
      k_BCKE = turned(heads(self.k_proj, 'attention_key'), 'k_norm')
      return k_BCKE.transpose(1, 2), heads(self.v_proj, 'attention_value').transpose(1, 2)

    q_BHCE = turned(heads(self.q_proj, 'attention_query'), 'q_norm').transpose(1, 2)
    k_BKSE, v_BKSE = memory.read(use, keys_and_values)
    out_BHCE = F.scaled_dot_product_attention(q_BHCE, k_BKSE, v_BKSE, memory.mask_B1CS, enable_gqa=True)
    out_BCN = out_BHCE.transpose(1, 2).flatten(2)
    return own.add('attention_output', out_BCN, self.o_proj(out_BCN))


class MLP(nn.Module):
  """SwiGLU."""

  def __init__(self, settings: Settings):
    super().__init__()
    self.gate_proj = nn.Linear(settings.d_model, settings.mlp_dim, bias=False)
    self.up_proj = nn.Linear(settings.d_model, settings.mlp_dim, bias=False)
    self.down_proj = nn.Linear(settings.mlp_dim, settings.d_model, bias=False)

  def forward(self, x_BCD: torch.Tensor, own: Own) -> torch.Tensor:
    gate_BCF = own.add('mlp_gate', x_BCD, self.gate_proj(x_BCD))
    h_BCF = F.silu(gate_BCF) * own.add('mlp_up', x_BCD, self.up_proj(x_BCD))
    return own.add('mlp_down', h_BCF, self.down_proj(h_BCF))


class DecoderLayer(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x))."""

  def __init__(self, settings: Settings, slot: int):
    super().__init__()
    self.input_layernorm, self.post_attention_layernorm = (
      RMSNorm(settings.d_model, settings.norm_epsilon) for _ in range(2)
    )
    self.self_attn = Attention(settings, slot not in settings.no_rope_layers)
    self.mlp = MLP(settings)

  def forward(self, x_BCD: torch.Tensor, memory: Memory, use: LayerUse, own: Own) -> torch.Tensor:
    normed_BCD = self.input_layernorm(x_BCD, x_BCD.dtype, own.norms.get('attention_norm', 0.0))
    x_BCD = x_BCD + self.self_attn(normed_BCD, memory, use, own)
    normed_BCD = self.post_attention_layernorm(x_BCD, x_BCD.dtype, own.norms.get('mlp_norm', 0.0))
    return x_BCD + self.mlp(normed_BCD, own)


class FactoredEmbedding(nn.Module):
  """Embeddings as sums of two rows: token i has quotient[i // f] + remainder[i % f]."""

  def __init__(self, settings: Settings):
    super().__init__()
    self.factor, self.tokens = settings.embed_factor, settings.vocab_size
    self.quotient = nn.Parameter(torch.empty(-(-self.tokens // self.factor), settings.d_model))
    self.remainder = nn.Parameter(torch.empty(self.factor, settings.d_model))

  def forward(self, tokens: torch.Tensor) -> torch.Tensor:
    return self.quotient[tokens // self.factor] + self.remainder[tokens % self.factor]

  @property
  def weight(self) -> torch.Tensor:
    """The table (V, D)."""
    return self(torch.arange(self.tokens, device=self.quotient.device))


# ---- recursions ----


class LowRank(nn.Module):
  """Factors of the change of a kernel, for each layer of the block."""

  def __init__(self, layers: int, inputs: int, rank: int, outputs: int):
    super().__init__()
    self.down = nn.Parameter(torch.empty(layers, inputs, rank))
    self.up = nn.Parameter(torch.zeros(layers, rank, outputs))


class Step(nn.Module):
  """What one recursion has of its own beside the shared layers."""

  def __init__(self, settings: Settings):
    super().__init__()
    layers, width, mlp = settings.shared_depth, settings.d_model, settings.mlp_dim
    heads, kv_heads = (n * settings.head_width for n in (settings.num_heads, settings.num_kv_heads))
    sizes = {'attention_query': (width, heads), 'attention_output': (heads, width)}
    sizes |= dict.fromkeys(('attention_key', 'attention_value'), (width, kv_heads))
    sizes |= dict.fromkeys(('mlp_gate', 'mlp_up'), (width, mlp)) | {'mlp_down': (mlp, width)}
    rank, self.scale = settings.lora_rank, settings.lora_alpha / max(settings.lora_rank, 1)
    names = LORA[settings.lora_targets] if rank else ()
    self.lora = nn.ModuleDict({n: LowRank(layers, sizes[n][0], rank, sizes[n][1]) for n in names})
    norms = () if settings.share_norms else ('attention_norm', 'mlp_norm')
    self.norms = nn.ParameterDict({name: torch.zeros(layers, width) for name in norms})
    self.encoding = nn.Parameter(torch.empty(width)) if settings.recursion_encoding else None

  def of_layer(self, layer: int) -> Own:
    lora = {name: (factors.down[layer], factors.up[layer]) for name, factors in self.lora.items()}
    return Own({name: change[layer] for name, change in self.norms.items()}, lora, self.scale)


NOTHING = Own({}, {}, 1.0)


class Router(nn.Module):
  """Scores (B, C, outputs) of tokens, in float32 whatever the model's dtype."""

  def __init__(self, settings: Settings, outputs: int):
    super().__init__()
    width, hidden = settings.d_model, settings.router_hidden
    self.hidden = nn.Linear(width, hidden, bias=False) if hidden else None
    self.output = nn.Linear(hidden or width, outputs, bias=False)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    if self.hidden is not None:
      x = F.gelu(F.linear(x, self.hidden.weight.float()))
    return F.linear(x, self.output.weight.float())
