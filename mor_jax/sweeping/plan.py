"""The runs of a sweep: names, settings and commands, all checked before the first run starts."""

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import config_dict

from mor_jax import cli
from mor_jax.config import Config, ConfigError
from mor_jax.data import schedule
from mor_jax.runs.run_folder import RunFolder
from mor_jax.training import budget, trainable

SEEDS = ('train.seed', 'data.seed')
"""Settings that make no other experiment, only another sample of it."""


@dataclasses.dataclass(frozen=True)
class PlannedRun:
  """One training run of a sweep.

  Attributes:
    name: name of the run, its folder and its log.
    group: name without seeds, shared by repetitions of the same experiment.
    overrides: settings from the sweep, by dotted name.
    config: the resulting settings.
    folder: folder of the run.
    words: flags for `python -m mor_jax.train`.
  """

  name: str
  group: str
  overrides: dict[str, Any]
  config: Config
  folder: RunFolder
  words: tuple[str, ...]

  @property
  def tokens(self) -> int:
    """Training tokens."""
    return schedule.of(self.config.train).rows_before(self.config.train.steps) * self.config.data.seq_len

  @property
  def work(self) -> float:
    """Forward FLOPs of the whole run, counted as in the paper; a relative measure of its duration."""
    return self.tokens * budget.paper_flops_per_token(self.config)


@dataclasses.dataclass(frozen=True)
class Plan:
  """A sweep with valid settings.

  Attributes:
    sweep: the value of --sweep.
    config: the value of --config.
    folder: folder of the sweep, with runs/NAME, logs/NAME.log and the results.
    runs: the runs, in the order of the sweep file.
  """

  sweep: str
  config: str
  folder: Path
  runs: tuple[PlannedRun, ...]

  def log(self, run: PlannedRun) -> Path:
    """Path of the log of a run."""
    return self.folder / 'logs' / f'{run.name}.log'

  @property
  def axes(self) -> list[str]:
    """Settings of the sweep that differ between runs."""
    names = dict.fromkeys(name for run in self.runs for name in run.overrides if name != 'name')
    return [name for name in names if len({repr(value_of(run.config, name)) for run in self.runs}) > 1]


def value_of(config: Config, name: str) -> Any:
  """A setting by its dotted name."""
  for part in name.split('.'):
    config = getattr(config, part)
  return config


def read(
  config_spec: str,
  flags: dict[str, Any],
  sweep_spec: str,
  workdir: str | None,
  allow_change: Sequence[str] = (),
) -> Plan:
  """Reads the plan from a sweep file with a function `get_sweep(base)`, where base is the Config of --config.

  Args:
    config_spec: PATH or PATH:VARIANT of --config.
    flags: settings from the command line, which apply to all runs.
    sweep_spec: PATH or PATH:VARIANT of --sweep. The file is run as trusted code.
    workdir: folder of the sweep; None: runs/sweep-NAME.
    allow_change: settings in which runs may go on differently although they decide what is trained.

  Raises:
    ConfigError: the sweep is invalid. The message names the run.
  """
  base = _base(config_spec, flags)
  folder = Path(workdir or f'runs/sweep-{Path(sweep_spec.partition(":")[0]).stem}')
  return make(config_spec, flags, _entries(sweep_spec, base), sweep_spec, folder, allow_change)


def _base(config_spec: str, flags: dict[str, Any]) -> Config:
  if 'name' in flags:
    raise ConfigError(
      f'--config.name={flags["name"]} cannot hold for all runs of a sweep, which names them; choose their '
      f'folder with --workdir'
    )
  return cli.load_config(config_spec, flags)


def make(
  config_spec: str,
  flags: dict[str, Any],
  listed: list[Any],
  sweep_spec: str,
  folder: Path,
  allow_change: Sequence[str] = (),
) -> Plan:
  """Makes the plan for a list of overrides (see `read`).

  Args:
    listed: overrides of each run.
    sweep_spec: name of the sweep in messages.
    folder: folder of the sweep.
    allow_change: see `read`.
  """
  entries = [_overrides(entry, sweep_spec) for entry in listed]
  for entry in entries:
    for name in sorted(entry.keys() & flags.keys()):
      raise ConfigError(
        f'--config.{name}={flags[name]} is given, and --sweep={sweep_spec} sets it to {entry[name]}; '
        f'leave out the flag or change the sweep'
      )
  names, groups = _names(entries), _names(entries, without=SEEDS)
  _refuse_repeated(names, entries, sweep_spec)
  runs = []
  for name, group, entry in zip(names, groups, entries, strict=True):
    try:
      config = budget.with_budgeted_steps(cli.load_config(config_spec, {**flags, **entry, 'name': name}))
      trainable.check(config)
      run_folder = RunFolder(folder / 'runs' / name)
      run_folder.check(config, allow_change)
    except ConfigError as error:
      raise ConfigError(f'--sweep={sweep_spec}: run {name}: {error}') from None
    changes = {**flags, **entry, 'name': name}
    words = (f'--config={config_spec}', f'--workdir={run_folder.path}', *map(_flag, changes.items()))
    if allow_change:
      words += (f'--allow_change={",".join(allow_change)}',)
    runs.append(PlannedRun(name, group, entry, config, run_folder, words))
  _refuse_alike(runs, sweep_spec)
  return Plan(sweep_spec, config_spec, folder, tuple(runs))


