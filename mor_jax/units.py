"""Numbers as people read them."""


def quantity(number: float) -> str:
  """A count with three digits and a unit: 12.3 M."""
  for size, unit in ((1e12, ' T'), (1e9, ' G'), (1e6, ' M'), (1e3, ' k')):
    if number >= size:
      return f'{number / size:.3g}{unit}'
  return f'{number:.3g}'
