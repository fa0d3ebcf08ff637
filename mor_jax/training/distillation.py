"""Distillation: the original model's predictions as targets, beside the text (docs/uptraining.md).

The teacher runs in the same program, on the same rows and devices; its logits exist for a chunk of
tokens at a time, as the student's do.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax.sharding import Mesh

from mor_jax.config import ConfigError, DistillConfig, ModelConfig
from mor_jax.model.transformer import Transformer, abstract_variables, parameter_axes
from mor_jax.parallel import rules
from mor_jax.training import vocabulary_loss


@dataclasses.dataclass(frozen=True)
class Teacher:
  """A model to learn from, without its parameters, and how."""

  model: Transformer
  config: DistillConfig

  @property
  def loss(self) -> vocabulary_loss.TokenLoss:
    """Sum of NLL + weight * divergence over tokens, and both sums: 'loss' and 'distill_loss'."""
    return partial(_loss, self.config)

  def show(self, params: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Its final states (B, T, D) and output head (D, V) for a micro-batch; no gradient flows into it."""
    x_BTD, kernel_DV, _ = self.model.apply(
      {'params': params},
      batch['tokens'],
      segment_ids=batch['segment_ids'],
      positions=batch['positions'],
      method=Transformer.states_and_head,
    )
    return jax.lax.stop_gradient((x_BTD, kernel_DV))


def divergence(
  student_NV: jax.Array, teacher_NV: jax.Array, temperature: float, top_k: int | None
) -> jax.Array:
  """Forward divergence KL(teacher || student) * temperature^2 in nats, (N,); see Hinton et al. 2015.

  Args:
    student_NV, teacher_NV: logits, float32.
    temperature: divides both; the factor temperature^2 keeps the gradient's size.
    top_k: the teacher's distribution is that of its so many most probable tokens, which add up to 1; the
      student's is that of all. None: of all tokens.
  """
  student_NV, teacher_NV = student_NV / temperature, teacher_NV / temperature
  if top_k is not None and top_k < teacher_NV.shape[-1]:
    least_N1 = jax.lax.top_k(teacher_NV, top_k)[0][:, -1:]
    teacher_NV = jnp.where(teacher_NV >= least_N1, teacher_NV, -jnp.inf)
  wanted_NV = jax.nn.log_softmax(teacher_NV)
  got_NV = jax.nn.log_softmax(student_NV)
  return (
    jnp.where(wanted_NV > -jnp.inf, jnp.exp(wanted_NV) * (wanted_NV - got_NV), 0).sum(-1) * temperature**2
  )


def _loss(config: DistillConfig, logits_NV, per_token_N, teacher_kernel_DV):
  targets_N, mask_N, teacher_ND = per_token_N
  nll = vocabulary_loss.next_token_nll(logits_NV, (targets_N, mask_N))
  teacher_NV = jnp.dot(
    teacher_ND, teacher_kernel_DV.astype(teacher_ND.dtype), preferred_element_type=jnp.float32
  )
  divergence_N = divergence(logits_NV, teacher_NV, config.temperature, config.top_k)
  kl = jnp.where(mask_N, divergence_N, 0).sum()
  return nll + config.weight * kl, {'loss': nll, 'distill_loss': kl}


def make_teacher(config: DistillConfig, theirs: ModelConfig, student: ModelConfig) -> Teacher:
  """The teacher of a student, with the student's dtype and backends.

  Raises:
    ConfigError: their vocabularies differ.
  """
  if theirs.vocab_size != student.vocab_size:
    raise ConfigError(
      f'distill.weight={config.weight} needs a teacher with the model.vocab_size={student.vocab_size} of the model; '
      f'it has {theirs.vocab_size}'
    )
  same = {name: getattr(student, name) for name in ('dtype', 'attention', 'unroll_layers')}
  return Teacher(Transformer(dataclasses.replace(theirs, **same)), config)


def abstract_parameters(teacher: Teacher, mesh: Mesh) -> Any:
  """Shapes, dtypes and shardings of the teacher's parameters: matrices in the dtype they are multiplied in."""
  config = teacher.model.config
  shapes = nn.unbox(abstract_variables(config))['params']
  dtype = jnp.dtype(config.dtype)

  def leaf(path, shape, sharding):
    is_scale = path[-1].key == 'scale'
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype if is_scale else dtype, sharding=sharding)

  laid_out = rules.shardings(mesh, shapes, parameter_axes(config))
  return jax.tree_util.tree_map_with_path(leaf, shapes, laid_out)


def load_parameters(abstract: Any, weights: Any) -> Any:
  """The teacher's parameters on the devices, each reading its own part of a leaf.

  Args:
    weights: `interop.weights.Weights` of the teacher.
  """
  flat = traverse_util.flatten_dict(abstract, sep='/')
  for name, spec in flat.items():
    leaf = np.asarray(weights.leaf(f'params/{name}')).astype(spec.dtype)
    flat[name] = jax.make_array_from_callback(spec.shape, spec.sharding, leaf.__getitem__)
  return traverse_util.unflatten_dict(flat, sep='/')
