"""Tasks of lm-evaluation-harness (package `lm_eval`): finds them quickly, checks them, and runs them in process."""

import difflib
import importlib.util
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mor_jax.config import ConfigError
from mor_jax.data import hubs

PATIENCE = 5.0  # seconds after which the Hugging Face hub counts as unreachable
OFFLINE = ('HF_HUB_OFFLINE', 'HF_DATASETS_OFFLINE', 'HF_EVALUATE_OFFLINE', 'TRANSFORMERS_OFFLINE')
TOO_MANY_EXAMPLES = 'Sample larger than population', 'Error: number of fewshot samples requested exceeds'
INSTALL = "pip install 'mor_jax[eval]', or pip install lm_eval"

_NAMES = re.compile(r'^(?:task|group|tag):[ \t]*(.*)$((?:\n[ \t]*-[ \t]+.*$)*)', re.MULTILINE)
_NAME = re.compile(r'[^\s\'",\[\]]+')


def prepare() -> None:
  """Sets offline mode before importing the libraries if there is no network, so that they do not wait for it.

  Raises:
    ConfigError: the harness is not installed.
  """
  if importlib.util.find_spec('lm_eval') is None:
    raise ConfigError(f'--tasks needs lm-evaluation-harness: {INSTALL}')
  if not any(os.environ.get(name) for name in OFFLINE[:2]) and not _hub_answers():
    os.environ.update(dict.fromkeys(OFFLINE, '1'))


def _hub_answers() -> bool:
  endpoint = os.environ.get('HF_ENDPOINT', 'https://huggingface.co')
  try:
    hubs.require_network(endpoint, '--tasks', patience=PATIENCE)
  except ConfigError:
    return False
  return True


def load(names: Sequence[str], include_path: str | None = None) -> Any:
  """Returns the harness's task manager with these tasks loaded.

  Args:
    names: tasks, groups and tags of the harness or of YAML files below `include_path`; or YAML files.

  Raises:
    ConfigError: a task is unknown, cannot be loaded, or runs model-generated code; or the folder is missing.
  """
  from lm_eval.tasks import TaskManager

  class LoadedTasks(TaskManager):
    """Loads the tasks once, with clear errors."""

    def load(self, task_list):
      if not hasattr(self, '_loaded'):
        self._loaded = super().load(task_list)
      return self._loaded

  if include_path is not None and not Path(include_path).is_dir():
    raise ConfigError(
      f'--include_path={include_path} is not a folder; name one that holds the YAML files of tasks'
    )
  own = [Path(include_path)] if include_path else []
  manager = LoadedTasks(include_path=own, include_defaults=False)
  missing = [name for name in names if name not in manager.task_index and not _is_file(name)]
  if missing:
    # Reading all 15,000 descriptions that the harness brings takes half a minute: only those in question are.
    families = _families(missing, list(manager.task_index))
    manager = LoadedTasks(include_path=[*families, *own], include_defaults=False)
  try:
    loaded = _load(manager, names)
  except KeyError:  # a group whose members lie elsewhere
    manager = LoadedTasks(include_path=own, include_defaults=True)
    loaded = _load(manager, names)
  for name, task in loaded['tasks'].items():
    if getattr(task.config, 'unsafe_code', False):
      raise ConfigError(f'--tasks: {name} runs code that the model writes, which is not supported')
  return manager


def _is_file(name: str) -> bool:
  return name.endswith(('.yaml', '.yml')) and Path(name).is_file()


def _load(manager: Any, names: Sequence[str]) -> dict[str, Any]:
  try:
    return manager.load(list(names))
  except KeyError:
    raise
  except Exception as error:  # of datasets, jinja2, yaml, the task's own code: each has its own
    reason = next(iter(str(error).strip().splitlines()), '') or type(error).__name__
    shown = ','.join(names)
    if any(os.environ.get(name) for name in OFFLINE):
      raise ConfigError(
        f'--tasks={shown} cannot be loaded, and there is no network to fetch data from ({reason}); connect, run '
        f'once where there is a network and copy ~/.cache/huggingface, or describe local files in a YAML file and '
        f'give its folder as --include_path (docs/evaluation.md)'
      ) from None
    raise ConfigError(f'--tasks={shown} cannot be loaded: {type(error).__name__}: {reason}') from None


def _families(names: Sequence[str], own: Iterable[str]) -> list[Path]:
  """Folders of the harness that define these names. Raises ConfigError for undefined names."""
  root = Path(importlib.util.find_spec('lm_eval').origin).parent / 'tasks'
  found: dict[str, set[Path]] = {}
  for path in sorted(root.rglob('*.yaml')):
    for match in _NAMES.finditer(path.read_text(encoding='utf-8', errors='replace')):
      for name in _NAME.findall(f'{match[1].partition(" #")[0]} {match[2]}'):
        found.setdefault(name, set()).add(root / path.relative_to(root).parts[0])
  for name in names:
    if name not in found:
      close = difflib.get_close_matches(name, [*found, *own], n=3)
      hint = f'did you mean {" or ".join(close)}?' if close else 'lm-eval ls tasks lists those it has'
      raise ConfigError(f'--tasks={name} is not a task of lm-evaluation-harness or in --include_path; {hint}')
  return sorted(set().union(*(found[name] for name in names)))


def run(model: Any, names: Sequence[str], manager: Any, **settings: Any) -> dict[str, Any]:
  """Runs tasks and returns the harness's results in its own format, without the samples.

  Args:
    model: a `harness.HarnessModel`.
    manager: the result of `load` for these names.
    **settings: further arguments of `lm_eval.simple_evaluate`, such as num_fewshot and limit.

  Raises:
    ConfigError: a task needs something unsupported by the model, or more examples than exist.
  """
  from lm_eval import simple_evaluate
  from lm_eval.utils import handle_non_serializable

  try:
    found = simple_evaluate(model, tasks=list(names), task_manager=manager, log_samples=False, **settings)
  except (ValueError, AssertionError) as error:
    if isinstance(error, ConfigError):
      raise
    if any(reason in str(error) for reason in TOO_MANY_EXAMPLES):
      raise ConfigError(
        f'--num_fewshot={settings.get("num_fewshot")} of --tasks={",".join(names)} is more than there are examples to '
        f'draw from, which are those of the split for examples without the question itself; lower it'
      ) from None
    if isinstance(error, AssertionError):
      raise
    raise ConfigError(f'--tasks={",".join(names)}: {error}') from error
  found = {name: value for name, value in found.items() if name != 'samples'}
  return json.loads(json.dumps(found, default=handle_non_serializable))
