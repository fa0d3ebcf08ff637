"""Parses the HLO text of a compiled program and counts how often a run executes each instruction."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence

_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$')
_OPCODE = re.compile(r'([\w\-]+)\(')
_OPERAND = re.compile(r'%([\w.\-]+)')
_ARRAY = re.compile(r'\b([a-z]+\d*\w*)\[([\d,]*)\](?:\{[^}]*?(?:S\((\d+)\))?\})?')
_CALLED = re.compile(r'\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)')
_BRANCHES = re.compile(r'\bbranch_computations=\{([^}]*)\}')
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONSTANT = re.compile(r'\((-?\d+)\)')
_BITS = re.compile(r'(\d+)')
_CALLERS = ('call', 'while', 'conditional', 'fusion', 'async-start')


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of a shape: its bytes without padding, and its memory space (0: the device's main memory)."""

  bytes: int
  memory: int


@dataclasses.dataclass(frozen=True)
class Instruction:
  """`%name = shape opcode(%operands), attributes`."""

  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  attributes: str
  is_root: bool

  @functools.cached_property
  def arrays(self) -> list[Array]:
    """The arrays of its result, several if that is a tuple."""
    return [
      Array(_array_bytes(dtype, dimensions), int(memory or 0))
      for dtype, dimensions, memory in _ARRAY.findall(self.shape)
    ]

  @functools.cached_property
  def called(self) -> list[str]:
    """Computations that it runs, except the scalar ones of reductions and sorts; branches by their number."""
    if self.opcode not in _CALLERS:
      return []
    branches = _BRANCHES.search(self.attributes)
    return _CALLED.findall(self.attributes) + (_OPERAND.findall(branches.group(1)) if branches else [])


Computation = dict[str, Instruction]
Taken = Callable[[Instruction], Sequence[float] | None]


@dataclasses.dataclass(frozen=True)
class Program:
  """All computations of a module by name, and the name of the entry computation."""

  computations: dict[str, Computation]
  entry: str

  def executions(
    self, into_fusions: bool = False, taken: Taken | None = None
  ) -> Iterator[tuple[Computation, Instruction, float]]:
    """Yields (computation, instruction, number of executions).

    Args:
      into_fusions: also yield the instructions inside fusions.
      taken: how often each branch of a conditional is taken; None, for it or from it: all of them count.
    """

    def visit(name: str, times: float) -> Iterator[tuple[Computation, Instruction, float]]:
      computation = self.computations.get(name, {})
      for instruction in computation.values():
        yield computation, instruction, times
        if instruction.opcode == 'fusion' and not into_fusions:
          continue
        inner = times * (self._trip_count(computation, instruction) if instruction.opcode == 'while' else 1)
        shares = taken(instruction) if taken and instruction.opcode == 'conditional' else None
        for callee, share in zip(instruction.called, shares or [1] * len(instruction.called), strict=True):
          if share:
            yield from visit(callee, inner * share)

    return visit(self.entry, 1)

  def _trip_count(self, computation: Computation, loop: Instruction) -> int:
    """Number of iterations of a loop; 1 if it cannot be read from the text.

    Without an annotation by the compiler it is derived from the condition `counter < constant` and the
    constant at which the counter starts. This assumes a step of one, as in `lax.scan`.
    """
    known = _TRIP_COUNT.search(loop.attributes)
    if known:
      return int(known.group(1))
    condition = self.computations.get(re.search(r'condition=%?([\w.\-]+)', loop.attributes).group(1), {})
    root = next((instruction for instruction in condition.values() if instruction.is_root), None)
    if root is None or root.opcode != 'compare' or 'direction=LT' not in root.attributes:
      return 1
    counter, limit = (condition.get(name) for name in root.operands)
    if (
      counter is None or limit is None or limit.opcode != 'constant' or counter.opcode != 'get-tuple-element'
    ):
      return 1
    return max(1, _constant(limit) - self._start(computation, loop, counter))

  def _start(self, computation: Computation, loop: Instruction, counter: Instruction) -> int:
    carried = computation.get(loop.operands[0])
    index = int(re.search(r'index=(\d+)', counter.attributes).group(1))
    if carried is None or carried.opcode != 'tuple':
      return 0
    first = computation.get(carried.operands[index])
    while first is not None and first.opcode in ('copy', 'bitcast'):
      first = computation.get(first.operands[0])
    return _constant(first) if first is not None and first.opcode == 'constant' else 0


def parse(text: str) -> Program:
  """Parses HLO text: `compiled.as_text()` or a dumped `after_optimizations.txt`."""
  computations, entry, current = {}, '', None
  for line in text.splitlines():
    if line.endswith('{') and '->' in line:
      header = _HEADER.match(line)
      if header:
        current = computations.setdefault(header.group(2), {})
        entry = header.group(2) if header.group(1) else entry
        continue
    found = _INSTRUCTION.match(line)
    if found and current is not None:
      current[found.group(1)] = _instruction(found.group(1), found.group(2), 'ROOT ' in line[:12])
  return Program(computations, entry)


def _instruction(name: str, text: str, is_root: bool) -> Instruction:
  end = _balanced(text, 0) if text.startswith('(') else text.find(' ')
  shape, rest = text[:end], text[end:].lstrip()
  opcode = _OPCODE.match(rest)
  if opcode is None:
    return Instruction(name, shape, rest.partition('(')[0], (), '', is_root)
  close = _balanced(rest, opcode.end() - 1)
  inside = rest[opcode.end() : close - 1]
  operands = tuple(_OPERAND.findall(inside))
  # The value of a constant and the number of a parameter stand where operands do.
  attributes = rest[close:] if operands else f'({inside}){rest[close:]}'
  return Instruction(name, shape, opcode.group(1), operands, attributes, is_root)


def _balanced(text: str, start: int) -> int:
  """The index just after the parenthesis that closes the one at `start`."""
  depth = 0
  for place in range(start, len(text)):
    depth += {'(': 1, ')': -1}.get(text[place], 0)
    if depth == 0:
      return place + 1
  return len(text)


def _constant(instruction: Instruction) -> int:
  found = _CONSTANT.match(instruction.attributes)
  return int(found.group(1)) if found else 0


def _array_bytes(dtype: str, dimensions: str) -> int:
  bits = _BITS.search(dtype)
  itemsize = int(bits.group(1)) / 8 if bits else 1
  return int(itemsize * math.prod(int(size) for size in dimensions.split(',') if size))
