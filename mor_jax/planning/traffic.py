"""Memory traffic of a compiled program, read from its HLO."""

from mor_jax.planning import hlo

# Nothing moves, or what moves is counted elsewhere: in the bodies of loops, at the start of a copy.
_FREE = {
  'parameter',
  'constant',
  'tuple',
  'get-tuple-element',
  'bitcast',
  'while',
  'conditional',
  'call',
  'async-start',
  'async-update',
  'async-done',
  'copy-done',
  'after-all',
  'partition-id',
  'replica-id',
  'opt-barrier',
  'iota',
}
_IN_PLACE = {'dynamic-update-slice': 1, 'scatter': 2}  # which operand has what is written
_PARTIAL_READS = {'dynamic-slice', 'slice', 'gather'}
_RENAMES = {'bitcast', 'copy', 'reshape', 'transpose', 'convert'}
_BOOKKEEPING = ('AllocateBuffer', 'AssumeGatherIndicesInBound')


def memory_traffic(program: hlo.Program, taken: hlo.Taken | None = None) -> int:
  """Bytes read from and written to a device's main memory in one run of the program.

  As in XLA's cost model, every kernel reads its operands and writes its results once. If an array is only
  sliced, only the slice is read; if it is updated in place, only the update is written. Arrays in on-chip
  memory are free, so a copy to or from it counts once.

  Args:
    taken: shares of the branches of conditionals (`hlo.Program.executions`); None: all of them count.
  """
  moved = sum(
    times * _moved(program, computation, instruction)
    for computation, instruction, times in program.executions(taken=taken)
    if instruction.opcode not in _FREE and not any(name in instruction.attributes for name in _BOOKKEEPING)
  )
  return round(moved)


def _moved(program: hlo.Program, computation: hlo.Computation, instruction: hlo.Instruction) -> int:
  operands = [computation[name] for name in instruction.operands if name in computation]
  if instruction.opcode == 'fusion' and instruction.called:
    body = program.computations.get(instruction.called[0], {})
    return _fusion_reads(program, body, operands) + _fusion_writes(body, instruction)
  if instruction.opcode in _PARTIAL_READS:
    return 2 * _size(instruction)
  if instruction.opcode in _IN_PLACE:
    return 2 * _size(operands[_IN_PLACE[instruction.opcode]])
  if instruction.opcode == 'copy-start':  # gives (destination, source, context)
    destination, source = instruction.arrays[:2]
    return sum(array.bytes for array in (destination, source) if array.memory == 0)
  return sum(_size(operand) for operand in operands) + _size(instruction)


def _fusion_reads(program: hlo.Program, body: hlo.Computation, operands: list[hlo.Instruction]) -> int:
  parameters = _parameters(body)
  return sum(
    min(_size(operand), _read_of(program, body, parameters[number]))
    for number, operand in enumerate(operands)
    if number in parameters and _size(operand)
  )


def _parameters(body: hlo.Computation) -> dict[int, str]:
  """Names of a fusion's parameters by number."""
  return {
    int(instruction.attributes[1:].partition(')')[0]): instruction.name
    for instruction in body.values()
    if instruction.opcode == 'parameter'
  }


def _read_of(program: hlo.Program, body: hlo.Computation, name: str) -> float:
  """Bytes read of a fusion's parameter; infinite (all of it) unless it is only sliced or updated in place."""
  total = 0.0
  for user in body.values():
    if name not in user.operands:
      continue
    if user.opcode in _PARTIAL_READS:
      total += _size(user, everywhere=True)
    elif user.opcode in _RENAMES:
      total += _read_of(program, body, user.name)
    elif user.opcode == 'fusion' and user.called:  # one within the other
      inner = program.computations.get(user.called[0], {})
      parameters = _parameters(inner)
      places = [place for place, operand in enumerate(user.operands) if operand == name]
      if not all(place in parameters for place in places):
        return float('inf')
      total += sum(_read_of(program, inner, parameters[place]) for place in places)
    elif user.opcode not in _IN_PLACE or user.operands[0] != name:
      return float('inf')
  return total


def _fusion_writes(body: hlo.Computation, fusion: hlo.Instruction) -> int:
  root = next((instruction for instruction in body.values() if instruction.is_root), None)
  if root is None:
    return _size(fusion)
  outputs = [body[name] for name in root.operands if name in body] if root.opcode == 'tuple' else [root]
  written = 0
  for output, array in zip(outputs, fusion.arrays, strict=False):
    if array.memory:
      continue
    while output.opcode in _RENAMES and output.operands and output.operands[0] in body:
      output = body[output.operands[0]]
    place = _IN_PLACE.get(output.opcode)
    update = body.get(output.operands[place]) if place else None
    written += array.bytes if update is None else min(array.bytes, _size(update, everywhere=True))
  return written


def _size(instruction: hlo.Instruction, everywhere: bool = False) -> int:
  """Bytes of the result's arrays in main memory, or in any memory if `everywhere`."""
  return sum(array.bytes for array in instruction.arrays if everywhere or array.memory == 0)
