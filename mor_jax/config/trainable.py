"""Which parameters a training changes, as `train.trainable` and `train.stages` say it."""

import itertools
import re

from mor_jax.config.run import Config, TrainConfig
from mor_jax.errors import ConfigError

PARTS = {'all': '', 'routers': r'^(aux_)?router/', 'lora': r'(^|/)lora/', 'block': r'^block/'}
"""Parts with names of their own, as patterns over the paths of parameters."""

_STAGES_FORM = "write what is trained and for which share of the steps, such as 'routers:0.1;all'"


def patterns(trainable: str) -> dict[str, re.Pattern[str]]:
  """The pattern of each entry of a list such as 'routers,final_norm': what it finds in a path is trained.

  Raises:
    ConfigError: an entry is empty or no regular expression.
  """
  found = {}
  for entry in map(str.strip, trainable.split(',')):
    try:
      found[entry] = re.compile(PARTS.get(entry, entry))
    except re.error as error:
      raise ConfigError(
        f'train.trainable={trainable}: {entry!r} is no regular expression ({error}); commas separate patterns, so '
        f'none may contain one'
      ) from None
    if not entry:
      raise ConfigError(f'train.trainable={trainable!r} has an empty entry; use all, or name what is trained')
  return found


def stages(train: TrainConfig) -> list[tuple[int, str]]:
  """(updates done before, what is trained from then on) of every stage; one where nothing changes.

  Raises:
    ConfigError: `train.stages` cannot be read, or its shares leave nothing for the last stage.
  """
  if train.stages is None:
    return [(0, train.trainable)]
  *before, last = train.stages.split(';')
  parsed = [_with_share(train.stages, entry) for entry in before]
  if not parsed or _ends_in_number(last):
    raise ConfigError(
      f'train.stages={train.stages} must have two stages or more, the last without a share, since it takes the rest; '
      f'{_STAGES_FORM}'
    )
  ends = list(itertools.accumulate(share for _, share in parsed))
  if not all(share > 0 for _, share in parsed) or ends[-1] >= 1:
    raise ConfigError(
      f'train.stages={train.stages} has shares that are not above 0, or leave nothing for the last stage; they must '
      f'add up to less than 1'
    )
  firsts = [0, *(round(end * train.steps) for end in ends)]
  return list(zip(firsts, [*(trainable for trainable, _ in parsed), last.strip()], strict=True))


def _with_share(text: str, entry: str) -> tuple[str, float]:
  trainable, _, share = entry.rpartition(':')
  try:
    return trainable.strip(), float(share)
  except ValueError:
    raise ConfigError(f'train.stages={text}: {entry!r} has no share of the steps; {_STAGES_FORM}') from None


def _ends_in_number(entry: str) -> bool:
  _, colon, tail = entry.rpartition(':')
  try:
    return bool(colon) and float(tail) >= 0
  except ValueError:
    return False


def validate_trainable(config: Config) -> None:
  """Raises ConfigError if what is trained cannot be read, or is nothing that the model has."""
  train, model = config.train, config.model
  if train.stages is not None and train.trainable != 'all':
    raise ConfigError(
      f'train.trainable={train.trainable} and train.stages={train.stages} both say what is trained; leave one of them '
      f'at its default'
    )
  flag = 'train.trainable' if train.stages is None else 'train.stages'
  for _, trainable in stages(train):
    entries = patterns(trainable)
    if 'routers' in entries and (model.kind != 'mor' or model.random_router):
      what = f'model.kind={model.kind}' if model.kind != 'mor' else 'model.random_router=True'
      raise ConfigError(
        f'{flag}={train.stages or trainable} trains routers, which a model of {what} does not have; use '
        f'model.kind=mor and model.random_router=False, or train all, block or lora'
      )
    if 'lora' in entries and not model.lora_rank:
      raise ConfigError(
        f'{flag}={train.stages or trainable} trains low-rank changes, which there are none of with '
        f'model.lora_rank=0; set --config.model.lora_rank=16, or another rank'
      )
