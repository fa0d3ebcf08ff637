"""The model card of a published folder: what the model is, how it was trained and measured, and how to load it.

Numbers come from the run's summary.json, evaluation.json and data.json. Of what is missing, the card says so and names
the command that measures it.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from mor_jax.config import ModelConfig
from mor_jax.files import parse_json
from mor_jax.interop.published import Texts
from mor_jax.interop.weights import Weights
from mor_jax.model import flops
from mor_jax.runs.stored import StoredWeights
from mor_jax.units import duration, quantity

TO_FILL = 'TO FILL IN'
PAPER = '[Mixture-of-Recursions](https://arxiv.org/abs/2507.10524)'


@dataclasses.dataclass(frozen=True)
class Results:
  """What is known of a run beside its settings; {} where a file is missing or belongs to another checkpoint."""

  summary: dict[str, Any]
  evaluation: dict[str, Any]
  data: dict[str, Any]


def write(run: StoredWeights, weights: Weights, texts: Texts, name: str) -> str:
  """The card in Markdown, with the YAML that the Hub reads in front.

  Args:
    run: that the model comes from.
    weights: as they are published: low-rank changes may be merged, and the dtype may be another.
    name: of the folder.
  """
  config = weights.config
  results = _results(run)
  parts = (
    _front_matter(run, config),
    f'# {run.run_config.name}\n\n{_first_sentence(config)}',
    _use(name, texts),
    _section('Architecture', ('', ''), _architecture(weights, texts)),
    _section('Training', ('', ''), _training(run, results)),
    _losses(run, results),
    _depths(run, results),
    _limits(config, texts),
    _licence(),
  )
  return '\n\n'.join(part for part in parts if part) + '\n'


def _results(run: StoredWeights) -> Results:
  summary, evaluation, data = (
    _read(run.folder.path / name) for name in ('summary.json', 'evaluation.json', 'data.json')
  )
  if summary.get('steps') != run.step:
    summary = {}
  if evaluation.get('step') != run.step:
    evaluation = {}
  return Results(summary, evaluation, data)


def _read(path: Path) -> dict[str, Any]:
  try:
    found = parse_json(path.read_text(encoding='utf-8'))
  except (OSError, ValueError):
    return {}
  return found if isinstance(found, dict) else {}


def _without_folders(source: str) -> str:
  """Names of files alone: a card is read on other machines. Names of the Hub's datasets stay whole."""
  parts = (part if part.startswith('hf:') else re.sub(r'[^:]*/', '', part) for part in source.split(','))
  return ','.join(parts)


def _front_matter(run: StoredWeights, config: ModelConfig) -> str:
  source = run.run_config.data.source
  dataset = source.removeprefix('hf:').split('@')[0].split('/') if source.startswith('hf:') else []
  lines = [
    f'license: other  # {TO_FILL}: an identifier the Hub knows, such as apache-2.0',
    f'license_name: {TO_FILL.lower().replace(" ", "-")}',
    f'language: []  # {TO_FILL}',
    'library_name: transformers',
    'pipeline_tag: text-generation',
    'tags:',
    *(f'- {tag}' for tag in ('mor_jax', 'custom_code', _kind(config).lower().replace(' ', '-'))),
  ]
  if len(dataset) >= 2:
    lines += ['datasets:', f'- {json.dumps("/".join(dataset[:2]))}']
  return '\n'.join(('---', *lines, '---'))


def _kind(config: ModelConfig) -> str:
  return {'mor': 'Mixture-of-Recursions', 'recursive': 'Recursive transformer', 'vanilla': 'Transformer'}[
    config.kind
  ]


def _first_sentence(config: ModelConfig) -> str:
  size = quantity(flops.count_parameters(config).total)
  if config.kind == 'vanilla':
    return (
      f'A language model of {size} parameters: a decoder of {config.num_layers} layers, trained with mor_jax.'
    )
  layers = f'{config.shared_depth} shared layers'
  if config.kind == 'recursive':
    return (
      f'A recursive language model of {size} parameters: every token passes a block of {layers} '
      f'{config.recursions} times. Trained with mor_jax.'
    )
  return (
    f'A {PAPER} language model of {size} parameters: a token passes a block of {layers} up to {config.recursions} times, and a router '
    f'decides how often. Trained with mor_jax.'
  )


