"""Finds changes to a config that make its train step fit into device memory, by compiling each candidate."""

import dataclasses
import math
from collections.abc import Callable, Iterator

from mor_jax.config import Config, ConfigError, with_changes
from mor_jax.parallel import mesh as mesh_lib
from mor_jax.planning.ahead_of_time import Program

REMATS = ('none', 'dots', 'full', 'block', 'offload')  # ever less is kept, ever more computed again

Compile = Callable[[Config], Program]  # a config for the devices at hand; may raise ConfigError


@dataclasses.dataclass(frozen=True)
class Attempt:
  """A changed config as compiled.

  Attributes:
    flags: what to add to the command line.
    program: the result.
  """

  flags: str
  program: Program


def remedies(program: Program, compile_config: Compile) -> Iterator[Attempt]:
  """Tries to make a program fit: fewer rows per micro-batch, stronger remat, more shards of the state.

  Yields every attempt. Each of the three remedies ends with its first attempt that fits.
  """
  for kind in (_fewer_rows, _stronger_remat, _more_shards):
    for section, setting, value in kind(program):
      config = with_changes(program.config, **{section: {setting: value}})
      try:
        attempt = Attempt(f'--config.{section}.{setting}={value}', compile_config(config))
      except ConfigError:  # sizes that cannot be split so
        continue
      yield attempt
      if attempt.program.fits:
        break


def _fewer_rows(program: Program) -> Iterator[tuple[str, str, int]]:
  """More gradient accumulation: the most rows that should fit, by proportion, then a single row."""
  train, excess = program.config.train, program.peak_bytes - program.argument_bytes
  room = max(0.0, (program.memory or 0) - program.argument_bytes)
  fewer = [rows for rows in _row_counts(program) if rows < program.rows]
  promising = [rows for rows in fewer if rows <= program.rows * room / excess][:1]
  for rows in dict.fromkeys([*promising, *fewer[-1:]]):
    yield 'train', 'accumulation', train.accumulation * program.rows // rows


def _row_counts(program: Program) -> list[int]:
  """Possible rows per device and micro-batch for this global batch, in descending order."""
  by_device = program.config.train.global_batch // mesh_lib.row_shards(program.mesh)
  return [rows for rows in range(by_device, 0, -1) if by_device % rows == 0]


def _stronger_remat(program: Program) -> Iterator[tuple[str, str, str]]:
  for remat in REMATS[REMATS.index(program.config.model.remat) + 1 :]:
    yield 'model', 'remat', remat


def _more_shards(program: Program) -> Iterator[tuple[str, str, int]]:
  """More fsdp shards: the smallest number that should fit, then the largest possible."""
  replicas, fsdp = program.mesh.shape['replica'], program.config.parallel.fsdp
  if fsdp == -1 or program.config.parallel.replica != -1:
    return
  whole = program.argument_bytes + program.parameter_bytes  # with the gradients
  excess = program.peak_bytes - (program.memory or 0)
  factors = [factor for factor in range(2, replicas + 1) if replicas % factor == 0]
  promising = [factor for factor in factors if whole * (1 - 1 / factor) >= excess][:1]
  for factor in dict.fromkeys([*promising, *factors[-1:]]):
    yield 'parallel', 'fsdp', fsdp * factor


def suggestions(program: Program, compile_config: Compile) -> Iterator[Attempt]:
  """Searches, for every remat setting, the most rows per micro-batch that fit; yields every attempt."""
  counts = _row_counts(program)
  for remat in REMATS:
    tried: dict[int, Program] = {}

    def attempt(rows: int, remat: str = remat, tried: dict[int, Program] = tried) -> Attempt:
      accumulation = program.config.train.accumulation * program.rows // rows
      config = with_changes(program.config, model={'remat': remat}, train={'accumulation': accumulation})
      tried[rows] = compile_config(config)
      return Attempt(f'--config.model.remat={remat} --config.train.accumulation={accumulation}', tried[rows])

    rows = counts[-1]
    while rows not in tried:
      yield attempt(rows)
      rows = _next_rows(counts, tried)


def _next_rows(counts: list[int], tried: dict[int, Program]) -> int:
  """Rows to try next: the most that should fit, extrapolating two peaks linearly. A tried value ends the search."""
  fitting = sorted(rows for rows, program in tried.items() if program.fits)
  failed = min((rows for rows, program in tried.items() if not program.fits), default=math.inf)
  if not fitting:
    return next(iter(tried))
  most = fitting[-1]
  between = [rows for rows in counts if most < rows < failed]
  if not between:
    return most
  if len(fitting) == 1:
    return between[-1]
  first, second = fitting[-2:]
  slope = (tried[second].peak_bytes - tried[first].peak_bytes) / (second - first)
  room = tried[second].memory - tried[second].peak_bytes
  return next((rows for rows in between if (rows - second) * slope <= 0.98 * room), most)


def best(attempts: list[Attempt]) -> Attempt | None:
  """The attempt that fits and has the fastest step by its roofline; None if none fits.

  Ties go to the shortest step without overlap or, if the roofline is unknown, to the most rows.
  """
  fitting = [attempt for attempt in attempts if attempt.program.fits]
  return min(fitting, key=_seconds, default=None)


def _seconds(attempt: Attempt) -> tuple[float, float]:
  roofline = attempt.program.roofline
  return (roofline.seconds, roofline.one_after_the_other) if roofline else (0.0, -attempt.program.rows)
