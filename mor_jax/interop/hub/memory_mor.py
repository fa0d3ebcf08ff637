"""What tokens leave for those after them: keys and values, by the recursions that they took.

`configuration_mor.Settings` lists the letters in names of tensors.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers import Cache

from .configuration_mor import MoRConfig, Settings


def joined(old: torch.Tensor | None, new: torch.Tensor, dim: int) -> torch.Tensor:
  return new if old is None else torch.cat([old, new], dim)


class Region:
  """Keys and values (B, K, S, E) of some layers, those of the same tokens in each.

  Attributes:
    columns_BS: place of the token in its row, counted with padding; -1: none, which nobody sees.
  """

  def __init__(self, layers: int):
    self.columns_BS: torch.Tensor | None = None
    self.keys: list[torch.Tensor | None] = [None] * layers
    self.values: list[torch.Tensor | None] = [None] * layers

  def add(self, layer: int, k_BKCE: torch.Tensor, v_BKCE: torch.Tensor) -> None:
    self.keys[layer] = joined(self.keys[layer], k_BKCE, 2)
    self.values[layer] = joined(self.values[layer], v_BKCE, 2)

  def change(self, function: Callable, dim: int) -> None:
    """Applies a function to all tensors and the number of their axis `dim` of (B, S)."""
    if self.columns_BS is not None:
      self.columns_BS = function(self.columns_BS, dim)
      self.keys, self.values = (
        [None if a is None else function(a, 2 * dim) for a in arrays] for arrays in (self.keys, self.values)
      )


class MoRCache(Cache):
  """What a text's tokens leave for those after them: keys and values, and how many took each recursion.

  Each recursion has a region of its own, in which only the tokens stand that took it; under kv=shared one region serves
  all, under kv=hybrid each has all tokens, with keys and values of the latest recursion that the token took so far.
  """

  def __init__(self, config: MoRConfig):
    super().__init__(layers=[])
    settings = config.settings
    layers, recursions = len(layer_uses(settings)), settings.recursions if settings.is_cyclic else 1
    if settings.kv == 'shared':
      layers, recursions = 1 + max(use.cache for use in layer_uses(settings)), 1
    self.block = [Region(layers) for _ in range(recursions)]
    self.first, self.last = Region(1), Region(1)
    self.depths_BS: torch.Tensor | None = None
    self.length = 0

  def add(self, depths_BT: torch.Tensor) -> None:
    """Notes how many recursions further tokens took."""
    self.depths_BS = joined(self.depths_BS, depths_BT, 1)
    self.length = self.depths_BS.shape[1]

  def taken(self, recursion: int) -> torch.Tensor | int:
    """Tokens (B, 1) of each row that took a recursion."""
    return 0 if self.depths_BS is None else (self.depths_BS > recursion).sum(1, keepdim=True)

  def get_seq_length(self, layer_idx: int = 0) -> int:
    return self.length

  @property
  def is_linear(self) -> list[bool]:
    return [False]

  def _change(self, function: Callable, dim: int) -> None:
    for region in (self.first, *self.block, self.last):
      region.change(function, dim)
    if self.depths_BS is not None:
      self.depths_BS = function(self.depths_BS, dim)

  def reorder_cache(self, beam_idx: torch.Tensor) -> None:
    self._change(lambda a, dim: a.index_select(dim, beam_idx.to(a.device)), 0)

  def batch_select_indices(self, indices: torch.Tensor) -> None:
    self._change(lambda a, _: a[indices], 0)

  def batch_repeat_interleave(self, repeats: int) -> None:
    self._change(lambda a, dim: a.repeat_interleave(repeats, dim), 0)

  def crop(self, tokens: int) -> None:
    """Forgets the last -tokens of all rows; of a positive number, those beyond it."""
    self.length = min(tokens, self.length) if tokens > 0 else self.length + tokens
    self.depths_BS = self.depths_BS[:, : self.length]
    for region in (self.first, *self.block, self.last):
      if region.columns_BS is not None:
        region.columns_BS = region.columns_BS.masked_fill(region.columns_BS >= self.length, -1)
        used = [0, *((region.columns_BS >= 0).any(0).nonzero()[:, 0] + 1).tolist()][-1]
        region.change(lambda a, dim, used=used: a.narrow(dim, 0, used), 1)

  def reset(self) -> None:
    for region in (self.first, *self.block, self.last):
      region.columns_BS = None
      region.keys, region.values = ([None] * len(region.keys) for _ in range(2))
    self.depths_BS, self.length = None, 0


class Tokens(NamedTuple):
  """Where the C tokens that layers work on stand.

  Attributes:
    columns_BC: their places in the row, counted with padding; -1: padding, or a token that takes no part.
    turns_BC1E: cosines and sines of the angles by which their queries and keys turn.
  """

  columns_BC: torch.Tensor
  turns_BC1E: tuple[torch.Tensor, torch.Tensor]

  def take(self, indices_BC: torch.Tensor, chosen_BC: torch.Tensor) -> 'Tokens':
    cos_BC1E, sin_BC1E = (take(turn, indices_BC) for turn in self.turns_BC1E)
    return Tokens(take(self.columns_BC, indices_BC).masked_fill(~chosen_BC, -1), (cos_BC1E, sin_BC1E))

  def only(self, chosen_BC: torch.Tensor) -> 'Tokens':
    return self._replace(columns_BC=self.columns_BC.masked_fill(~chosen_BC, -1))


def take(a_BT: torch.Tensor, indices_BC: torch.Tensor) -> torch.Tensor:
  """Tokens (B, C, ...) out of their rows (B, T, ...)."""
  indices = indices_BC.reshape(*indices_BC.shape, *(1,) * (a_BT.ndim - 2))
  return a_BT.gather(1, indices.expand(-1, -1, *a_BT.shape[2:]))


class Memory:
  """What the tokens of one pass attend to: a region of the cache, where their own keys and values are added.

  Args:
    tokens: that attend.
    writes: whether they have keys and values of their own there.
    window: positions that a token sees, its own and those before; None: all.
  """

  def __init__(self, region: Region, tokens: Tokens, writes: bool, window: int | None):
    self.tokens, self._region, self._writes, self._window = tokens, region, writes, window
    if writes:
      region.columns_BS = joined(region.columns_BS, self._written(), 1)
    query_BC1, key_B1S = tokens.columns_BC[:, :, None], region.columns_BS[:, None]
    sees_BCS = (key_B1S >= 0) & (key_B1S <= query_BC1)
    if window is not None:
      sees_BCS &= key_B1S > query_BC1 - window
    # A token that takes no part sees everything, since a softmax over nothing is not a number.
    self.mask_B1CS = (sees_BCS | (query_BC1 < 0))[:, None]

  def _written(self) -> torch.Tensor:
    return self.tokens.columns_BC

  def read(self, use: 'LayerUse', own: Callable) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a layer, after `own()` has made those of the tokens."""
    if self._writes and use.writes:
      self._region.add(use.cache, *own())
    return self._region.keys[use.cache], self._region.values[use.cache]


