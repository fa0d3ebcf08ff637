"""Makes a prepared dataset of rows that were packed elsewhere: with a loss mask, or in an order of their own.

  from mor_jax.data import packing, written
  row = packing.Row(tokens_T, np.array([300, 212]), loss_mask_T=is_answer_T)   # two segments, some tokens scored
  written.write('chats', tokenizer, {'train': [row, ...], 'validation': [...]})

trains with --config.data.source=prepared:chats.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from mor_jax.config import ConfigError
from mor_jax.data import corpus, shards
from mor_jax.data.dataset import TOKENIZER
from mor_jax.data.manifest import FORMAT_VERSION, MANIFEST, Manifest, SplitCounts
from mor_jax.data.packing import Row
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.files import new_folder, write_atomically


def write(
  folder: str | os.PathLike, tokenizer: Tokenizer, rows: Mapping[str, Iterable[Row]], source: str = 'rows'
) -> None:
  """Writes rows as a dataset that `data.source=prepared:FOLDER` opens.

  Args:
    folder: gets its name when it is complete.
    tokenizer: of the rows.
    rows: of 'train' and of 'validation', all of one length, and all with a loss mask or none.
    source: says where they come from.

  Raises:
    ConfigError: the folder exists, a split has no rows, or they differ in their length or in having a mask.
  """
  streams = {split: iter(rows[split]) for split in corpus.SPLITS}
  first = next(streams['train'], None)
  if first is None:
    raise ConfigError(f'{folder}: there are no rows for the split train')
  streams['train'] = itertools.chain([first], streams['train'])
  length, has_mask = len(first.tokens_T), first.loss_mask_T is not None
  row_format = shards.RowFormat(tokenizer.vocab_size, length, has_mask)
  with new_folder(pathlib.Path(folder)) as partial:
    digest, splits, num_bytes = hashlib.sha256(), {}, {}
    for split in corpus.SPLITS:
      counts: Counter[str] = Counter()
      file = shards.ShardFile(partial / f'{split}.shard')
      for row in streams[split]:
        _check(row, f'row {counts["rows"]} of {split}', length, has_mask, tokenizer)
        record = row_format.serialize(row)
        digest.update(record)
        file.append(record)
        counts.update(_counts(row, tokenizer))
      file.close()
      if not counts['rows']:
        raise ConfigError(f'{folder}: there are no rows for the split {split}')
      shards.publish(partial, split, [file.path])
      num_bytes[split] = file.num_bytes
      splits[split] = SplitCounts(
        **{field.name: counts[field.name] for field in dataclasses.fields(SplitCounts)}
      )
    tokenizer.save(partial / TOKENIZER)
    shards.write_tfds_metadata(
      partial,
      row_format,
      lengths={split: [counts.rows] for split, counts in splits.items()},
      num_bytes=num_bytes,
    )
    manifest = Manifest(
      format_version=FORMAT_VERSION,
      source=source,
      documents_digest=digest.hexdigest(),
      seq_len=length,
      packing='rows',
      tokenizer=f'rows-{tokenizer.digest[:16]}',
      separator=tokenizer.separator,
      begin=tokenizer.begin,
      vocab_size=tokenizer.vocab_size,
      tokenizer_digest=tokenizer.digest,
      dropped={},
      dropped_examples=[],
      splits=splits,
      files={path.name: path.stat().st_size for path in sorted(partial.iterdir()) if path.is_file()},
      extras=('loss_mask',) if has_mask else (),
    )
    write_atomically(partial / MANIFEST, json.dumps(dataclasses.asdict(manifest), indent=2) + '\n')


def _counts(row: Row, tokenizer: Tokenizer) -> dict[str, int]:
  text = tokenizer.decode(row.tokens_T[: row.num_tokens].tolist())
  return {
    'rows': 1,
    'tokens': row.num_tokens,
    'targets': row.num_targets,
    'documents': len(row.segment_lengths),
    'bytes': len(text.encode()),
  }


def _check(row: Row, where: str, length: int, has_mask: bool, tokenizer: Tokenizer) -> None:
  if len(row.tokens_T) != length or row.num_tokens > length:
    raise ConfigError(
      f'{where} has {len(row.tokens_T)} tokens, {row.num_tokens} of them in segments; the first row has {length}'
    )
  mask_T = row.loss_mask_T
  if (mask_T is not None) != has_mask or (mask_T is not None and len(mask_T) != length):
    raise ConfigError(f'{where}: either all rows have a loss mask of {length} entries, or none')
  smallest, largest = int(np.min(row.tokens_T)), int(np.max(row.tokens_T))
  if smallest < 0 or largest >= tokenizer.vocab_size:
    raise ConfigError(
      f'{where} has ids from {smallest} to {largest}; those of the tokenizer are below {tokenizer.vocab_size}'
    )
