"""Closed-form estimate of a train step's memory, for choosing a batch size before compiling.

The compiled figure, which a run prints when it starts, is authoritative.
"""

import dataclasses

import jax.numpy as jnp

from mor_jax.config import Config
from mor_jax.model import flops
from mor_jax.training import handover, trainable
from mor_jax.training.vocabulary_loss import ACCELERATOR_CHUNK


@dataclasses.dataclass(frozen=True)
class TrainMemory:
  """Bytes on a device that holds a full replica of the parameters.

  Attributes:
    state: parameters, and the two moments of AdamW of those that are trained, float32; exact.
    gradients: of the trained ones, float32, twice with gradient accumulation; exact.
    activations: activations kept for the backward pass and the largest temporaries; an estimate.
  """

  state: int
  gradients: int
  activations: int

  @property
  def total(self) -> int:
    """Sum of the three."""
    return self.state + self.gradients + self.activations


def train_memory(config: Config, rows: int) -> TrainMemory:
  """Memory of a step with `remat=full` and `rows` rows per micro-batch on the device.

  Applies to accelerators, where attention keeps no scores and logits exist for one chunk of tokens.
  Activations are the input of every unrolled layer, for the tokens that enter it, plus the larger of two
  temporaries: the float32 logits of `train.loss_chunk` tokens with their gradient, or the intermediate
  results of one layer with their gradients. Steps of 8 rows of the 360M models, compiled for a TPU v5p,
  took 2% to 3% more in total (benchmarks/results/memory.md).
  """
  model, seq_len = config.model, config.data.seq_len
  parameters = flops.count_parameters(model).total
  _, largest = handover.largest(config)
  trained = trainable.count_parameters(model, largest)
  tokens = 2 * model.unique_ends * seq_len
  tokens += model.shared_depth * sum(model.selected_tokens(seq_len))
  itemsize = jnp.dtype(model.dtype).itemsize
  kept = tokens * model.d_model * itemsize
  layer = 2 * seq_len * (3 * model.mlp_dim + 6 * model.d_model) * itemsize
  chunk = ACCELERATOR_CHUNK if config.train.loss_chunk is None else config.train.loss_chunk
  logits = 8 * min(chunk or rows * seq_len, rows * seq_len) * model.vocab_size
  return TrainMemory(
    state=4 * parameters + 8 * trained,
    gradients=4 * trained * (2 if config.train.accumulation > 1 else 1),
    activations=rows * kept + max(logits, rows * layer),
  )
