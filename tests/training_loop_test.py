"""The loop around a step that costs nothing."""

import dataclasses
import io
import itertools
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from rich.console import Console

from mor_jax.config import Config, ConfigError, with_changes
from mor_jax.data import schedule
from mor_jax.runs.metrics import MetricsLog, read
from mor_jax.runs.progress import Progress
from mor_jax.training import loop
from mor_jax.training.state import TrainState
from mor_jax.training.watch.goodput import Ledger
from mor_jax.training.watch.nonfinite import NonFiniteError
from mor_jax.training.watch.profiling import Profiler, parse_span
from mor_jax.training.watch.stopping import Signals, Stop
from mor_jax.training.watch.watchdog import Watchdog

CONFIG = with_changes(
  Config(),
  train={'steps': 20, 'global_batch': 2, 'warmup_steps': 0, 'log_every': 5, 'eval_every': 8},
  checkpoint={'every_steps': 6},
  data={'seq_len': 4},
)


class Checkpoints:
  """Remembers what was saved, and what metrics.jsonl held then."""

  def __init__(self, metrics):
    self.saved, self._metrics = {}, metrics

  def save(self, step, state, validation_loss=None, position=None, rows_read=None):
    assert int(jax.device_get(state.step)) == step
    self.saved[step] = read(self._metrics)

  def wait(self):
    pass

  @property
  def latest_step(self):
    return max(self.saved, default=None)

  def path(self, step):
    return f'checkpoints/{step}'


_GOING_ON = {'skipped': 0, 'halted': False}


@jax.jit
def _step(state, batch):
  loss = 1.0 / (state.step + 1) + 0 * batch['tokens'].sum()
  metrics = {'loss': loss, 'grad_norm': 2 * loss, 'learning_rate': jnp.float32(0.1), **_GOING_ON}
  return TrainState(state.step + 1, state.params, state.opt_state), metrics


def _train(folder, step=_step, config=CONFIG, first=0, console=None, **parts):
  state = TrainState(jnp.int32(first), (), ())
  checkpoints = parts.get('checkpoints') or Checkpoints(folder / 'metrics.jsonl')
  console = console or Console(file=io.StringIO(), width=100)
  batches = ({'tokens': np.full((2, 4), n, np.int32)} for n in itertools.count(first))
  batches = parts.get('batches', batches)
  validate = parts.get('validate', lambda variables: {'validation/nll': 3.0})
  stop = Stop(parts.get('signals', Signals()), tiny_run.MESH)
  profiler = parts.get('profiler', Profiler())
  guards = loop.Guards(stop, Watchdog(0), parts.get('ledger', Ledger()), profiler)
  with MetricsLog(folder, first) as log, Progress(console, config.train.steps, first) as progress:
    loop.train(
      config,
      tiny_run.MESH,
      state,
      step,
      schedule.of(config.train),
      batches,
      validate,
      checkpoints,
      log,
      progress,
      guards,
    )
  return checkpoints, read(folder / 'metrics.jsonl'), console.file.getvalue()


def test_logs_validates_and_saves_when_due(tmp_path):
  checkpoints, records, _ = _train(tmp_path)
  assert [r['step'] for r in records if 'train/loss' in r] == [1, 5, 10, 15, 20]
  assert [r['step'] for r in records if 'validation/nll' in r] == [8, 16, 20]
  assert len({r['step'] for r in records}) == len(records), 'a step is on one line'
  assert records[1]['train/loss'] == pytest.approx(1 / 5)
  assert list(checkpoints.saved) == [6, 12, 18, 20]


def test_every_checkpoint_is_validated_where_the_best_are_kept(tmp_path):
  _, records, _ = _train(tmp_path, config=with_changes(CONFIG, checkpoint={'keep_best': 1}))
  assert [r['step'] for r in records if 'validation/nll' in r] == [6, 8, 12, 16, 18, 20]


def test_metrics_are_written_before_the_checkpoint(tmp_path):
  """Else a run killed after the save would resume behind a gap in its metrics."""
  config = with_changes(CONFIG, train={'log_every': 1})
  checkpoints, _, _ = _train(tmp_path, config=config)
  for step, records in checkpoints.saved.items():
    assert [r['step'] for r in records] == list(range(1, step + 1))
  assert 'validation/nll' in checkpoints.saved[20][-1]


@pytest.mark.parametrize('stop', [9, 40])
def test_a_trace_holds_the_steps_of_its_span(tmp_path, stop):
  told = []
  _train(tmp_path, profiler=Profiler(range(6, stop), tmp_path / 'profile', told.append))
  (trace,) = (tmp_path / 'profile').rglob('*.xplane.pb')
  data = jax.profiler.ProfileData.from_serialized_xspace(trace.read_bytes())
  events = [event for plane in data.planes for line in plane.lines for event in line.events]
  steps = {dict(event.stats).get('step_num') for event in events if event.name == 'train'}
  assert steps == set(range(6, min(stop, 21)))
  assert told == [f'the trace of steps 6 to {min(stop - 1, 20)} is in {tmp_path / "profile"}']


