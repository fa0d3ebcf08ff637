"""Decodes validation rows token by token, and compares with the full forward: python -m benchmarks.depth_decoding --checkpoint=RUN

The engine gets all tokens of a document as known and computes them one by one, from its caches. Its logits and depths
must be those of the full forward under threshold routing; the accuracy is that of the answers which it would
give. Writes RUN/decoding.json.
"""

import json
from functools import partial
from typing import Any

import jax
import numpy as np
from absl import flags

from mor_jax import cli
from mor_jax.data import loader
from mor_jax.files import write_atomically
from mor_jax.inference.engine import Engine
from mor_jax.inference.requests import Request
from mor_jax.inference.state import IDLE
from mor_jax.runs.restore import LoadedRun, load_run

FLAGS = flags.FLAGS
ROWS = 32


def measure(run: LoadedRun, rows: int = ROWS) -> dict[str, Any]:
  """What decoding the first document of so many validation rows gives.

  Returns 'logits', the greatest difference from the full forward; 'depths', the share of tokens whose depth differs;
  'accuracy' of the scored tokens.
  """
  dataset = loader.open_dataset(run.config.data, print)
  batch = next(iter(loader.validation_batches(dataset, rows, rows)))
  tokens_NT = batch['tokens']
  first_NT = batch['segment_ids'] == 1
  length, kind = tokens_NT.shape[1], run.config.model.kind
  slack = run.config.model.threshold_slack
  engine = Engine(run.model, run.variables, slots=rows, max_len=length + 1, slack=slack, keep_logits=True)
  state = engine.init_state()
  for slot, (tokens_T, size) in enumerate(zip(tokens_NT.tolist(), first_NT.sum(axis=1), strict=True)):
    # No prompt is computed beforehand, and all tokens are known, so that none but the last is chosen.
    state = engine.insert(state, None, 0, slot, Request(tuple(tokens_T[:size]), max_new_tokens=1))
  while (np.asarray(state.phase_N) != IDLE).any():
    state, _ = engine.generate(state, 64)
  routing = {'routing': 'threshold', 'max_len': length + 1, 'slack': slack} if kind == 'mor' else {}
  full = jax.jit(partial(run.model.apply, **routing))(run.variables, tokens_NT)
  logits_NTV = np.asarray(state.logits_NTV)[:, :length]
  scored_NT = ((batch['loss_mask'] > 0) & first_NT)[:, 1:]
  right_NT = logits_NTV[:, :-1].argmax(-1) == batch['targets'][:, 1:]
  found = {
    'rows': rows,
    'logits': float(np.abs(logits_NTV - np.asarray(full.logits))[first_NT].max()),
    'accuracy': float(right_NT[scored_NT].mean()),
  }
  if full.routing is not None:
    depths_NT = np.asarray(state.depths_NT)[:, :length]
    found['depths'] = float((depths_NT != np.asarray(full.routing.depth_BT))[first_NT].mean())
  return found


def main() -> None:
  """Measures, prints and writes."""
  cli.require_checkpoint()
  run = load_run(FLAGS.checkpoint)
  found = json.dumps(measure(run), indent=2)
  print(found)
  write_atomically(run.folder.path / 'decoding.json', found + '\n')


if __name__ == '__main__':
  cli.define_checkpoint()
  cli.run(main, __doc__, with_config=False)
