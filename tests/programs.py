"""Programs among the tests, which need more devices than the tests have."""

import json
import os
import subprocess
import sys
from pathlib import Path


def measure(name: str, cases: list[dict]) -> list[dict]:
  """What tests/NAME.py prints for the cases, a line of JSON for each."""
  program = Path(__file__).with_name(f'{name}.py')
  # Threads of XLA's pool on CPU. A device that waits in a collective holds one, and a program may wait in two at a
  # time: as many as devices, the default on few cores, can all be taken.
  threads = {'NPROC': '32'}
  result = subprocess.run(
    [sys.executable, program, json.dumps(cases)],
    env=os.environ | threads | {'PYTHONPATH': str(program.parents[1])},
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 0, result.stderr[-3000:]
  return [json.loads(line) for line in result.stdout.splitlines()]
