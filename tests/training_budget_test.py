"""A budget of FLOPs decides how long a run is, before anything else looks at its steps."""

import dataclasses
import json

import pytest
import tiny_run

from mor_jax import train
from mor_jax.config import Config, ConfigError, with_changes
from mor_jax.data import loader
from mor_jax.model import flops
from mor_jax.runs import metrics
from mor_jax.training.budget import with_budgeted_steps

FLOPS_PER_STEP = 8 * 64 * flops.paper_flops_per_token(tiny_run.CONFIG.model, 64)


def budgeted(paid: float, **train_settings) -> Config:
  """The tiny run with a budget of the FLOPs of so many steps."""
  return with_changes(tiny_run.CONFIG, train={'flops_budget': paid * FLOPS_PER_STEP} | train_settings)


@pytest.mark.parametrize(
  ('model', 'released_steps'),
  [
    ({'kind': 'vanilla'}, 9438),
    ({'kind': 'recursive', 'num_recursions': 2}, 9438),
    ({'kind': 'recursive', 'num_recursions': 3}, 9438),
    ({'kind': 'recursive', 'num_recursions': 4, 'num_layers': 34}, 8883),
    ({'num_recursions': 2}, 12619),
    ({'num_recursions': 3}, 14161),
    ({'num_recursions': 3, 'router': 'token_choice'}, 14161),
    ({'num_recursions': 4, 'num_layers': 34}, 14216),
    ({'num_recursions': 3, 'kv': 'shared'}, 14672),
  ],
)
def test_released_runs(model, released_steps):
  """Steps that the authors' config files of their 360M runs state; the defaults are that size."""
  config = with_changes(Config(), model=model, train={'flops_budget': 16.5e18})
  assert abs(with_budgeted_steps(config).train.steps - released_steps) <= 1


@pytest.mark.parametrize(('paid', 'steps'), [(7.4, 7), (7.6, 8), (0.2, 1)])
def test_nearest_step_but_at_least_one(paid, steps):
  assert with_budgeted_steps(budgeted(paid, warmup_steps=0)).train.steps == steps


def test_without_a_budget_nothing_changes():
  assert with_budgeted_steps(tiny_run.CONFIG) is tiny_run.CONFIG


def test_wins_over_steps_that_would_not_do():
  """Also where `train.steps` is shorter than the warm-up, which no longer matters."""
  config = budgeted(30, steps=1, warmup_steps=10)
  assert with_budgeted_steps(config).train.steps == 30


def test_warmup_longer_than_the_budget_leaves_no_folder(tmp_path):
  with pytest.raises(
    ConfigError, match=r'train\.warmup_steps=4 is more than the 3 steps that train\.flops_budget='
  ):
    train.main(budgeted(3), str(tmp_path / 'run'))
  assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_interrupted_run_resumes_and_ends_with_the_budget(tmp_path, monkeypatch):
  cache = {'max_documents': 10, 'validation_fraction': 0.2, 'cache_dir': str(tmp_path / 'cache')}
  ramp = {'accumulation': 2, 'ramp_batch': 4, 'ramp_steps': 6}
  config = budgeted(17, steps=7, log_every=1, eval_every=0, eval_rows=8, sample_tokens=0, **ramp)
  config = with_changes(config, model={'vocab_size': None}, data=cache, checkpoint={'every_steps': 6})
  config = dataclasses.replace(config, name='budgeted')
  folder = tmp_path / 'run'
  batches, starts = loader.train_batches, []

  def interrupted(*args, start_step, **options):
    starts.append(start_step)
    for step, batch in enumerate(batches(*args, start_step=start_step, **options), start_step + 1):
      if step == 15 and len(starts) == 1:
        raise KeyboardInterrupt
      yield batch

  monkeypatch.setattr(loader, 'train_batches', interrupted)
  with pytest.raises(KeyboardInterrupt):
    train.main(config, str(folder))
  assert json.loads((folder / 'config.json').read_text())['train']['steps'] == 20
  train.main(config, str(folder))
  assert len(starts) == 2
  assert starts[1] in (6, 12), 'it must have resumed, not begun again'
  records = metrics.read(folder / 'metrics.jsonl')
  assert [record['step'] for record in records] == list(range(1, 21))
  assert [record['train/tokens'] for record in records] == [
    64 * (4 * min(step, 6) + 8 * max(step - 6, 0)) for step in range(1, 21)
  ]
  summary = json.loads((folder / 'summary.json').read_text())
  assert (summary['steps'], summary['tokens']) == (20, 64 * 17 * 8)


def test_budget_counts_the_smaller_batches_of_a_ramp():
  ramp = {
    'global_batch': 8,
    'accumulation': 4,
    'ramp_batch': 2,
    'ramp_steps': 4,
    'warmup_steps': 0,
    'steps': 50,
  }
  config = with_changes(tiny_run.CONFIG, train=ramp)
  per_row = config.data.seq_len * flops.paper_flops_per_token(config.model, config.data.seq_len)
  budget = (2 * 2 + 2 * 4 + 10 * 8) * per_row  # two steps of 2 rows, two of 4, ten of 8
  assert with_budgeted_steps(with_changes(config, train={'flops_budget': budget})).train.steps == 14
