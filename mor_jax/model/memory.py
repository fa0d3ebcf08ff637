"""How attention remembers: which keys and values a layer's tokens attend to, and what is kept of their own.

The decoder layer makes queries and hands them to a memory, together with a function that makes the
tokens' own keys and values. One kind of memory for each way:

* `Row`: the tokens attend to one another (training, recursion-wise caching);
* `SharedMemory`: they attend to keys and values that stand ready (recursive KV sharing);
* `HybridMemory`: the same, after their own have been written over those of their places;
* `SlotCache`: their own go into a cache of static size, from which all are read (prefill, decoding).
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from mor_jax.model import attention, cached_attention, tokens
from mor_jax.model import cache as cache_lib
from mor_jax.model.cache import Pool
from mor_jax.model.cached_attention import View
from mor_jax.model.context import TokenContext

KeysAndValues = tuple[jax.Array, jax.Array]  # k_BSKE, rotated, and v_BSKE


class Memory(Protocol):
  """What all kinds have in common; each is a pytree."""

  def attend(
    self,
    q_BCHE: jax.Array,
    own: Callable[[], KeysAndValues],
    layer: Any,
    backend: str,
    window: int | None = None,
  ) -> tuple[jax.Array, Any]:
    """Attention (B, C, H, E) of rotated queries, and what is kept of the layer.

    Args:
      q_BCHE: queries.
      own: makes the rotated keys and the values (B, C, K, E) of the same tokens.
      layer: `layers.PerLayer`; its `kept` is what the memory has of this layer.
      backend: `model.attention`.
      window: positions that a token sees, `model.sliding_window`.
    """


@struct.dataclass
class Row:
  """The tokens attend to one another.

  Attributes:
    context: positions and segments of the tokens.
    remembers: keep their keys and values, as a memory for later steps.
  """

  context: TokenContext
  remembers: bool = struct.field(pytree_node=False, default=False)

  def attend(self, q_BCHE, own, layer, backend, window=None):
    """See `Memory.attend`."""
    del layer
    keys_and_values = own()
    out_BCHE = attention.attend(q_BCHE, *keys_and_values, self.context, None, backend, window)
    return out_BCHE, keys_and_values if self.remembers else None


@struct.dataclass
class SharedMemory:
  """The tokens attend to keys and values of all tokens, made at the first step; they have none of their own.

  Attributes:
    queries: positions and segments of the tokens.
    keys: those of the remembered tokens.
  """

  queries: TokenContext
  keys: TokenContext

  def attend(self, q_BCHE, own, layer, backend, window=None):
    """See `Memory.attend`."""
    del own
    return attention.attend(q_BCHE, *layer.kept, self.queries, self.keys, backend, window), None


@struct.dataclass
class HybridMemory:
  """As `SharedMemory`, but the tokens first write their own keys and values over those of their places.

  Attributes:
    queries: positions and segments of the tokens.
    keys: those of the remembered tokens.
    indices_BC: places of the tokens among the remembered ones, ascending.
    chosen_BC: which of the tokens may write.
  """

  queries: TokenContext
  keys: TokenContext
  indices_BC: jax.Array
  chosen_BC: jax.Array

  def attend(self, q_BCHE, own, layer, backend, window=None):
    """See `Memory.attend`."""
    pairs = zip(layer.kept, own(), strict=True)
    keys_and_values = tuple(self._overwritten(old_BSKE, new_BCKE) for old_BSKE, new_BCKE in pairs)
    out_BCHE = attention.attend(q_BCHE, *keys_and_values, self.queries, self.keys, backend, window)
    return out_BCHE, keys_and_values

  def _overwritten(self, old_BSKE: jax.Array, new_BCKE: jax.Array) -> jax.Array:
    writes_BC11 = self.chosen_BC[..., None, None]
    kept_BCKE = jnp.where(writes_BC11, new_BCKE, tokens.take(old_BSKE, self.indices_BC))
    return tokens.put(old_BSKE, self.indices_BC, kept_BCKE)


@struct.dataclass
class SlotCache:
  """The tokens of some lanes write into the cache, then attend to the part of it that belongs to them.

  They see themselves there too: so a quantised cache gives prefill and decoding the same numbers, and XLA
  need not copy the cache.

  Attributes:
    view: what each token reads; has the lanes' slots.
    entries_BC: entries that the tokens write; one beyond the pool writes nothing.
    region: entries of the largest region that is read.
    read: how the cache is read (`cached_attention`).
  """

  view: View
  entries_BC: jax.Array
  region: int = struct.field(pytree_node=False)
  read: str = struct.field(pytree_node=False)

  def attend(self, q_BCHE, own, layer, backend, window=None):
    """See `Memory.attend`; `layer.kept` is the pool of some layers, `layer.index` the layer's place there."""
    del backend
    k_BCKE, v_BCKE = own()
    pool: Pool = cache_lib.write(
      layer.kept, layer.index, self.view.slots_B, self.entries_BC, k_BCKE, v_BCKE, self.read != 'lanes'
    )
    out_BCHE = cached_attention.attend(
      q_BCHE, pool, layer.index, self.view, k_BCKE.shape[2], self.region, self.read, window
    )
    return out_BCHE, pool
