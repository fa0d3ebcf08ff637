"""The result of a finished run in summary.json: sizes, validation metrics, n-gram entropies and a sample."""

import itertools
import os
from typing import Any

from mor_jax.config import Config
from mor_jax.data import loader, schedule
from mor_jax.evaluation import ngram
from mor_jax.inference.text import complete
from mor_jax.model import flops
from mor_jax.model.transformer import Transformer
from mor_jax.parallel import runtime
from mor_jax.training import budget
from mor_jax.training.targets import visible_segments
from mor_jax.training.watch.goodput import Ledger


def of_run(
  config: Config,
  dataset: loader.Dataset,
  variables: Any,
  last: dict[str, float],
  ledger: Ledger,
  order: schedule.BatchSchedule,
) -> dict[str, Any]:
  """What summary.json holds. To be called by all processes: each has a part of the variables.

  Args:
    last: metrics of the last step.
    ledger: where the time went.
    order: rows of every step.
  """
  model, train = config.model, config.train
  parameters = flops.count_parameters(model)
  tokens = order.rows_before(train.steps) * config.data.seq_len
  unigram, bigram = _entropies(config, dataset)
  return {
    'name': config.name,
    'steps': train.steps,
    'tokens': tokens,
    'seconds': last.get('train/seconds', 0.0),
    'parameters': parameters.total,
    'non_embedding_parameters': parameters.non_embedding,
    'train_flops': tokens * budget.train_flops_per_token(config),
    **{name: value for name, value in last.items() if name.startswith('validation/')},
    'validation/unigram_entropy': unigram,
    'validation/bigram_entropy': bigram,
    'checkpoint': f'{_checkpoints(config)}/{train.steps}',
    'goodput': ledger.seconds(),
    'restarts': ledger.restarts(),
    'sample': _sample(config, dataset, runtime.on_host(variables)) if train.sample_tokens else '',
  }


def _checkpoints(config: Config) -> str:
  """The folder of the checkpoints, as seen from that of the run."""
  folder = config.checkpoint.folder or 'checkpoints'
  return folder if config.checkpoint.folder is None or '://' in folder else os.path.abspath(folder)


def _entropies(config: Config, dataset: loader.Dataset) -> tuple[float, float]:
  """Unigram and bigram entropy of the validation rows in use, in nats per predicted token."""
  rows = itertools.islice(dataset.rows('validation'), config.train.eval_rows)
  visible = (
    row | {'segment_ids': visible_segments(row['segment_ids'], config.data.segment_mask)} for row in rows
  )
  return ngram.ngram_entropies(visible, config.model.vocab_size)


def _sample(config: Config, dataset: loader.Dataset, variables: Any) -> str:
  """The prompt and its continuation under threshold routing; only the main process computes it."""
  if not runtime.is_main():
    return ''
  train = config.train
  text = complete(
    Transformer(config.model),
    variables,
    dataset.tokenizer,
    train.sample_prompt,
    train.sample_tokens,
    train.sample_temperature,
    train.seed,
  )
  return train.sample_prompt + text
