"""Numbers as people read them."""

TIMES = ((3600, 'h', 'hours'), (60, 'min', 'minutes'), (1, 's', 'seconds'))


def quantity(number: float) -> str:
  """A count with three digits and a unit: 12.3 M."""
  for size, unit in ((1e12, ' T'), (1e9, ' G'), (1e6, ' M'), (1e3, ' k')):
    if number >= size:
      return f'{number / size:.3g}{unit}'
  return f'{number:.3g}'


def byte_count(num_bytes: float) -> str:
  """A size with three digits and a unit, however small it is: 12.3 kB."""
  text = quantity(num_bytes)
  return f'{text}B' if text[-1].isalpha() else f'{text} B'


def megabytes(num_bytes: float) -> str:
  """A size in MB, from 1 GB on in GB."""
  return f'{num_bytes / 1e6:,.1f} MB' if num_bytes < 1e9 else f'{num_bytes / 1e9:,.2f} GB'


def time_unit(seconds: float) -> tuple[int, str, str]:
  """The unit to tell a time in: its seconds, its symbol and its name. Minutes from two of them on, hours likewise."""
  return next((unit for unit in TIMES if seconds >= 2 * unit[0]), TIMES[-1])


def duration(seconds: float) -> str:
  """A time with three digits and a unit: 12.3 s."""
  size, symbol, _ = time_unit(seconds)
  return f'{seconds / size:.3g} {symbol}'
