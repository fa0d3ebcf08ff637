"""Runs each side of a benchmark in its own process; the sides take turns, so only one is busy at a time."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mor_jax.errors import RunError


class Side:
  """A process that answers questions, one at a time.

  Args:
    arguments: of Python; what they start calls `serve`.
    folder: checkout whose code it imports; None: this one.

  Attributes:
    about: what it said of itself when it was ready.

  Raises:
    RunError: the process ended.
  """

  def __init__(self, arguments: Sequence[str], folder: Path | None = None):
    self._what = ' '.join(arguments)
    environment = os.environ | ({'PYTHONPATH': str(folder)} if folder else {})
    self._process = subprocess.Popen(
      [sys.executable, *arguments],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      cwd=folder,
      env=environment,
    )
    self.about = self._read()

  def ask(self, question: Any) -> Any:
    """Returns the answer to a question; both are JSON values. Raises RunError if the process ended."""
    with contextlib.suppress(BrokenPipeError):  # reading tells more
      self._process.stdin.write(f'{json.dumps(question)}\n')
      self._process.stdin.flush()
    return self._read()

  def close(self) -> None:
    """Ends the process and waits for it."""
    self._process.stdin.close()
    self._process.wait()

  def _read(self) -> Any:
    line = self._process.stdout.readline()
    if not line:
      raise RunError(f'a process that was measured ended early; its error is above: {self._what}')
    return json.loads(line)


def serve(prepare: Callable[[], tuple[Any, Callable[[Any], Any]]]) -> None:
  """Runs the process of a `Side`: describes itself, then answers questions until there are none left.

  Args:
    prepare: gives (what it is, question -> answer). What it and the answers print goes to stderr.
  """
  answers = os.fdopen(os.dup(sys.stdout.fileno()), 'w')
  os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
  about, answer = prepare()
  print(json.dumps(about), file=answers, flush=True)
  for line in sys.stdin:
    print(json.dumps(answer(json.loads(line))), file=answers, flush=True)
