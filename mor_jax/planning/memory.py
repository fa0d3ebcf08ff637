"""Memory of a train step, in closed form: an estimate to choose a batch by before anything is compiled.

The figure that counts is the compiled one, which a run prints when it starts.
"""

import dataclasses

import jax.numpy as jnp

from mor_jax.config import Config
from mor_jax.model import flops
from mor_jax.training.vocabulary_loss import ACCELERATOR_CHUNK


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

  For accelerators, where attention holds no scores and logits exist for a chunk of tokens. Activations
  are the input of every unrolled layer for the tokens that enter it, and whichever is larger of what
  comes and goes: the logits of `train.loss_chunk` tokens with their gradient, in float32, or one layer's
  intermediate results with theirs. Steps of 8 rows of the 360M models compiled for a TPU v5p took 2% to 3%
  more in all (benchmarks/results/memory.md).
  """
  model, seq_len = config.model, config.data.seq_len
  parameters = flops.count_parameters(model).total
  tokens = 2 * model.unique_ends * seq_len
  tokens += model.shared_depth * sum(model.selected_tokens(seq_len))
  itemsize = jnp.dtype(model.dtype).itemsize
  kept = tokens * model.d_model * itemsize
  layer = 2 * seq_len * (3 * model.mlp_dim + 6 * model.d_model) * itemsize
  chunk = ACCELERATOR_CHUNK if config.train.loss_chunk is None else config.train.loss_chunk
  logits = 8 * min(chunk or rows * seq_len, rows * seq_len) * model.vocab_size
  return TrainMemory(
    state=12 * parameters,
    gradients=4 * parameters * (2 if config.train.accumulation > 1 else 1),
    activations=rows * kept + max(logits, rows * layer),
  )
