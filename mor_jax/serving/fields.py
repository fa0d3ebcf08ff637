"""Fields of a JSON body: of the right type and in their range, or an error that names them."""

import math
from collections.abc import Callable
from typing import Any

from mor_jax.inference.requests import short
from mor_jax.serving.errors import ApiError

LARGEST = 2**31 - 1


class Fields:
  """A body, read field by field. A field that is null counts as missing, as with OpenAI; unknown ones are ignored."""

  def __init__(self, body: Any):
    """Raises ApiError if the body is no object."""
    if not isinstance(body, dict):
      raise ApiError(400, f'the body must be a JSON object, not {short(body)}')
    self._body = body

  def get(self, name: str, default: Any = None) -> Any:
    """A field of any type."""
    value = self._body.get(name)
    return default if value is None else value

  def refuse(self, name: str, allowed: str) -> ApiError:
    """The error for a field whose value is not allowed."""
    return ApiError(400, f'{name}={short(self._body.get(name))} is not allowed: must be {allowed}', name)

  def boolean(self, name: str, default: bool = False) -> bool:
    """A field that is true or false."""
    value = self.get(name, default)
    if not isinstance(value, bool):
      raise self.refuse(name, 'true or false')
    return value

  def integer(self, name: str, default: Any, low: int, high: int = LARGEST) -> Any:
    """A whole number from low to high; the default may be anything."""
    value = self.get(name)
    if value is None:
      return default
    if isinstance(value, float) and value.is_integer():
      value = int(value)
    if type(value) is not int or not low <= value <= high:
      raise self.refuse(name, f'a whole number from {low} to {high}')
    return value

  def number(self, name: str, default: float, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number from low to high."""
    value = self.get(name, default)
    try:
      holds = type(value) in (int, float) and math.isfinite(value) and low <= value <= high
    except OverflowError:
      holds = False
    if not holds:
      limits = '' if (low, high) == (-math.inf, math.inf) else f' from {low:g} to {high:g}'
      raise self.refuse(name, f'a number{limits}')
    return float(value)

  def text(self, name: str, default: str | None = None) -> str | None:
    """A text."""
    value = self.get(name, default)
    if value is not None and (not isinstance(value, str) or not is_text(value)):
      raise self.refuse(name, 'a text')
    return value

  def several(self, name: str, holds: Callable[[Any], bool], allowed: str, most: int) -> list[Any]:
    """A value, or a list of at most so many; [] if it is missing."""
    value = self.get(name, [])
    values = value if isinstance(value, list) else [value]
    if len(values) > most or not all(holds(one) for one in values):
      raise self.refuse(name, f'{allowed}, or a list of at most {most}')
    return values


def is_text(value: Any) -> bool:
  """Whether it can be written in UTF-8: a string without halves of surrogate pairs."""
  if not isinstance(value, str):
    return False
  try:
    value.encode()
  except UnicodeEncodeError:
    return False
  return True
