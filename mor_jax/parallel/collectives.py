"""Communication of a compiled program, read from its HLO text."""

import collections
import math
import re

KINDS = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')

_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) .*\{\s*$')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?[\w.\-]+ = (.*)$')
_COLLECTIVE = re.compile(rf'^(.*?) ({"|".join(KINDS)})(-start)?\(')
_ARRAY = re.compile(r'\b([a-z]+\d*\w*)\[([\d,]*)\]')
_CALLED = re.compile(r'\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)')
_BRANCHES = re.compile(r'\bbranch_computations=\{([^}]*)\}')
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_BITS = re.compile(r'(\d+)')


def collective_bytes(hlo_text: str) -> dict[str, int]:
  """Bytes that one run of a program gets from collectives on each device, by kind.

  Counted are the results of every collective, those in the bodies of loops times the loop's trip
  count; a loop whose count the compiler does not know counts once, and of a conditional all branches.

  Args:
    hlo_text: the compiled (partitioned, optimised) program, `compiled.as_text()`.
  """
  computations, entry = _computations(hlo_text)
  totals = collections.Counter()

  def visit(name: str, times: int) -> None:
    for line in computations.get(name, ()):
      found = _COLLECTIVE.match(line)
      if found:
        result, kind, is_async = found.groups()
        totals[kind] += times * _result_bytes(result, bool(is_async))
      count = _TRIP_COUNT.search(line) if ' while(' in line else None
      inner = times * (int(count.group(1)) if count else 1)
      branches = _BRANCHES.search(line)
      called = _CALLED.findall(line) + (re.findall(r'[\w.\-]+', branches.group(1)) if branches else [])
      for callee in called:
        visit(callee, inner)

  visit(entry, 1)
  return dict(totals)


def _computations(hlo_text: str) -> tuple[dict[str, list[str]], str]:
  """Right-hand sides of every computation's instructions, and the name of the entry."""
  computations, entry, current = {}, '', None
  for line in hlo_text.splitlines():
    header, instruction = _HEADER.match(line), _INSTRUCTION.match(line)
    if header and '->' in line:
      current = computations.setdefault(header.group(2), [])
      entry = header.group(2) if header.group(1) else entry
    elif instruction and current is not None:
      current.append(instruction.group(1))
  return computations, entry


def _result_bytes(shape: str, is_async: bool) -> int:
  """Bytes of a shape; an asynchronous start gives its operands too, of which results are the later half."""
  sizes = []
  for dtype, dimensions in _ARRAY.findall(shape):
    bits = _BITS.search(dtype)
    itemsize = int(bits.group(1)) / 8 if bits else 1
    sizes.append(int(itemsize * math.prod(int(size) for size in dimensions.split(',') if size)))
  return sum(sizes[len(sizes) // 2 :] if is_async and len(sizes) > 1 else sizes)
