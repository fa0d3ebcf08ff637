"""What every rule of the settings says where it does not hold."""

from typing import Any

from mor_jax.errors import ConfigError


def require(condition: bool, flag: str, value: Any, allowed: str) -> None:
  """Raises ConfigError, naming flag, value and what is allowed, unless the condition holds."""
  if not condition:
    raise ConfigError(f'{flag}={value} is not allowed: must be {allowed}')