@pytest.mark.parametrize('text', ['5', '5:5', '0:3', '7:2', 'a:b'])
def test_a_span_that_is_none_is_refused(text):
  with pytest.raises(ConfigError, match=rf'--profile={text} is not allowed: write START:STOP'):
    parse_span(text, 20)


@pytest.mark.parametrize(('bound', 'most'), [(7, 7), (6, 6), (None, 20)])
def test_no_more_steps_than_promised_are_done_without_a_finished_checkpoint(tmp_path, bound, most):
  """The disk is so slow that a save is finished only when somebody waits for it."""
  finished, behind = [0], []

  class Slow(Checkpoints):
    def await_finished(self, step):
      if finished[-1] < step:
        finished.append(max(self.saved))

  def batches():
    for step in itertools.count(1):
      behind.append(step - finished[-1])
      yield {'tokens': np.zeros((2, 4), np.int32)}

  config = with_changes(CONFIG, checkpoint={'max_unsaved_steps': bound})
  _train(tmp_path, config=config, batches=batches(), checkpoints=Slow(tmp_path / 'metrics.jsonl'))
  assert max(behind) == most


def test_resumes_after_the_state_it_is_given(tmp_path):
  _, before, _ = _train(tmp_path, config=with_changes(CONFIG, train={'steps': 12}))
  checkpoints, after, _ = _train(tmp_path, first=12)
  assert list(checkpoints.saved) == [18, 20]
  assert after[: len(before)] == before
  seconds = [record['train/seconds'] for record in after if 'train/seconds' in record]
  assert seconds == sorted(seconds), 'seconds of training add up over restarts'


def test_router_metrics_are_of_all_steps_since_the_last_record(tmp_path):
  """Position n mod 5 takes the last recursion in step n: 4 in 5 are dead in a batch, none over 5 steps."""

  def routed(state, batch):
    state, metrics = _step(state, batch)
    ones = jnp.ones(1, jnp.int32)
    names = ('entered_R', 'selected_R', 'correct_R', 'overflow_R')
    counts = dict.fromkeys(names, ones) | {'depth_R1': jnp.array([0, 1]), 'entered_T': jnp.ones(5, jnp.int32)}
    counts['last_step_selected_T'] = (jnp.arange(5) == state.step % 5).astype(jnp.int32)
    return state, metrics | {'counts': counts}

  _, records, _ = _train(tmp_path, jax.jit(routed))
  dead = {r['step']: r['train/dead_token_ratio'] for r in records if 'train/loss' in r}
  assert dead == pytest.approx({1: 0.8, 5: 0.2, 10: 0, 15: 0, 20: 0})


@pytest.mark.parametrize('name', ['loss', 'grad_norm'])
def test_non_finite_numbers_stop_the_run(tmp_path, name):
  """The message comes with everything known before: step 13 and 14 are fetched together, before the save."""

  def diverging(state, batch):
    state, metrics = _step(state, batch)
    halted = state.step >= jnp.int32(14)
    broken = jnp.where(halted, jnp.nan, metrics[name])
    norms = {'grad_norm/embed': jnp.float32(3), 'grad_norm/router': broken}
    return state, metrics | {name: broken, 'halted': halted, **norms}

  expected = (
    rf'{name} is nan at step 14 \(gradient norms: embed 3, router nan\); the update was not applied; '
    r'the last checkpoint is checkpoints/7$'
  )
  config = with_changes(CONFIG, train={'log_every': 1}, checkpoint={'every_steps': 7})
  with pytest.raises(NonFiniteError, match=expected):
    _train(tmp_path, jax.jit(diverging), config)
  assert max(r['step'] for r in read(tmp_path / 'metrics.jsonl')) == 13


