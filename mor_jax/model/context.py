"""Where tokens come from: what attention and rotation must know of them."""

import jax
import jax.numpy as jnp
from flax import struct

from mor_jax.model import tokens

NO_SEGMENT = -1  # tokens that take no part in a step; unlike padding (0) they are real tokens


@struct.dataclass
class TokenContext:
  """Where the C tokens that a layer works on come from.

  Attributes:
    positions_BC: position of each token in its segment, which sets its rotation and causal order.
    segments_BC: segment id; only tokens of one segment see each other. 0 is padding.
  """

  positions_BC: jax.Array
  segments_BC: jax.Array

  def take(self, indices_BC: jax.Array) -> 'TokenContext':
    """The context of gathered tokens."""
    return jax.tree.map(lambda leaf_BT: tokens.take(leaf_BT, indices_BC), self)

  def only(self, chosen_BC: jax.Array) -> 'TokenContext':
    """The same tokens, those not chosen cut off from the others."""
    return self.replace(segments_BC=jnp.where(chosen_BC, self.segments_BC, NO_SEGMENT))
