"""Reports on a compiled train step, as text and as JSON."""

from mor_jax.config import Config
from mor_jax.console import Row
from mor_jax.planning import collectives
from mor_jax.planning.ahead_of_time import Program
from mor_jax.units import byte_count, megabytes, quantity


def describe(program: Program, asked: Config) -> list[Row]:
  """The rows of the report on a program; figures are per device unless stated otherwise."""
  config, devices = program.config, program.mesh.devices
  axes = ' '.join(f'{axis}={size}' for axis, size in program.mesh.shape.items())
  train = config.train
  lowered = ''
  if train.accumulation != asked.train.accumulation:
    lowered = f' (train with --config.train.accumulation={train.accumulation}: {asked.train.accumulation} would be too many)'
  rows = [
    ('devices', f'{devices.size} x {devices.flat[0].device_kind}, mesh {axes}'),
    (
      'batch',
      f'{train.global_batch} rows x {config.data.seq_len} tokens in {train.accumulation} micro-batches of '
      f'{program.rows} rows a device{lowered}',
    ),
    ('remat', f'{config.model.remat}; attention {config.model.attention}'),
    ('memory', memory(program)),
    (
      '',
      f'parameters {megabytes(program.parameter_bytes)}, optimiser state {byte_count(program.optimizer_bytes)} '
      f'(trained: {train.trainable})',
    ),
  ]
  if program.temp_bytes is not None:
    rows += [('', f'gradients, activations and temporaries {megabytes(program.temp_bytes)}')]
  rows += [
    (
      'FLOPs',
      f'{quantity(program.flops)} in a step, {program.flops / program.model_flops:.2f} times what the '
      f'model asks for',
    )
  ]
  if program.collectives is not None:
    by_kind = collectives.total_bytes(program.collectives)
    kinds = ', '.join(f'{kind} {megabytes(size)}' for kind, size in sorted(by_kind.items()))
    rows += [
      ('collectives', f'{megabytes(sum(by_kind.values()))} in a step' + (f': {kinds}' if kinds else '')),
      ('HBM traffic', f'{megabytes(program.traffic)} in a step'),
    ]
  if program.roofline:
    rows += [('roofline', _roofline(program)), ('', speed(program))]
  return [*rows, ('compiled', f'in {program.compile_seconds:.1f} s')]


def memory(program: Program) -> str:
  """The peak memory, the device's capacity, and whether the program fits."""
  if program.memory is None:
    return megabytes(program.peak_bytes)
  verdict = 'fits' if program.fits else 'DOES NOT FIT'
  return f'{megabytes(program.peak_bytes)} of {megabytes(program.memory)}: {verdict}'


def _roofline(program: Program) -> str:
  roofline = program.roofline
  return (
    f'a step takes at least {roofline.seconds:.3f} s, bound by {roofline.bound} (compute {roofline.compute:.3f}, memory '
    f'{roofline.memory:.3f}, interconnect {roofline.interconnect:.3f}, network {roofline.network:.3f}; '
    f'one after the other {roofline.one_after_the_other:.3f})'
  )


def speed(program: Program) -> str:
  """Upper bounds on throughput and MFU; empty if the roofline is unknown."""
  if program.roofline is None:
    return ''
  figures = _figures(program)
  return (
    f'at most {quantity(figures["tokens_per_second"])} tokens/s a device, '
    f'{quantity(figures["tokens_per_second"] * program.mesh.size)} in all; MFU at most {figures["mfu"]:.0%}'
  )


def _figures(program: Program) -> dict[str, float]:
  seconds = program.roofline.seconds
  busy = program.model_flops / program.flops * program.roofline.compute
  return {'step_seconds': seconds, 'tokens_per_second': program.tokens / seconds, 'mfu': busy / seconds}


def as_json(program: Program) -> dict:
  """Figures per device; null if unknown or if the program does not fit."""
  by_kind = None if program.collectives is None else collectives.total_bytes(program.collectives)
  figures = (
    _figures(program) if program.roofline else dict.fromkeys(('step_seconds', 'tokens_per_second', 'mfu'))
  )
  return {
    'name': program.config.name,
    'devices': program.mesh.size,
    'mesh': dict(program.mesh.shape),
    'rows': program.rows,
    'accumulation': program.config.train.accumulation,
    'remat': program.config.model.remat,
    'trainable': program.config.train.trainable,
    'fits': program.fits,
    'memory_bytes': None if program.memory is None else int(program.memory),
    'peak_bytes': program.peak_bytes,
    'argument_bytes': program.argument_bytes,
    'parameter_bytes': program.parameter_bytes,
    'optimizer_bytes': program.optimizer_bytes,
    'temp_bytes': program.temp_bytes,
    'flops': program.flops,
    'model_flops': program.model_flops,
    'traffic_bytes': program.traffic,
    'collective_bytes': None if by_kind is None else sum(by_kind.values()),
    'collective_bytes_by_kind': by_kind,
    **figures,
    'compile_seconds': program.compile_seconds,
    'compile_cpu_seconds': program.compile_cpu_seconds,
  }
