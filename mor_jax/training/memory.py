"""Memory of a train step, in closed form: an estimate to choose a batch by before anything is compiled.

The figure that counts is the compiled one, which a run prints when it starts.
"""

import dataclasses

import jax.numpy as jnp

from mor_jax.config import Config
from mor_jax.model import flops


@dataclasses.dataclass(frozen=True)
class TrainMemory:
  """Bytes on a device that holds a whole copy of the parameters.

  Attributes:
    state: parameters and the two moments of AdamW, float32; exact.
    gradients: float32, twice where micro-batches are added up; exact.
    activations: what the backward pass keeps and its largest intermediate results; an estimate.
  """

  state: int
  gradients: int
  activations: int

  @property
  def total(self) -> int:
    """Sum of the three."""
    return self.state + self.gradients + self.activations


def train_memory(config: Config, rows: int) -> TrainMemory:
  """Memory of a step with `remat=full` and `rows` rows of each micro-batch on the device.

  Activations are, per row: the input of every unrolled layer for the tokens that enter it,
  logits with their gradient in float32 (8TV bytes), and one layer's attention scores with
  weights and gradient (10HT^2). Steps compiled for a TPU v5e took from 3% more in all to 14%
  less, and where its memory got short 28% less.
  """
  model, seq_len = config.model, config.data.seq_len
  parameters = flops.count_parameters(model).total
  tokens = 2 * model.unique_ends * seq_len
  tokens += model.shared_depth * sum(model.selected_tokens(seq_len))
  kept = tokens * model.d_model * jnp.dtype(model.dtype).itemsize
  logits = 8 * seq_len * model.vocab_size
  scores = 10 * model.num_heads * seq_len**2
  return TrainMemory(
    state=12 * parameters,
    gradients=4 * parameters * (2 if config.train.accumulation > 1 else 1),
    activations=rows * (kept + logits + scores),
  )
