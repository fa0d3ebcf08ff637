"""The collectives of a compiled program, read from its HLO."""

import collections
import dataclasses
import re

import numpy as np

from mor_jax.planning import hlo

KINDS = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')

_LISTED = re.compile(r'replica_groups=\{(\{[\d,{}]*\})\}')
_IOTA = re.compile(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?')


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of a program.

  Attributes:
    kind: one of KINDS.
    bytes: size of its result on each device.
    times: how often it runs.
    groups: partition indices (groups, members) that communicate; None: all partitions, or pairs.
  """

  kind: str
  bytes: int
  times: int
  groups: np.ndarray | None


def collectives(program: hlo.Program) -> list[Collective]:
  """All collectives executed by one run of the program; a conditional contributes those of all branches."""
  found = []
  for _, instruction, times in program.executions(into_fusions=True):
    kind = instruction.opcode.removesuffix('-start')
    if kind in KINDS:
      found.append(Collective(kind, _result_bytes(instruction), times, _groups(instruction.attributes)))
  return found


def collective_bytes(hlo_text: str) -> dict[str, int]:
  """Bytes that each device receives from collectives in one run of a program, by kind.

  Counts the result of every collective, times the trip count of the loops around it. A loop of unknown
  trip count counts once. A conditional counts all its branches.

  Args:
    hlo_text: the compiled (partitioned, optimised) program, `compiled.as_text()`.
  """
  return total_bytes(collectives(hlo.parse(hlo_text)))


def total_bytes(found: list[Collective]) -> dict[str, int]:
  """Bytes of the collectives' results, by kind."""
  totals = collections.Counter()
  for one in found:
    totals[one.kind] += one.times * one.bytes
  return dict(totals)


def _result_bytes(instruction: hlo.Instruction) -> int:
  """Bytes of the result; two kinds of asynchronous start also return their operand, before the result."""
  sizes = [array.bytes for array in instruction.arrays]
  if instruction.opcode == 'collective-permute-start':
    return sizes[1]
  if instruction.opcode == 'all-gather-start':
    return sum(sizes[len(sizes) // 2 :])
  return sum(sizes)


def _groups(attributes: str) -> np.ndarray | None:
  iota, listed = _IOTA.search(attributes), _LISTED.search(attributes)
  if iota:
    shape, source, order = ([int(n) for n in part.split(',')] if part else None for part in iota.groups())
    return np.arange(np.prod(source)).reshape(source).transpose(order).reshape(shape)
  if listed:
    groups = [[int(n) for n in group.split(',')] for group in re.findall(r'\{([\d,]+)\}', listed.group(1))]
    return np.array(groups)
  return None