def _use(name: str, texts: Texts) -> str:
  code = f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained('{name}', trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained('{name}', trust_remote_code=True)
inputs = tokenizer('Once upon a time', return_tensors='pt')
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
print(model(**inputs).depths)  # recursions that each token took
```"""
  more = 'The modules beside this file need torch and transformers (5.20 or later, below 6), nothing else.'
  if texts.calibrations:
    known = ', '.join(str(list(entry.capacities)) for entry in texts.calibrations)
    more += (
      f' Thresholds were calibrated for other capacities, too, which `from_pretrained(..., capacities=[...])` takes: '
      f'{known}.'
    )
  return f'## Use\n\n{code}\n\n{more}'


def _section(title: str, head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
  lines = [head, ('---',) * len(head), *rows]
  return f'## {title}\n\n' + '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _architecture(weights: Weights, texts: Texts) -> list[tuple[str, str]]:
  config, count = weights.config, flops.count_parameters(weights.config)
  ends = '1 + ' if config.unique_ends else ''
  layers = f'{config.num_layers}'
  if config.kind != 'vanilla':
    layers += (
      f' deep: {ends}{config.recursions} x {config.shared_depth}{" + 1" if ends else ""}, {config.sharing}'
    )
  rows = [
    ('kind', config.kind),
    (
      'parameters',
      f'{count.total:,}, of these {count.non_embedding:,} outside the embedding; unrolled the layers would have '
      f'{count.unrolled_non_embedding:,}',
    ),
    ('layers', layers),
    (
      'width, heads, key/value heads, MLP',
      f'{config.d_model}, {config.num_heads}, {config.num_kv_heads}, {config.mlp_dim}',
    ),
    ('vocabulary', f'{config.vocab_size:,}'),
    ('text length', f'{texts.longest:,} tokens'),
    ('stored as', f'{weights.dtypes["params/final_norm/scale"]}; computed as {config.dtype} in training'),
  ]
  if config.kind == 'mor':
    shares = ', '.join(f'{capacity:.3g}' for capacity in config.step_capacities)
    rows += [
      ('router', f'{config.router}, {config.router_head}, {config.squash}, gating {config.gating}'),
      ('capacities', f'{shares} of the tokens at recursion 1 to {config.recursions}'),
    ]
  if config.kind != 'vanilla' or config.kv == 'shared':
    rows.append(('keys and values', config.kv))
  executed = flops.forward_flops_per_token(config, texts.longest)
  paper = flops.paper_flops_per_token(config, texts.longest)
  rows.append(
    ('forward FLOPs per token', f'{quantity(executed)} executed; {quantity(paper)} as the paper counts')
  )
  return rows


def _training(run: StoredWeights, results: Results) -> list[tuple[str, str]]:
  summary, config = results.summary, run.run_config
  unknown = 'not known: there is no summary.json of this step'
  splits = results.data.get('splits', {})
  documents = splits.get('train', {}).get('documents')
  origin = f'`{_without_folders(config.data.source)}`' + (f', {documents:,} documents' if documents else '')
  if digest := results.data.get('documents_digest'):
    origin += f', digest {digest[:12]}'
  rows = [
    ('data', origin if results.data else f'not known: this run has no data.json. {TO_FILL}'),
    ('licence of the data', TO_FILL),
    ('steps', f'{run.step:,} of {config.train.global_batch} rows x {config.data.seq_len} tokens'),
    ('tokens', f'{summary["tokens"]:,}' if 'tokens' in summary else unknown),
    ('training FLOPs', f'{summary["train_flops"]:.3g}' if 'train_flops' in summary else unknown),
    ('time', duration(summary['seconds']) if 'seconds' in summary else unknown),
    ('peak learning rate', f'{config.train.learning_rate:g}, {config.train.schedule}'),
  ]
  if config.init.source:
    rows.insert(0, ('begins from', f'`{_without_folders(config.init.source)}`'))
  return rows


def _command(run: StoredWeights) -> str:
  return f'`python -m mor_jax.evaluate --checkpoint={_without_folders(str(run.folder.path))}`'


def _losses(run: StoredWeights, results: Results) -> str:
  """Validation losses: of a MoR model under both kinds of routing, and the gap between them."""
  routing = results.evaluation.get('routing', {})
  is_mor = run.config.kind == 'mor'
  missing = f'not measured: {_command(run)}'
  known = results.summary.get('validation/nll')

  def row(label, found, otherwise):
    if not found:
      return (label, otherwise, '', '')
    return (label, *(f'{found[name]:.4f}' for name in ('nll', 'perplexity', 'bits_per_byte')))

  rows = []
  for name, label in (
    (
      ('topk', 'top-k routing, as in training'),
      ('threshold', 'threshold routing, causal: that of this folder'),
    )
    if is_mor
    else (('none', 'all tokens alike'),)
  ):
    otherwise = missing
    if name != 'threshold' and known is not None:
      otherwise = f'{known:.4f} (at the end of training)'
    rows.append(row(label, routing.get(name), otherwise))
  if is_mor:
    rows.append(row('gap', results.evaluation.get('gap'), missing))
  head = ('validation', 'nats per token', 'perplexity', 'bits per byte')
  return _section('Losses', head, rows)


def _depths(run: StoredWeights, results: Results) -> str:
  """Shares of tokens by the recursions that they took."""
  if run.config.kind != 'mor':
    return ''
  rows = []
  sources = (
    ('threshold routing', results.evaluation.get('routing', {}).get('threshold', {}), ''),
    ('top-k routing', results.evaluation.get('routing', {}).get('topk', {}), ''),
    ('top-k routing, end of training', results.summary, 'validation/'),
  )
  depths = range(run.config.recursions + 1)
  for label, found, prefix in sources:
    shares = [found.get(f'{prefix}depth_share_{depth}') for depth in depths]
    mean = found.get(f'{prefix}mean_depth')
    if mean is not None and None not in shares:
      rows.append((label, f'{mean:.2f}', *(f'{share:.1%}' for share in shares)))
    elif not prefix:
      rows.append((label, f'not measured: {_command(run)}', *('' for _ in depths)))
  return _section(
    'Depths', ('', 'mean', *(f'{depth} recursion{"s" * (depth != 1)}' for depth in depths)), rows
  )


def _limits(config: ModelConfig, texts: Texts) -> str:
  lines = [
    f'* {TO_FILL}: what the model is meant for, what it is not, and what is known of its biases.',
    '* One text a row; rows of different length are padded on the left, with an attention mask.',
  ]
  if config.kind == 'mor':
    lines.append(
      '* Routing is causal (threshold). Top-k routing, which the model was trained with, looks at the whole row and '
      'cannot generate text.'
    )
  if any(capacity < 1 for capacity in config.step_capacities):
    lines.append(
      f'* Recursions have places for texts of {texts.longest:,} tokens (`config.max_position_embeddings`, times '
      f'`threshold_slack`); in longer texts the last tokens may find none and leave early.'
    )
  return '## Limits\n\n' + '\n'.join(lines)


def _licence() -> str:
  return (
    f'## Licence\n\n{TO_FILL}: of the weights. The PyTorch modules beside this file are under Apache-2.0.'
  )
