"""What is imported, and what is not: a start must not pay for what it does not use."""

import os
import subprocess
import sys

# None of them has to do with the model; each takes between a tenth of a second and several.
HEAVY = (
  'tensorflow',
  'tensorflow_datasets',
  'grain',
  'orbax',
  'tensorboardX',
  'torch',
  'transformers',
)


def run(program: str, *folders) -> str:
  """What a fresh Python prints that finds modules in the folders first."""
  path = os.pathsep.join(map(str, (*folders, os.getcwd())))
  environment = {**os.environ, 'PYTHONPATH': path}
  ended = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True, env=environment, check=False
  )
  assert ended.returncode == 0, ended.stderr
  return ended.stdout.strip()


def test_the_model_comes_without_data_and_checkpoints():
  program = f'import sys, mor_jax.model.transformer; print([name for name in {HEAVY} if name in sys.modules])'
  assert run(program) == '[]'


def test_metrics_come_without_pytorch(tmp_path):
  """tensorboardX imports it if it is there; here is one that cannot be imported."""
  (tmp_path / 'torch.py').write_text('raise RuntimeError("imported")')
  program = f"""
import pathlib, sys
from mor_jax.runs.metrics import MetricsLog
with MetricsLog(pathlib.Path({str(tmp_path)!r}), 0) as log:
  log.write(1, {{'train/loss': 1.0}})
print('torch' in sys.modules, len(list(pathlib.Path({str(tmp_path)!r}).glob('tensorboard/events*'))))
"""
  assert run(program, tmp_path) == 'False 1'
