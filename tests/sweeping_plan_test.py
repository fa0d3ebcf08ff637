"""What a sweep file may say, what the shipped ones say, and that nothing wrong is found out only later."""

from pathlib import Path

import numpy as np
import pytest

from mor_jax import cli
from mor_jax.config import ConfigError, with_changes
from mor_jax.model import flops
from mor_jax.runs.run_folder import RunFolder
from mor_jax.sweeping import axes, plan

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / 'configs' / 'tiny.py')
RUNS = {'sharing': 11, 'router': 18, 'token_choice': 13, 'kv': 23, 'isoflop': 27, 'learning_rate': 45}


@pytest.fixture
def read(tmp_path):
  """Plans a sweep whose get_sweep(base) returns an expression."""

  def read(expression: str, **flags) -> plan.Plan:
    file = tmp_path / 'sweep.py'
    file.write_text(f'from mor_jax.sweeping.axes import *\ndef get_sweep(base):\n  return {expression}\n')
    return plan.read(TINY, flags, str(file), str(tmp_path / 'sweep'))

  return read


def shipped(name: str, tmp_path: Path) -> plan.Plan:
  return plan.read(TINY, {}, str(ROOT / 'configs' / 'sweeps' / f'{name}.py'), str(tmp_path))


def test_every_shipped_sweep_is_valid_for_the_tiny_model(tmp_path):
  assert {path.stem for path in (ROOT / 'configs' / 'sweeps').glob('*.py')} == RUNS.keys()
  assert {name: len(shipped(name, tmp_path).runs) for name in RUNS} == RUNS


def test_isoflop_runs_cost_what_their_budget_says(tmp_path):
  runs = shipped('isoflop', tmp_path).runs
  budgets = sorted({run.config.train.flops_budget for run in runs})
  np.testing.assert_allclose(np.array(budgets) / budgets[-1], [2 / 16.5, 5 / 16.5, 1], rtol=0.01)
  for run in runs:
    spent = run.tokens * flops.paper_flops_per_token(run.config.model, run.config.data.seq_len)
    assert spent == pytest.approx(run.config.train.flops_budget, rel=0.02), run.name
  assert len({run.config.model.d_model for run in runs}) == 3


def test_kinds_of_the_learning_rate_sweep_differ_in_nothing_else(tmp_path):
  made = shipped('learning_rate', tmp_path)
  assert made.axes == ['model.kind', 'train.learning_rate', 'train.seed', 'data.seed']
  assert len({run.group for run in made.runs}) == 15


def test_grid_and_product():
  assert axes.grid({'a': (1, 2), 'b': 'xy'}) == [
    {'a': 1, 'b': 'x'},
    {'a': 1, 'b': 'y'},
    {'a': 2, 'b': 'x'},
    {'a': 2, 'b': 'y'},
  ]
  assert axes.product([{'a': 1}], [{'b': 2}, {'a': 3}]) == [{'a': 1, 'b': 2}, {'a': 3}]
  assert [axes.depth(32, 3, 'middle_cycle'), axes.depth(32, 3, 'cycle'), axes.depth(3, 4, 'cycle')] == [
    32,
    33,
    4,
  ]


def test_runs_are_named_by_what_they_differ_in(read):
  made = read("grid({'train.learning_rate': (1e-3, 2e-3), 'train.seed': (0, 1), 'data.seed': (0,)})")
  assert [run.name for run in made.runs] == [
    'learning_rate=0.001,seed=0',
    'learning_rate=0.001,seed=1',
    'learning_rate=0.002,seed=0',
    'learning_rate=0.002,seed=1',
  ]
  assert [run.group for run in made.runs][::2] == ['learning_rate=0.001', 'learning_rate=0.002']


def test_given_names_are_kept_and_told_apart(read):
  made = read(
    "product([{'name': 'a'}, {'name': 'b b', 'model.kind': 'vanilla'}], grid({'train.seed': (0, 1)}))"
  )
  assert [run.name for run in made.runs] == ['a,seed=0', 'a,seed=1', 'b_b,seed=0', 'b_b,seed=1']
  assert [run.config.name for run in made.runs] == [run.name for run in made.runs]
  assert [run.group for run in made.runs] == ['a', 'a', 'b_b', 'b_b']