class HybridMemory(Memory):
  """As `Memory`, for all tokens of a call: those that take the recursion write, the others keep what they had.

  Args:
    everyone: all tokens of the call; `tokens` are the same, without those that do not take the recursion.
    latest: keys and values (B, K, T, E) by layer that they had at the recursion before; updated.
  """

  def __init__(self, region: Region, tokens: Tokens, everyone: Tokens, latest: dict, window: int | None):
    self._everyone, self._latest = everyone, latest
    super().__init__(region, tokens, True, window)

  def _written(self) -> torch.Tensor:
    return self._everyone.columns_BC

  def read(self, use, own):
    made = own()
    if use.cache in self._latest:
      takes_B1T1 = (self.tokens.columns_BC >= 0)[:, None, :, None]
      pairs = zip(made, self._latest[use.cache], strict=True)
      made = tuple(torch.where(takes_B1T1, new, old) for new, old in pairs)
    self._latest[use.cache] = made
    return super().read(use, lambda: made)

  def carry_on(self) -> None:
    """Adds to the region what the tokens had before, where none of them takes the recursion."""
    for layer, keys_and_values in self._latest.items():
      self._region.add(layer, *keys_and_values)


class LayerUse(NamedTuple):
  """One layer of a pass over the block.

  Attributes:
    layer: whose parameters it has.
    cache: which layer of a region it reads.
    writes: whether it writes there, too.
    recursion: where layers are repeated one by one, the recursion it belongs to; None: that of the pass.
  """

  layer: int
  cache: int
  writes: bool = True
  recursion: int | None = None


def layer_uses(settings: Settings) -> list[LayerUse]:
  """The layers of a pass; where they are repeated one by one, or share nothing, all layers between the ends."""
  repeats = not settings.is_cyclic and settings.recursions > 1
  count = settings.shared_depth if settings.is_cyclic else settings.middle_layers
  uses = []
  for index in range(count):
    layer, recursion = divmod(index, settings.recursions) if repeats else (index, None)
    cache, turn = index, 0
    if settings.kv == 'shared':
      passes = settings.num_recursions
      with_own = settings.middle_layers // passes  # layers with keys and values of their own
      turn, cache = divmod(index, with_own) if settings.is_cyclic else divmod(index, passes)[::-1]
    uses.append(LayerUse(layer, cache, turn == 0, recursion))
  return uses
