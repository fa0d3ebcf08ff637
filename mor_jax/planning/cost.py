"""What a program costs on devices that may be absent: compiled ahead of time, its memory and traffic read off."""

import contextlib
import dataclasses
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from mor_jax.parallel import device_memory
from mor_jax.planning import collectives, hlo, traffic
from mor_jax.planning.executed import executed_flops

# Two ways in which the TPU compiler says how much a program that does not fit would need.
_USED = re.compile(r'Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm')
_TEMPORARIES = re.compile(r'HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM')
_ALLOTTED = re.compile(r'Memory Space: default \(color=0\)\s+Total bytes: (\d+)')
_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


@dataclasses.dataclass(frozen=True)
class Cost:
  """What a program costs on each of its devices.

  Attributes:
    flops: FLOPs of the matrix products executed in a run, those computed again included.
    argument_bytes: size of the arguments.
    temp_bytes: temporaries and code; None if the program does not fit.
    peak_bytes: peak memory.
    traffic: bytes moved between memory and cores in a run; None if the program does not fit.
    collectives: the collectives of a run; None if the program does not fit.
    compile_seconds: wall-clock time of tracing, lowering and compiling.
    compile_cpu_seconds: the CPU time of the same, summed over all cores.
    problem: the compiler's message if the program does not fit, else ''.
  """

  flops: float
  argument_bytes: int
  temp_bytes: int | None
  peak_bytes: int
  traffic: int | None
  collectives: list[collectives.Collective] | None
  compile_seconds: float
  compile_cpu_seconds: float
  problem: str = ''


def of(
  trace: Callable[[], jax.stages.Traced],
  arguments: Any,
  name: str,
  devices: int,
  is_tpu: bool,
  fast: bool = False,
  taken: hlo.Taken | None = None,
) -> Cost:
  """Compiles a program.

  Args:
    trace: gives it.
    arguments: their shapes, with shardings.
    name: of the function that was traced.
    devices: that the program is for.
    fast: reduce the compiler's optimisation effort. Compiling then takes at most a third of the time, but TPU
      programs have up to 15% more temporaries, and more memory traffic.
    taken: shares of the branches of conditionals, for the traffic (`hlo.Program.executions`).
  """
  begin, cpu_begin = time.perf_counter(), time.process_time()
  traced = trace()
  flops = executed_flops(traced.jaxpr) / devices
  try:
    with _effort(-1.0 if fast else 0.0):
      compiled, text, allotted = _compile(traced.lower(), name, is_tpu)
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    known = device_memory.bytes_on_a_device(arguments)
    return Cost(
      flops,
      known,
      None,
      _needed(str(error), known),
      None,
      None,
      time.perf_counter() - begin,
      time.process_time() - cpu_begin,
      str(error).splitlines()[0],
    )
  seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
  program, memory = hlo.parse(text), compiled.memory_analysis()
  # Donated outputs live in the arguments' memory.
  outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
  if allotted is None:
    allotted = memory.argument_size_in_bytes + outputs + memory.temp_size_in_bytes
  peak = allotted + memory.generated_code_size_in_bytes
  return Cost(
    flops,
    memory.argument_size_in_bytes,
    peak - memory.argument_size_in_bytes - outputs,
    peak,
    traffic.memory_traffic(program, taken),
    collectives.collectives(program),
    seconds,
    cpu_seconds,
  )


def _compile(
  lowered: jax.stages.Lowered, name: str, is_tpu: bool
) -> tuple[jax.stages.Compiled, str, int | None]:
  """The executable, its HLO, and the bytes of main memory allocated to its buffers (None if not reported).

  Executables for absent TPUs cannot always return their HLO, so the compiler dumps it to a file. The dump also
  reports the allocated buffers, the figure by which the compiler decides whether a program fits. (The
  temporaries of `memory_analysis` are up to 60% larger, for undocumented reasons.)
  """
  if not is_tpu:
    compiled = lowered.compile()
    return compiled, compiled.as_text(), None
  with tempfile.TemporaryDirectory() as folder:
    compiled = lowered.compile({'xla_dump_to': folder, 'xla_dump_hlo_as_text': True})
    (path,) = Path(folder).glob(f'*jit_{name}*.after_optimizations.txt')
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
