"""Models of other libraries as run folders."""

from collections.abc import Sequence
from pathlib import Path

from mor_jax.config import Config, DataConfig, with_changes
from mor_jax.data.conventions import Conventions
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.interop.weights import Weights
from mor_jax.runs import stored


def write_run(
  output: Path,
  weights: Weights,
  tokenizer: Tokenizer,
  conventions: Conventions,
  source: str,
  step: int = 0,
  seq_len: int | None = None,
  extras: Sequence[Path] = (),
) -> Config:
  """Writes a run folder, which must not exist, and returns its settings.

  Args:
    source: where the model comes from, for the record.
    step: after which the weights were stored, where that is known.
    seq_len: length of the texts that it is for; None: as the conventions say, if they do.
    extras: more files to copy into the folder.
  """
  data = {
    'tokenizer': str(output.absolute() / 'tokenizer.json'),
    'separator': tokenizer.separator,
    'begin': tokenizer.begin,
  }
  if seq_len is not None:
    data['seq_len'] = seq_len
  elif conventions.max_positions:
    data['seq_len'] = min(conventions.max_positions, DataConfig().seq_len)  # a flag may say longer
  config = with_changes(Config(name=output.name, model=weights.config), data=data)
  stored.write_model(output, config, weights, tokenizer, source, conventions, step, extras)
  return config
