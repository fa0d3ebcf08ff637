"""Numbers as people read them."""


def quantity(number: float) -> str:
  """A count with three digits and a unit: 12.3 M."""
  for size, unit in ((1e12, ' T'), (1e9, ' G'), (1e6, ' M'), (1e3, ' k')):
    if number >= size:
      return f'{number / size:.3g}{unit}'
  return f'{number:.3g}'


def megabytes(num_bytes: float) -> str:
  """A size in MB, from 1 GB on in GB."""
  return f'{num_bytes / 1e6:,.1f} MB' if num_bytes < 1e9 else f'{num_bytes / 1e9:,.2f} GB'


def duration(seconds: float) -> str:
  """A time in seconds, from two minutes on in minutes, from two hours on in hours."""
  for size, unit in ((3600, ' h'), (60, ' min')):
    if seconds >= 2 * size:
      return f'{seconds / size:.3g}{unit}'
  return f'{seconds:.3g} s'
