"""Values from a JSON object that anybody may have written: of the right type and size, or noted as problems."""

import math
from collections.abc import Mapping
from typing import Any

MOST = 2**31


class Reader:
  """Reads values by name. A value that cannot be meant is noted, and something harmless returned in its place.

  Args:
    values: the JSON object.
    problems: where to note them.
  """

  def __init__(self, values: Mapping[str, Any], problems: list[str]):
    self._values, self._problems = values, problems

  def whole(self, name: str, default: int | None = None) -> int:
    """A number of things, at least 1; null and what is missing have the default, or are a problem without one."""
    value = self._values.get(name)
    if value is None and default is not None:
      return default
    if value is None:
      return self._problem(f'{name} is {"null" if name in self._values else "missing"}', 1)
    if type(value) is not int or not 1 <= value < MOST:
      return self._problem(f'{name}={_short(value)} (must be a whole number of at least 1)', 1)
    return value

  def count(self, name: str, default: int) -> int:
    """A number of things, which may be none."""
    value = self._values.get(name)
    return 0 if type(value) is int and value == 0 else self.whole(name, default)

  def number(self, name: str, default: float | None = None) -> float:
    """A finite number; null and what is missing have the default, or are a problem without one."""
    value = self._values.get(name)
    if value is None and default is not None:
      return default
    is_number = type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)
    return float(value) if is_number else self._problem(f'{name}={_short(value)} (must be a number)', 1.0)

  def flag(self, name: str, default: bool) -> bool:
    """True or false; null and what is missing have the default."""
    value = self._values.get(name)
    if value is None or isinstance(value, bool):
      return default if value is None else value
    return self._problem(f'{name}={_short(value)} (must be true or false)', default)

  def group(self, name: str) -> dict[str, Any]:
    """An object; {} for null and what is missing."""
    value = self._values.get(name)
    if value is None or isinstance(value, dict):
      return value or {}
    return self._problem(f'{name}={_short(value)} (must be an object)', {})

  def _problem(self, text: str, instead: Any) -> Any:
    self._problems.append(text)
    return instead


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 60 else f'{text[:60]}...'
