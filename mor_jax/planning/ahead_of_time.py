"""Compiles the real train step ahead of time, for devices that may be absent, and reports its cost per device."""

import dataclasses

import numpy as np
from jax.sharding import Mesh

from mor_jax.config import Config, with_changes
from mor_jax.model import flops
from mor_jax.model.transformer import Transformer
from mor_jax.parallel import device_memory
from mor_jax.parallel import mesh as mesh_lib
from mor_jax.planning import chips, cost, roofline
from mor_jax.planning.cost import Cost
from mor_jax.training import distillation, handover, phases
from mor_jax.training.distillation import Teacher
from mor_jax.training.optimizer import make_optimizer
from mor_jax.training.state import abstract_state, initializer
from mor_jax.training.step import abstract_batch, make_train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program(Cost):
  """A compiled train step; all figures are per device.

  Attributes:
    config: the compiled config; of a training with several phases, see `compile_step`.
    mesh: the devices.
    parameter_bytes: size of the parameters on the device.
    optimizer_bytes: size of the optimiser state on the device.
    memory: memory capacity of the device in bytes; None if unknown.
  """

  config: Config
  mesh: Mesh
  parameter_bytes: int
  optimizer_bytes: int
  memory: float | None

  @property
  def fits(self) -> bool:
    """Whether the program compiled and its peak is within the memory, if that is known."""
    return not self.problem and (self.memory is None or self.peak_bytes <= self.memory)

  @property
  def rows(self) -> int:
    """Rows of a micro-batch in one shard."""
    return self.config.train.global_batch // self.config.train.accumulation // mesh_lib.row_shards(self.mesh)

  @property
  def tokens(self) -> float:
    """Tokens per step and device."""
    return self.config.train.global_batch * self.config.data.seq_len / self.mesh.size

  @property
  def model_flops(self) -> float:
    """Model FLOPs per step and device, without recomputation by remat."""
    return self.tokens * flops.train_flops_per_token(self.config.model, self.config.data.seq_len)

  @property
  def roofline(self) -> roofline.Roofline | None:
    """Lower bound on the time of a step; None for unknown devices and programs that do not fit."""
    chip = chips.of_kind(self.mesh.devices.flat[0].device_kind)
    if chip is None or self.problem:
      return None
    slice_of = np.array([getattr(device, 'slice_index', 0) or 0 for device in self.mesh.devices.flat])
    return roofline.estimate(chip, self.flops, self.traffic, self.collectives, slice_of)


def compile_step(config: Config, mesh: Mesh, teacher: Teacher | None = None, fast: bool = False) -> Program:
  """Compiles the train step of a config for a mesh.

  If the training has several phases (`phases.plan`), compiles the last, which has the final sizes, with the
  parameters trained that the stage has which trains most.

  Args:
    fast: reduce the compiler's optimisation effort. Compiling then takes at most a third of the time, but TPU
      programs have up to 15% more temporaries, and more memory traffic.
  """
  _, largest = handover.largest(config)
  config = with_changes(phases.plan(config)[-1][1], train={'trainable': largest})
  model, optimizer = Transformer(config.model), make_optimizer(config.train, config.model)
  state = abstract_state(initializer(model, optimizer, mesh, config.data.seq_len))
  batch = abstract_batch(config, mesh)
  theirs = (distillation.abstract_parameters(teacher, mesh),) if teacher else ()
  arguments = (state, batch, *theirs)
  step, device = make_train_step(model, config, optimizer, mesh, teacher), mesh.devices.flat[0]
  is_tpu = device.platform == 'tpu'
  found = cost.of(lambda: step.trace(*arguments), arguments, 'train_step', mesh.size, is_tpu, fast)
  chip = chips.of_kind(device.device_kind)
  return Program(
    config=config,
    mesh=mesh,
    parameter_bytes=device_memory.bytes_on_a_device(state.params),
    optimizer_bytes=device_memory.bytes_on_a_device(state.opt_state),
    memory=chip.hbm if chip else None,
    **vars(found),
  )
