import pathlib
import signal
import subprocess
import sys
import time

import entry_points
import pytest
from absl import flags
from absl.testing import flagsaver

from mor_jax import cli
from mor_jax.config import ConfigError

CONFIG_FILE = """
from mor_jax import config

def get_config(variant='mor'):
  settings = config.default()
  settings.model.kind = variant
  settings.train.steps = 4000
  settings.train.warmup_steps = settings.train.get_ref('steps') // 20
  return settings
"""

PROGRAM = """
'''Prints what it is told: python program.py --config=FILE'''
import signal, sys, time
from absl import flags, logging
from mor_jax import cli

flags.DEFINE_integer('count', 3, 'how many')

def main(config, workdir):
  logging.info('chatter')
  logging.warning('heed this')
  print(config.model.kind, workdir, flags.FLAGS.count, 'jax' in sys.modules, flush=True)
  if workdir == 'sleep':
    time.sleep(60)
  if workdir == 'fail':
    raise ZeroDivisionError
  return 143

if __name__ == '__main__':
  signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
  cli.run(main, __doc__)
"""


@pytest.fixture(scope='module', autouse=True)
def without_entry_points() -> None:
  """Others that ran in this process may have left flags of the same names."""
  entry_points.clear()


@pytest.fixture
def config_file(tmp_path, monkeypatch) -> str:
  """The name of a config file in the current folder."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'some.py').write_text(CONFIG_FILE)
  return 'some.py'


@pytest.fixture
def launch(config_file, monkeypatch, capsys):
  """Runs the wrapper in this process: (arguments) -> (exit code, config, workdir, stderr)."""

  def run(*args: str, config: str | None = config_file):
    called = [None, None]

    def main(*given):
      called[:] = given

    monkeypatch.setattr(sys, 'argv', ['program', *([f'--config={config}'] if config else []), *args])
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as stop:
      cli.run(main, 'Does nothing.')
    return stop.value.code or 0, *called, capsys.readouterr().err

  return run


@pytest.fixture
def program(config_file, monkeypatch):
  """Starts an entry point of its own, as a user would: (arguments) -> CompletedProcess."""
  pathlib.Path('program.py').write_text(PROGRAM)
  monkeypatch.setenv('PYTHONPATH', str(pathlib.Path(__file__).parent.parent))
  return lambda *args: subprocess.run(
    [sys.executable, 'program.py', *args], capture_output=True, text=True, check=False
  )


# ---- settings reach main ----


def test_config_file_and_variant(launch):
  _, config, workdir, _ = launch()
  assert (config.model.kind, config.train.steps, workdir) == ('mor', 4000, None)
  _, config, workdir, _ = launch('--workdir=here', config='some.py:vanilla')
  assert (config.model.kind, workdir) == ('vanilla', 'here')
  _, config, _, _ = launch('--config', 'some.py:recursive', config=None)
  assert config.model.kind == 'recursive'


@pytest.mark.parametrize(
  ('args', 'setting', 'value'),
  [
    (['--config.model.kind=vanilla'], 'model.kind', 'vanilla'),
    (['--config.model.kind', 'vanilla'], 'model.kind', 'vanilla'),
    (['--config.name=x'], 'name', 'x'),
    (['--config.train.learning_rate=3e-3'], 'train.learning_rate', 0.003),
    (['--config.train.learning_rate=1'], 'train.learning_rate', 1.0),
    (['--config.train.seed', '7'], 'train.seed', 7),
    (['--config.train.seed=7', '--config.train.seed=8'], 'train.seed', 8),
    (['--config.data.segment_mask=false'], 'data.segment_mask', False),
    (['--noconfig.data.segment_mask'], 'data.segment_mask', False),
    (['--config.model.unroll_layers'], 'model.unroll_layers', True),
    (['--config.model.capacities=1.0,0.5'], 'model.capacities', (1.0, 0.5)),
    (['--config.model.capacities=(1, 0.5)'], 'model.capacities', (1.0, 0.5)),
    (['--config.model.no_rope_layers=(1,)'], 'model.no_rope_layers', (1,)),
    (['--config.model.no_rope_layers=1', '--config.model.no_rope_layers=()'], 'model.no_rope_layers', ()),
    (['--config.model.vocab_size=500'], 'model.vocab_size', 500),
    (['--config.model.vocab_size=500', '--config.model.vocab_size=none'], 'model.vocab_size', None),
    (['--config.model.capacities=1,1', '--config.model.capacities=none'], 'model.capacities', None),
    (['--config.model.remat=none'], 'model.remat', 'none'),
    (['--config.data.cache_dir=/a=b'], 'data.cache_dir', '/a=b'),
  ],
)
def test_overrides(launch, args, setting, value):
  code, config, _, err = launch(*args)
  assert (code, err) == (0, '')
  for name in setting.split('.'):
    config = getattr(config, name)
  assert config == value
  assert type(config) is type(value)


def test_overrides_may_stand_before_the_config(launch):
  _, config, _, _ = launch('--config.train.seed=5', '--config=some.py', config=None)
  assert config.train.seed == 5


def test_settings_derived_in_the_file_follow_an_override(launch):
  assert launch()[1].train.warmup_steps == 200
  assert launch('--config.train.steps=1000')[1].train.warmup_steps == 50


def test_file_may_build_a_config_dict_by_hand(launch, tmp_path):
  (tmp_path / 'hand.py').write_text(
    'from ml_collections import ConfigDict\n'
    "get_config = lambda: ConfigDict({'train': {'learning_rate': 1}})\n"
  )
  _, config, _, _ = launch('--config.train.learning_rate=3e-4', '--config.data.seed=2', config='hand.py')
  assert (config.train.learning_rate, config.data.seed) == (3e-4, 2)


# ---- what cannot work is refused ----


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    (['--config.model.num_recursion=3'], 'unknown flag --config.model.num_recursion=3; did you mean --config.model.num_recursions?'),
    (['--config.model.num_recursion', '3'], 'did you mean --config.model.num_recursions?'),
    (['--config.modle.kind=mor'], 'did you mean --config.model.kind?'),
    (['--confg.model.kind=mor'], 'did you mean --config.model.kind?'),
    (['--config.nam=x'], 'did you mean --config.name?'),
    (['--learning_rate=1'], 'did you mean --config.train.learning_rate?'),
    (['--workdri=x'], 'did you mean --workdir?'),
    (['--config.train.qqq=1'], 'unknown flag --config.train.qqq=1 (--help lists all flags)'),
    (['--config.train=1'], 'unknown flag --config.train=1: a group of settings'),
    (['--config.train.steps=3e-3'], '--config.train.steps=3e-3: must be an integer'),
    (['--config.train.steps=none'], '--config.train.steps=none: must be an integer'),
    (['--config.model.vocab_size=many'], '--config.model.vocab_size=many: must be an integer or none'),
    (['--config.train.learning_rate=fast'], '--config.train.learning_rate=fast: must be a number'),
    (['--config.data.segment_mask=perhaps'], '--config.data.segment_mask=perhaps: must be true or false'),
    (['--config.model.no_rope_layers=1.5'], 'model.no_rope_layers=1.5 must be int'),
    (['--config.model.capacities=1,half'], '--config.model.capacities=1,half: must be numbers separated by commas'),
    (['--config.train.steps'], 'Missing value for flag --config.train.steps'),
    (['--config.data.segment_mask', 'false'], "unexpected argument 'false'"),
    (['leftover'], "unexpected argument 'leftover'"),
    (['--config.train.learning_rate=nan'], 'train.learning_rate=nan must be a finite number'),
    (['--config.model.kind=vanila'], "model.kind='vanila' is not one of vanilla, recursive, mor"),
    (['--config.data.seq_len=1'], 'data.seq_len=1 is not allowed'),
  ],
)  # fmt: skip
def test_refuses_flags(launch, args, message):
  code, config, _, err = launch(*args)
  assert (code, config) == (2, None)
  assert message in err
  assert err.startswith('error: ')
  assert err.count('\n') == 1


@pytest.mark.parametrize(
  ('source', 'config', 'message'),
  [
    ('', None, '--config is missing'),
    ('', 'absent.py', '--config=absent.py: there is no file absent.py'),
    ('', '.', '--config=.: there is no file .'),
    ('x = 1', 'bad.py', '--config=bad.py: the file defines no function get_config'),
    ('x = 1\ny = x / 0', 'bad.py', '--config=bad.py: bad.py, line 2 raised ZeroDivisionError'),
    ('def get_config(:', 'bad.py', '--config=bad.py: bad.py raised SyntaxError'),
    ('open("/absent")', 'bad.py', 'bad.py, line 1 raised FileNotFoundError'),
    ('import absent_module', 'bad.py', 'bad.py, line 1 raised ModuleNotFoundError'),
    ('def get_config(): return 1', 'bad.py', 'get_config() returned int, it must return a ConfigDict'),
    ('def get_config(): return 1', 'bad.py:small', '--config=bad.py:small: the file has no variants'),
    ('def get_config(variant): return 1', 'bad.py', '--config=bad.py: add a variant, PATH:VARIANT'),
    ('', 'some.py:huge', "model.kind='huge' is not one of"),
    (
      'from mor_jax import config\ndef get_config(v): raise config.ConfigError(f"{v} is no variant")',
      'bad.py:small',
      '--config=bad.py:small: small is no variant',
    ),
    (
      'from ml_collections import ConfigDict\nget_config = lambda: ConfigDict({"train": {"step": 1}})',
      'bad.py',
      'unknown setting train.step; did you mean train.steps?',
    ),
  ],
)
def test_refuses_config_files(launch, tmp_path, source, config, message):
  (tmp_path / 'bad.py').write_text(source)
  code, called_with, _, err = launch(config=config)
  assert (code, called_with) == (2, None)
  assert message in err
  assert err.count('\n') == 1


def test_config_error_of_main(monkeypatch, config_file, capsys):
  def main(config, workdir):
    raise ConfigError(f'workdir={workdir} cannot be written')

  monkeypatch.setattr(sys, 'argv', ['program', '--config=some.py', '--workdir=/x'])
  with flagsaver.flagsaver(), pytest.raises(SystemExit) as stop:
    cli.run(main, 'Does nothing.')
  assert stop.value.code == 2
  assert capsys.readouterr().err == 'error: workdir=/x cannot be written\n'


def test_without_config(monkeypatch, capsys):
  with flagsaver.flagsaver():
    size = flags.DEFINE_integer('how_large', 1, 'a number')

    def exit_code(*args):
      monkeypatch.setattr(sys, 'argv', ['program', *args])
      with pytest.raises(SystemExit) as stop:
        cli.run(lambda: size.value, 'Does nothing.', with_config=False)
      return stop.value.code

    assert exit_code('--how_large=7') == 7
    assert exit_code('--config=some.py') == 2
    assert 'unknown flag --config=some.py' in capsys.readouterr().err
    assert exit_code('--how_large=small') == 2
    assert '--how_large=small' in capsys.readouterr().err


# ---- as a process ----


def test_runs_quietly_and_without_jax(program):
  done = program('--config=some.py', '--workdir=here', '--count=4')
  assert (done.returncode, done.stdout) == (143, 'mor here 4 False\n')
  assert 'heed this' in done.stderr
  assert 'chatter' not in done.stderr
  assert 'chatter' in program('--config=some.py', '--verbosity=0').stderr


def test_errors_of_main_show_their_traceback(program):
  done = program('--config=some.py', '--workdir=fail')
  assert done.returncode == 1
  assert 'ZeroDivisionError' in done.stderr


def test_refuses_as_a_process(program):
  done = program('--config=some.py', '--config.model.num_heads=x')
  assert (done.returncode, done.stdout) == (2, '')
  assert done.stderr == 'error: flag --config.model.num_heads=x: must be an integer\n'


@pytest.mark.parametrize('flag', ['--help', '-h', '--helpshort', '--helpfull'])
def test_help(program, flag):
  done = program('--count=4', flag)
  assert (done.returncode, done.stderr) == (0, '')
  for shown in (
    'Prints what it is told',
    '--count=3  (int)\n      how many',
    '--config  (string)',
    '--workdir',
    '--config.model.kind=mor  (vanilla|recursive|mor)\n      what to build',
    '--config.checkpoint.keep=2',
  ):
    assert shown in done.stdout


@pytest.mark.parametrize('command', ['generate', 'serve'])
def test_help_has_the_flags_of_an_engine(command):
  words = [sys.executable, '-m', f'mor_jax.{command}', '--help']
  shown = subprocess.run(words, capture_output=True, text=True, check=True).stdout
  for name in ('checkpoint', 'max_len', 'slots', 'max_recursions', 'cache_dtype', 'speculate'):
    assert f'\n  --{name}' in shown


def test_interrupt(program):
  with subprocess.Popen(
    [sys.executable, 'program.py', '--config=some.py', '--workdir=sleep'],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  ) as process:
    assert process.stdout.readline().startswith('mor')
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
  assert process.returncode == 130
  assert err.endswith('interrupted\n')
  assert 'Traceback' not in err