def test_a_skipped_update_is_reported_and_counted(tmp_path):
  def stumbling(state, batch):
    state, metrics = _step(state, batch)
    broken = jnp.where(state.step == 10, jnp.inf, metrics['grad_norm'])
    return state, metrics | {'grad_norm': broken, 'skipped': state.step // 10}

  _, records, text = _train(tmp_path, jax.jit(stumbling))
  assert 'skipped: grad_norm is inf at step 10, 1 in all' in text
  skipped = {r['step']: r for r in records if 'train/skipped' in r}
  assert {step: record['train/skipped'] for step, record in skipped.items()} == {
    1: 0,
    5: 0,
    10: 1,
    15: 1,
    20: 2,
  }
  assert 'train/loss' not in skipped[10]
  assert 'train/grad_norm' not in skipped[10], 'JSON has no infinity'


@pytest.fixture
def signals():
  with Signals() as signals, signals.training():
    yield signals


def _send() -> None:
  os.kill(os.getpid(), signal.SIGTERM)
  time.sleep(0.01)


def test_a_signal_saves_and_ends_the_loop(tmp_path, signals):
  """Within two steps; metrics.jsonl is complete, the validation that was due is left out."""

  def step(state, batch):
    if int(jax.device_get(state.step)) == 7:
      _send()
    return _step(state, batch)

  checkpoints, records, _ = _train(
    tmp_path, step, with_changes(CONFIG, train={'log_every': 1}), signals=signals
  )
  assert list(checkpoints.saved) == [6, 8]
  assert [r['step'] for r in records] == list(range(1, 9))
  assert not any('validation/nll' in r for r in records)


def test_a_signal_interrupts_a_wait_for_data(tmp_path, signals):
  def batches():
    for step in range(1, 12):
      if step == 11:
        _send()
        time.sleep(60)
      yield {'tokens': np.zeros((2, 4), np.int32)}

  checkpoints, records, _ = _train(tmp_path, signals=signals, batches=batches())
  assert list(checkpoints.saved) == [6, 10]
  assert max(r['step'] for r in records) == 10


def test_a_signal_interrupts_a_validation(tmp_path, signals):
  def validate(variables):
    _send()
    time.sleep(60)

  checkpoints, records, _ = _train(tmp_path, signals=signals, validate=validate)
  assert list(checkpoints.saved) == [6, 8]
  assert not any('validation/nll' in r for r in records)


def test_a_signal_before_the_first_step_saves_nothing(tmp_path, signals):
  _send()
  checkpoints, records, _ = _train(tmp_path, signals=signals, first=6)
  assert (checkpoints.saved, records) == ({}, [])


def test_time_is_accounted_for(tmp_path):
  """Waiting for data, validation and saving take what they take here; steps the rest."""
  ledger = Ledger()

  def slow_batches():
    for _ in range(20):
      time.sleep(0.01)
      yield {'tokens': np.zeros((2, 4), np.int32)}

  begin = time.perf_counter()
  _, records, _ = _train(
    tmp_path,
    batches=slow_batches(),
    validate=lambda _: time.sleep(0.1) or {'validation/nll': 3.0},
    ledger=ledger,
  )
  seconds, total = ledger.seconds(), time.perf_counter() - begin
  assert 0.2 <= seconds['data_wait'] < 0.6
  assert 0.3 <= seconds['validation'] < 0.7
  assert seconds['steps'] > 0
  assert sum(seconds.values()) == pytest.approx(total, rel=0.1)
  told = {r['step']: r['goodput/validation'] for r in records if 'goodput/validation' in r}
  assert list(told) == [6, 8, 12, 16, 18, 20], 'at every validation and save'
  assert told[20] == seconds['validation']


def test_steps_are_queued_ahead_of_their_metrics(tmp_path):
  """Metrics of a step are waited for only when later steps are on their way, and never more than two."""
  events = []

  @dataclasses.dataclass
  class Lazy:
    step: int

    def __array__(self, dtype=None, copy=None):
      events.append(('fetched', self.step))
      return np.float32(1.0)

  def step(state, batch):
    number = int(jax.device_get(state.step)) + 1
    events.append(('dispatched', number))
    metrics = {'loss': Lazy(number), 'grad_norm': 1.0, 'learning_rate': 0.1, **_GOING_ON}
    return dataclasses.replace(state, step=np.int32(number)), metrics

  _train(tmp_path, step, with_changes(CONFIG, train={'eval_every': 0}, checkpoint={'every_steps': 100}))
  order = {event: position for position, event in enumerate(events)}
  for number in range(1, 18):
    assert order['dispatched', number + 2] < order['fetched', number] < order['dispatched', number + 3]


def test_hidden_transfers_to_the_device_are_refused(tmp_path):
  def careless(state, batch):
    return _step(state, jax.tree.map(np.asarray, batch))

  with pytest.raises(Exception, match=r'[Dd]isallowed host-to-device transfer'):
    _train(tmp_path, careless)


def test_lines_where_there_is_no_terminal(tmp_path):
  _, _, text = _train(tmp_path)
  lines = text.splitlines()
  assert lines[1].startswith('step  5/20  loss 0.2000  lr 1.00e-01  grad norm 0.40  ')
  assert 'tokens/s  ETA 0:00:0' in lines[1]
  assert sum('validation loss 3.0000' in line for line in lines) == 3
  assert '\x1b' not in text


def test_bar_on_a_terminal(tmp_path):
  console = Console(file=io.StringIO(), force_terminal=True, width=120)
  _, _, text = _train(tmp_path, console=console)
  assert '20/20' in text
  assert 'loss 0.050' in text
  assert 'tokens/s' in text
  assert 'ETA' in text
  assert 'grad norm' not in text, 'the bar replaces the lines'
