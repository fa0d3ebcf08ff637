"""Studies on a stand-in for the training, whose best learning rate is known."""

import functools
import sys
from pathlib import Path

import pytest

from benchmarks import trained
from mor_jax.sweeping.runner import Runner

STAND_IN = str(Path(__file__).parent / 'stand_in_train.py')


def stand_in(patch: pytest.MonkeyPatch, best_rate: float) -> None:
  """Trainings take no time from here on, and learn best at this rate."""
  train = (sys.executable, STAND_IN, '--step_seconds=0', f'--best_rate={best_rate}')
  patch.setattr(trained, 'Runner', functools.partial(Runner, train=train))