def _entries(spec: str, base: Config) -> list[Any]:
  entries = cli.call_file('sweep', spec, 'get_sweep', base)
  if not isinstance(entries, (list, tuple)):
    raise ConfigError(
      f'--sweep={spec}: get_sweep() returned {type(entries).__name__}, it must return a list of dicts such as '
      f"{{'train.seed': 1}} (mor_jax.sweeping.axes.grid makes one)"
    )
  if not entries:
    raise ConfigError(f'--sweep={spec}: get_sweep() returned no runs')
  return list(entries)


def _overrides(entry: Any, spec: str) -> dict[str, Any]:
  """An entry of a sweep as plain values by dotted name. Nested dicts and ConfigDicts are flattened."""
  if isinstance(entry, config_dict.ConfigDict):
    entry = entry.to_dict()
  if not isinstance(entry, Mapping):
    raise ConfigError(f'--sweep={spec}: get_sweep() lists {entry!r}, where a dict of overrides is wanted')
  flat = {}
  for name, value in entry.items():
    if isinstance(value, Mapping):
      flat |= {f'{name}.{inner}': item for inner, item in _overrides(value, spec).items()}
    else:
      flat[name] = value.item() if hasattr(value, 'item') else value  # NumPy numbers are not Python numbers
  if not isinstance(flat.get('name', ''), str):
    raise ConfigError(f'--sweep={spec}: name={flat["name"]!r} must be text')
  return flat


def _names(entries: list[dict[str, Any]], without: tuple[str, ...] = ()) -> list[str]:
  """The `name` of each entry, followed by the settings that differ between entries of the same name."""
  alike = collections.defaultdict(list)
  for entry in entries:
    alike[entry.get('name', '')].append(entry)
  differing = {
    given: [
      name
      for name in dict.fromkeys(name for entry in group for name in entry)
      if len({repr(entry.get(name)) for entry in group}) > 1 and name not in without
    ]
    for given, group in alike.items()
  }
  names = []
  for entry in entries:
    given = entry.get('name', '')
    present = [name for name in differing[given] if name in entry]
    short = [name.rpartition('.')[2] for name in present]
    parts = [
      f'{last if short.count(last) == 1 else name}={_text(entry[name])}'
      for last, name in zip(short, present, strict=True)
    ]
    text = ','.join([given] * bool(given) + parts) or 'base'
    names.append(re.sub(r'[^A-Za-z0-9._=+,-]+', '_', text))
  return names


def _refuse_repeated(names: list[str], entries: list[dict[str, Any]], spec: str) -> None:
  repeated = [name for name, count in collections.Counter(names).items() if count > 1]
  if repeated:
    alike = [entry for name, entry in zip(names, entries, strict=True) if name == repeated[0]]
    if any(entry != alike[0] for entry in alike):
      raise ConfigError(
        f'--sweep={spec}: {len(alike)} runs would be called {repeated[0]}, since their values differ only in '
        f'characters that names of folders do without; give each a "name" of its own'
      )
    raise ConfigError(
      f'--sweep={spec}: {names.count(repeated[0])} runs are called {repeated[0]} and have the same overrides; '
      f'every run must differ from the others'
    )


def _refuse_alike(runs: list[PlannedRun], spec: str) -> None:
  seen, checkpoints = {}, {}
  for run in runs:
    shared = run.config.checkpoint.folder
    if shared and checkpoints.setdefault(shared, run) is not run:
      raise ConfigError(
        f'--sweep={spec}: checkpoint.folder={shared} would be that of run {checkpoints[shared].name} and of '
        f'run {run.name}; leave it unset, so that checkpoints lie in the folders of the runs'
      )
    other = seen.setdefault(repr(dataclasses.replace(run.config, name='')), run)
    if other is not run:
      raise ConfigError(
        f'--sweep={spec}: runs {other.name} and {run.name} have the same settings; every run must differ '
        f'from the others'
      )


def _flag(change: tuple[str, Any]) -> str:
  name, value = change
  return f'--config.{name}={_text(value)}'


def _text(value: Any) -> str:
  """A value in the syntax of command-line flags."""
  if value is None:
    return 'none'
  if isinstance(value, bool):
    return 'true' if value else 'false'
  return ','.join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
