"""What is imported, and what is not: a start must not pay for what it does not use."""

import ast
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

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


ROOT = pathlib.Path(__file__).parents[1] / 'mor_jax'
COPIED = ROOT / 'interop' / 'hub'  # modules for transformers, which nobody imports here
# From the ground up: a room may import from its own and from those before it. Last come the entry points.
ROOMS = (
  'errors',
  'units',
  'files',
  'console',
  'config',
  'model',
  'parallel',
  'data',
  'checkpoints',
  'runs',
  'training',
  'inference',
  'evaluation',
  'interop',
  'quantisation',
  'planning',
  'recipes',
  'cli',
  'serving',
  'reporting',
  'sweeping',
)
MAY_USE = {'model': ('config', 'errors', 'units'), 'checkpoints': ('config', 'errors', 'files', 'parallel')}


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


def modules() -> dict[str, pathlib.Path]:
  """All modules of the package: name -> file. Those for transformers are left out."""
  paths = sorted(path for path in ROOT.rglob('*.py') if path.parent != COPIED)
  return {
    '.'.join(path.relative_to(ROOT.parent).with_suffix('').parts).removesuffix('.__init__'): path
    for path in paths
  }


def test_all_modules_can_be_imported_together():
  """Entry points, too: none defines a flag when it is imported, or two would clash."""
  assert run(f'import importlib\nfor name in {list(modules())}: importlib.import_module(name)') == ''


def imported(source: str, known) -> Iterator[str]:
  """Modules of this package that a source imports, wherever in it."""
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names if alias.name.split('.')[0] == 'mor_jax')
    elif isinstance(node, ast.ImportFrom) and (node.module or '').split('.')[0] == 'mor_jax':
      names = (f'{node.module}.{alias.name}' for alias in node.names)
      yield from (name if name in known else node.module for name in names)


def room(module: str) -> str:
  """The folder, or the file beside the folders, that a module is in."""
  return module.split('.')[1] if '.' in module else ''


def upward(module: str, source: str, known) -> list[str]:
  """Imports of a module that do not point downwards."""
  own, found = room(module), []
  for other in imported(source, known):
    theirs = room(other)
    if theirs in (own, ''):
      continue
    is_entry_point = own not in ROOMS
    below = theirs in ROOMS and (is_entry_point or ROOMS.index(theirs) < ROOMS.index(own))
    if not below or theirs not in MAY_USE.get(own, ROOMS):
      found.append(f'{module} imports {other}')
  return found


def test_imports_point_downwards_only():
  known = modules()
  assert [line for name, path in known.items() for line in upward(name, path.read_text(), known)] == []


@pytest.mark.parametrize(
  ('module', 'source'),
  [
    ('mor_jax.model.layers', 'from mor_jax.training import loss'),
    ('mor_jax.model.layers', 'from mor_jax.parallel.mesh import make_mesh'),
    ('mor_jax.checkpoints.retention', 'def f():\n  import mor_jax.runs.metrics'),
    ('mor_jax.data.loader', 'from mor_jax.train import main'),
    ('mor_jax.evaluate', 'from mor_jax import generate'),
  ],
)
def test_an_upward_import_is_found(module, source):
  assert len(upward(module, source, modules())) == 1


def test_no_module_imports_itself_over_others():
  """Within a room, too, there are no circles."""
  known = modules()
  uses = {name: set(imported(path.read_text(), known)) - {name} for name, path in known.items()}
  while leaves := [name for name, others in uses.items() if not others & uses.keys()]:
    for name in leaves:
      del uses[name]
  assert not uses, 'these import one another'
