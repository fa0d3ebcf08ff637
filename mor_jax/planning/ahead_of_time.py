"""Compiles the real train step ahead of time, for devices that may be absent, and reports its cost per device."""

import contextlib
import dataclasses
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mor_jax.config import Config
from mor_jax.model import flops
from mor_jax.model.transformer import Transformer
from mor_jax.parallel import mesh as mesh_lib
from mor_jax.planning import chips, collectives, hlo, roofline, traffic
from mor_jax.planning.executed import executed_flops
from mor_jax.training import distillation, phases
from mor_jax.training.distillation import Teacher
from mor_jax.training.optimizer import make_optimizer
from mor_jax.training.state import TrainState, abstract_state, initializer
from mor_jax.training.step import abstract_batch, make_train_step

# Two ways in which the TPU compiler says how much a program that does not fit would need.
_USED = re.compile(r'Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm')
_TEMPORARIES = re.compile(r'HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM')
_ALLOTTED = re.compile(r'Memory Space: default \(color=0\)\s+Total bytes: (\d+)')
_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled train step; all figures are per device.

  Attributes:
    config: the compiled config, the last phase if the training has several.
    mesh: the devices.
    parameter_bytes: size of the parameters on the device.
    optimizer_bytes: size of the optimiser state on the device.
    argument_bytes: size of the step's arguments: parameters, optimiser state, counters and the batch.
    temp_bytes: gradients, activations, other temporaries and code; None if the program does not fit.
    peak_bytes: peak memory.
    memory: memory capacity of the device in bytes; None if unknown.
    flops: FLOPs of the matrix products executed in a step, recomputation included.
    traffic: bytes moved between memory and cores in a step; None if the program does not fit.
    collectives: the collectives of a step; None if the program does not fit.
    compile_seconds: wall-clock time of tracing, lowering and compiling.
    compile_cpu_seconds: the CPU time of the same, summed over all cores.
    problem: the compiler's message if the program does not fit, else ''.
  """

  config: Config
  mesh: Mesh
  parameter_bytes: int
  optimizer_bytes: int
  argument_bytes: int
  temp_bytes: int | None
  peak_bytes: int
  memory: float | None
  flops: float
  traffic: int | None
  collectives: list[collectives.Collective] | None
  compile_seconds: float
  compile_cpu_seconds: float
  problem: str = ''

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

  If the training has several phases (`phases.plan`), compiles the last, which has the final sizes.

  Args:
    fast: reduce the compiler's optimisation effort. Compiling then takes at most a third of the time, but TPU
      programs have up to 15% more temporaries, and more memory traffic.
  """
  config = phases.plan(config)[-1][1]
  model, optimizer = Transformer(config.model), make_optimizer(config.train, config.model)
  state = abstract_state(initializer(model, optimizer, mesh, config.data.seq_len))
  batch = abstract_batch(config, mesh)
  begin, cpu_begin = time.perf_counter(), time.process_time()
  theirs = (distillation.abstract_parameters(teacher, mesh),) if teacher else ()
  traced = make_train_step(model, config, optimizer, mesh, teacher).trace(state, batch, *theirs)
  chip = chips.of_kind(mesh.devices.flat[0].device_kind)
  known = {
    'config': config,
    'mesh': mesh,
    'parameter_bytes': _bytes_on_a_device(state.params),
    'optimizer_bytes': _bytes_on_a_device(state.opt_state),
    'memory': chip.hbm if chip else None,
    'flops': executed_flops(traced.jaxpr) / mesh.size,
  }
  try:
    with _effort(-1.0 if fast else 0.0):
      compiled, text, allotted = _compile(traced.lower(), mesh)
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    arguments = _bytes_on_a_device((state, batch, theirs))
    return Program(
      **known,
      argument_bytes=arguments,
      temp_bytes=None,
      peak_bytes=_needed(str(error), arguments),
      traffic=None,
      collectives=None,
      compile_seconds=time.perf_counter() - begin,
      compile_cpu_seconds=time.process_time() - cpu_begin,
      problem=str(error).splitlines()[0],
    )
  seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
  program, memory = hlo.parse(text), compiled.memory_analysis()
  # Donated outputs live in the arguments' memory.
  outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
  if allotted is None:
    allotted = memory.argument_size_in_bytes + outputs + memory.temp_size_in_bytes
  peak = allotted + memory.generated_code_size_in_bytes
  return Program(
    **known,
    argument_bytes=memory.argument_size_in_bytes,
    temp_bytes=peak - memory.argument_size_in_bytes - outputs,
    peak_bytes=peak,
    traffic=traffic.memory_traffic(program),
    collectives=collectives.collectives(program),
    compile_seconds=seconds,
    compile_cpu_seconds=cpu_seconds,
  )


def _compile(lowered: jax.stages.Lowered, mesh: Mesh) -> tuple[jax.stages.Compiled, str, int | None]:
  """The executable, its HLO, and the bytes of main memory allocated to its buffers (None if not reported).

  Executables for absent TPUs cannot always return their HLO, so the compiler dumps it to a file. The dump also
  reports the allocated buffers, the figure by which the compiler decides whether a program fits. (The
  temporaries of `memory_analysis` are up to 60% larger, for undocumented reasons.)
  """
  if mesh.devices.flat[0].platform != 'tpu':
    compiled = lowered.compile()
    return compiled, compiled.as_text(), None
  with tempfile.TemporaryDirectory() as folder:
    compiled = lowered.compile({'xla_dump_to': folder, 'xla_dump_hlo_as_text': True})
    (path,) = Path(folder).glob('*jit_train_step*.after_optimizations.txt')
    report = path.with_name(path.name.replace('.txt', '-memory-usage-report.txt'))
    allotted = _ALLOTTED.search(report.read_text()) if report.exists() else None
    return compiled, path.read_text(), int(allotted[1]) if allotted else None


def _needed(message: str, arguments: int) -> int:
  """Bytes that a program would need, from the compiler's out-of-memory message."""
  used, temporaries = _USED.search(message), _TEMPORARIES.search(message)
  if temporaries:
    return arguments + int(float(temporaries[1]) * _UNITS[temporaries[2]])
  return int(float(used[1]) * _UNITS[used[2]]) if used else arguments


@contextlib.contextmanager
def _effort(effort: float) -> Iterator[None]:
  before = jax.config.jax_exec_time_optimization_effort
  jax.config.update('jax_exec_time_optimization_effort', effort)
  try:
    yield
  finally:
    jax.config.update('jax_exec_time_optimization_effort', before)


def _bytes_on_a_device(tree: TrainState | Any) -> int:
  return sum(
    leaf.dtype.itemsize * int(np.prod(leaf.sharding.shard_shape(leaf.shape)))
    for leaf in jax.tree.leaves(tree)
  )
