"""Losses and gradients that are not finite: what the user is told about them.

The decision is the device's (`step.py`): such an update is never applied. The host reads about it a few steps later.
"""

import contextlib
import math
from collections.abc import Callable, Iterator

from mor_jax.config import TrainConfig
from mor_jax.errors import RunError
from mor_jax.runs.metrics import Record

_MODULE = 'grad_norm/'


class NonFiniteError(RunError):
  """The loss or gradient of a step is NaN or infinite. Neither its update nor any later one was applied.

  Attributes:
    step: the step that halted the training; the state is the one before it.
    records: (step, record) of earlier logged steps that have not been written yet.
  """

  def __init__(self, step: int, values: Record, records: list[tuple[int, Record]]):
    super().__init__(f'{describe(step, values)}; the update was not applied')
    self.step, self.records = step, records

  def add(self, text: str) -> None:
    """Appends to the message."""
    self.args = (f'{self}; {text}',)


@contextlib.contextmanager
def explained(train: TrainConfig, describe_batch: Callable[[int], str]) -> Iterator[None]:
  """Within, a NonFiniteError also says what the step's batch had and what a user can do.

  Args:
    describe_batch: step -> which rows its batch has.
  """
  try:
    yield
  except NonFiniteError as error:
    error.add(f'its batch had {describe_batch(error.step)}')
    error.add(_remedy(train))
    raise


def _remedy(train: TrainConfig) -> str:
  if train.on_nonfinite == 'skip':
    return f'raise train.max_skipped={train.max_skipped} to leave out more, or lower train.learning_rate'
  return 'set train.on_nonfinite=skip to leave it out, or lower train.learning_rate'


def is_finite(values: Record) -> bool:
  """Whether loss and gradient norm are finite, so that the update was applied."""
  return math.isfinite(values['loss']) and math.isfinite(values['grad_norm'])


def describe(step: int, values: Record) -> str:
  """Names the non-finite metric of a step and lists the gradient norm of every module."""
  names = [name for name in ('loss', 'grad_norm') if not math.isfinite(values[name])]
  found = ' and '.join(f'{name} is {values[name]}' for name in names)
  norms = [
    f'{name.removeprefix(_MODULE)} {value:.3g}' for name, value in values.items() if name.startswith(_MODULE)
  ]
  return f'{found} at step {step}' + (f' (gradient norms: {", ".join(norms)})' if norms else '')
