"""The two errors that entry points show as one sentence, without a traceback."""


class ConfigError(ValueError):
  """A setting that cannot work. The message names the flag, its value and the remedy."""


class RunError(RuntimeError):
  """A run that cannot go on. The message says why and what to do; entry points show it and exit with 1."""