def test_overrides_of_all_forms_arrive_and_pass_the_command_line(read):
  """The flags of each run, read as train reads them, give the very config that was checked."""
  made = read(
    "[{'model': {'capacities': (1.0, 0.5, 0.25)}, 'train.seed': 1},"
    " {'data.drop_duplicates': True, 'train.learning_rate': __import__('numpy').float64(1e-3)},"
    " {'model.capacities': None, 'checkpoint.keep_every': 7, 'train.flops_budget': 1e12}]",
    **{'train.log_every': 5},
  )
  assert made.runs[0].config.model.capacities == (1.0, 0.5, 0.25)
  assert made.runs[2].config.train.steps != made.runs[0].config.train.steps
  for run in made.runs:
    given = dict(word.removeprefix('--config.').split('=', 1) for word in run.words[2:])
    assert given['train.log_every'] == '5'
    parsed = {name: cli.parse_setting(name, text) for name, text in given.items()}
    config = cli.load_config(TINY, parsed)
    assert with_changes(config, train={'steps': run.config.train.steps}) == run.config


@pytest.mark.parametrize(
  ('expression', 'message'),
  [
    (
      "[{'model.num_recursion': 2}]",
      r'unknown setting model\.num_recursion; did you mean model\.num_recursions',
    ),
    ("[{'train.seed': 0}, {'train.seed': 'x'}]", r"run seed=x: train\.seed='x' must be int"),
    (
      "[{'train.seed': 0}, {'model.num_recursions': 4}]",
      r'run num_recursions=4: model\.num_recursions=4 does not',
    ),
    (
      "[{'train.sample_prompt': 'a b'}, {'train.sample_prompt': 'a/b'}]",
      r'2 runs would be called sample_prompt=a_b, since .* characters .*; give each a "name"',
    ),
    ("[{'train.seed': 1}, {'train.seed': 1}]", r'2 runs are called base and have the same overrides'),
    ("[{'train.seed': 0}, {'train.seed': 1, 'name': 'a'}, {'name': 'b'}]", r'have the same settings'),
    ("[{'train.flops_budget': 1e9}]", r'train\.warmup_steps=50 is more than the \d+ steps'),
    ("[{'train.log_every': 1}]", r'--config\.train\.log_every=5 is given, and --sweep=.* sets it to 1'),
    (
      "[{'checkpoint.folder': 'x', 'train.seed': s} for s in (0, 1)]",
      r'checkpoint\.folder=x would be that of',
    ),
    ('[]', r'returned no runs'),
    ("{'train.seed': (0, 1)}", r'returned dict, it must return a list of dicts'),
    ('[3]', r'lists 3, where a dict of overrides is wanted'),
    ("[{'name': 3}]", r'name=3 must be text'),
    ('1 / 0', r'line 3 raised ZeroDivisionError'),
  ],
)
def test_what_cannot_work_is_refused_before_anything_runs(read, tmp_path, expression, message):
  with pytest.raises(ConfigError, match=message):
    read(expression, **{'train.log_every': 5})
  assert not (tmp_path / 'sweep').exists()


def test_name_on_the_command_line_is_refused(read):
  with pytest.raises(ConfigError, match=r'--config\.name=x cannot hold for all runs'):
    read("[{'train.seed': 1}]", name='x')


def test_missing_file_and_function_are_told(tmp_path):
  (tmp_path / 'empty.py').write_text('')
  for file, message in (('none.py', 'there is no file'), ('empty.py', 'defines no function get_sweep')):
    with pytest.raises(ConfigError, match=message):
      plan.read(TINY, {}, str(tmp_path / file), None)


def test_a_finished_sweep_can_be_extended(read, tmp_path):
  run = read("[{'train.seed': 1, 'name': 'a'}]").runs[0]
  run.folder.path.mkdir(parents=True)
  run.folder.write_config(run.config)
  (run.folder.path / 'data.json').write_text('{}')
  run.folder.write_summary({'steps': run.config.train.steps})
  steps = run.config.train.steps + 100
  with pytest.raises(ConfigError, match=r'--allow_change=train\.steps'):
    read("[{'train.seed': 1, 'name': 'a'}]", **{'train.steps': steps})
  flags = {'train.steps': steps}
  spec = str(tmp_path / 'sweep.py')
  longer = plan.make(
    TINY, flags, [{'train.seed': 1, 'name': 'a'}], spec, run.folder.path.parents[1], ['train.steps']
  )
  assert longer.runs[0].words[-1] == '--allow_change=train.steps'
  assert run.folder.is_finished(run.config)
  assert not longer.runs[0].folder.is_finished(longer.runs[0].config)


def test_folder_with_other_settings_is_refused(read, tmp_path):
  made = read("[{'train.seed': 1, 'name': 'a'}]")
  folder = RunFolder(made.runs[0].folder.path)
  folder.path.mkdir(parents=True)
  folder.write_config(with_changes(made.runs[0].config, train={'seed': 2}))
  (folder.path / 'data.json').write_text('{}')
  with pytest.raises(
    ConfigError, match=r'run a: .* holds a run with other settings: train\.seed was 2, now 1'
  ):
    read("[{'train.seed': 1, 'name': 'a'}]")
