"""Settings of a run that may change when it goes on, and what is said of the others."""

from collections.abc import Iterator, Sequence
from typing import Any

from mor_jax.config import Config, ConfigError, settings

MAY_CHANGE = (
  'name',
  'model.threshold_slack',
  'model.dispatch',
  'model.remat',
  'model.attention',
  'model.unroll_layers',
  'data.cache_dir',
  'data.prefetch',
  'data.workers',
  'data.max_bad_fraction',
  'data.max_unknown_fraction',
  'train.accumulation',
  'train.loss_chunk',
  'train.on_nonfinite',
  'train.max_skipped',
  'train.spike_zscore',
  'train.hang_seconds',
  'train.exit_on_hang',
  'train.log_every',
  'train.eval_every',
  'train.eval_rows',
  'train.sample_tokens',
  'train.sample_prompt',
  'train.sample_temperature',
  'checkpoint.every_steps',
  'checkpoint.every_minutes',
  'checkpoint.max_unsaved_steps',
  'checkpoint.keep',
  'checkpoint.keep_every',
  'checkpoint.keep_best',
  'parallel.replica',
  'parallel.fsdp',
  'parallel.tensor',
  'parallel.dcn_replica',
  'parallel.dcn_fsdp',
)
"""Settings that a resumed run may change: they do not decide what is trained."""


_LEFT_OPEN = (('model.vocab_size', None), ('data.begin', 'auto'))  # filled in from the run


def require_known(names: Sequence[str]) -> None:
  """Raises ConfigError if one of the names is that of no setting."""
  unknown = [name for name in names if name not in settings()]
  if unknown:
    raise ConfigError(f'--allow_change={unknown[0]} is not a setting; write it as in --config.SECTION.NAME')


def changed(stored: Config, wanted: Config, allowed: Sequence[str] = ()) -> dict[str, str]:
  """Changed settings that may not change, by name: what they were and are.

  Args:
    stored: settings of the run so far.
    wanted: settings with which it shall go on.
    allowed: names that may change in addition to MAY_CHANGE.
  """
  return {
    name: text for name, text in _differences(stored.to_dict(), wanted.to_dict()) if name not in allowed
  }


def _differences(
  stored: dict[str, Any], wanted: dict[str, Any], prefix: str = ''
) -> Iterator[tuple[str, str]]:
  for name, value in stored.items():
    key, other = f'{prefix}{name}', wanted[name]
    if isinstance(value, dict):
      yield from _differences(value, other, f'{key}.')
    elif value != other and key not in MAY_CHANGE and (key, other) not in _LEFT_OPEN:
      yield key, f'{key} was {value}, now {other}'
