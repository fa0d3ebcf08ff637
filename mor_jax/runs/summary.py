"""The tables that a user sees before and after training."""

from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from mor_jax.config import Config, ModelConfig
from mor_jax.console import Row
from mor_jax.data import schedule
from mor_jax.data.loader import Dataset
from mor_jax.data.synthetic import SyntheticDataset
from mor_jax.model import flops
from mor_jax.units import byte_count, megabytes, quantity

MOST_EPOCHS = 4  # repeated text is worth about as much as new text up to here (Muennighoff et al. 2023)


def describe_run(
  config: Config,
  mesh: Mesh,
  dataset: Dataset,
  workdir: Path,
  trained: str | None = None,
  begun: str | None = None,
) -> list[Row]:
  """Describes a run: devices, model, cost, data and folder. The config must contain the vocabulary size.

  Args:
    trained: which of the parameters are trained, and the memory that takes.
    begun: what became of the model that it begins from.
  """
  devices = list(mesh.devices.flat)
  axes = ' '.join(f'{axis}={size}' for axis, size in mesh.shape.items())
  rows = [
    ('devices', f'{len(devices)} x {devices[0].device_kind}, mesh {axes}'),
    ('model', _model(config.model)),
    ('parameters', _parameters(config.model)),
  ]
  if trained is not None:
    rows += [('trained', trained)]
  if config.model.kind == 'mor':
    rows += [('capacities', _capacities(config.model, config.data.seq_len))]
  if config.init.source:
    rows += [('begins from', config.init.source + (f', {begun}' if begun else ''))]
  if config.distill.weight:
    rows += [('teacher', config.distill.teacher or config.init.source)]
  return [
    *rows,
    ('FLOPs/token', _flops(config.model, config.data.seq_len)),
    ('data', _data(config.data.source, dataset)),
    ('training', _training(config) + _passes(config, dataset)),
    ('workdir', str(workdir)),
  ]


def _model(model: ModelConfig) -> str:
  if model.kind == 'vanilla':
    layers = f'{model.num_layers} layers'
  else:
    ends = '1 + ' if model.unique_ends else ''
    layers = f'{model.num_layers} layers deep ({ends}{model.recursions} x {model.shared_depth}'
    layers += ' + 1)' if model.unique_ends else ')'
  return f'{model.kind}, {layers}, width {model.d_model}, vocabulary {model.vocab_size:,}, {model.dtype}'


def _parameters(model: ModelConfig) -> str:
  count = flops.count_parameters(model)
  text = f'{quantity(count.total)}, of these {quantity(count.non_embedding)} outside the embedding'
  if model.kind == 'vanilla':
    return text
  return f'{text}; unrolled, the layers would have {quantity(count.unrolled_non_embedding)}'


def _capacities(model: ModelConfig, seq_len: int) -> str:
  shares = ', '.join(f'{capacity:.2f}' for capacity in model.step_capacities)
  tokens = ', '.join(str(count) for count in model.selected_tokens(seq_len))
  return f'{shares} of the tokens at recursion 1 to {model.recursions}, that is {tokens} of {seq_len}'


def _flops(model: ModelConfig, seq_len: int) -> str:
  executed = flops.train_flops_per_token(model, seq_len)
  paper = flops.paper_flops_per_token(model, seq_len)
  text = f'{quantity(executed)} in training; {quantity(paper)} forward as the paper counts'
  if model.kind == 'vanilla':
    return text
  vanilla = flops.vanilla_of(model)
  return (
    f'{text}: {executed / flops.train_flops_per_token(vanilla, seq_len):.2f} and '
    f'{paper / flops.paper_flops_per_token(vanilla, seq_len):.2f} of a vanilla model of the same depth'
  )


def _data(source: str, dataset: Dataset) -> str:
  train, validation = (dataset.manifest.splits[split] for split in ('train', 'validation'))
  if isinstance(dataset, SyntheticDataset):
    return f'{source}: endless rows of examples; held out for validation {validation.rows:,} rows of others'
  if not train.rows:
    return (
      f'{source}, tokenised and packed live; held out for validation {validation.rows:,} rows of its head'
    )
  return (
    f'{source}: {train.documents:,} documents, {megabytes(train.bytes)}, {quantity(train.tokens)} '
    f'tokens; held out for validation {validation.documents:,} documents, {quantity(validation.tokens)} tokens'
  )


def _training(config: Config) -> str:
  train = config.train
  micro = f' in {train.accumulation} micro-batches' if train.accumulation > 1 else ''
  tokens = schedule.of(train).rows_before(train.steps) * config.data.seq_len
  ramp = f' (from {train.ramp_batch}, doubling over {train.ramp_steps:,} steps)' if train.ramp_batch else ''
  budget = f', as train.flops_budget={train.flops_budget:g} sets them' if train.flops_budget else ''
  return (
    f'{train.steps:,} steps{budget}, of {train.global_batch} rows{ramp} x {config.data.seq_len} tokens{micro}, '
    f'{quantity(tokens)} tokens in all'
  )


def _epochs(config: Config, dataset: Dataset) -> float | None:
  """Passes over the training split; None for a stream, whose length is not known, and for endless rows."""
  if isinstance(dataset, SyntheticDataset):
    return None
  rows = dataset.manifest.splits['train'].rows
  return schedule.of(config.train).rows_before(config.train.steps) / rows if rows else None


def _passes(config: Config, dataset: Dataset) -> str:
  epochs = _epochs(config, dataset)
  if epochs is None:
    return ''
  return f', {epochs:.1%} of the corpus' if epochs < 1 else f', {epochs:,.1f} passes over the corpus'


def warn_of_repetition(config: Config, dataset: Dataset) -> str | None:
  """What to tell a user whose run repeats its corpus so often that little is learned from it; else None."""
  epochs = _epochs(config, dataset)
  if epochs is None or epochs <= MOST_EPOCHS:
    return None
  tokens = quantity(dataset.manifest.splits['train'].tokens)
  return (
    f'WARNING: the run goes {epochs:,.0f} times over the {tokens} tokens of {config.data.source}; after some '
    f'{MOST_EPOCHS} times other text teaches more (arXiv 2305.16264): give a larger corpus with --config.data.source '
    f'(docs/data.md), or fewer steps'
  )


def describe_program(
  config: Config, first: int, compiled: Any, seconds: float, is_only: bool, optimizer_bytes: int
) -> list[Row]:
  """Describes the compiled program of one phase, and the phase's batch and capacities if there are several."""
  rows = [describe_compiled(compiled, seconds)]
  if not is_only:
    micro = f' in {config.train.accumulation} micro-batches' if config.train.accumulation > 1 else ''
    most = f', at most {config.train.recursions} recursions' if config.train.recursions else ''
    trained = f', {config.train.trainable} trained, optimiser state {byte_count(optimizer_bytes)}'
    rows += [(f'from step {first + 1}', f'{config.train.global_batch} rows{micro}{most}{trained}')]
    if config.model.kind == 'mor':
      rows += [('', _capacities(config.model, config.data.seq_len))]
  return rows


def describe_compiled(compiled: Any, seconds: float) -> Row:
  """Memory per device and compile time of the train step (a `jax.stages.Compiled`)."""
  memory = compiled.memory_analysis()
  if memory is None:  # not every backend tells
    return 'compiled', f'in {seconds:.1f} s'
  return 'compiled', (
    f'in {seconds:.1f} s; memory per device {megabytes(device_bytes(compiled))}: '
    f'state and batch {megabytes(memory.argument_size_in_bytes)}, temporaries {megabytes(memory.temp_size_in_bytes)}'
  )


def device_bytes(compiled: Any) -> int:
  """Memory per device of a compiled step in bytes; 0 if the backend does not report it."""
  memory = compiled.memory_analysis()
  if memory is None:
    return 0
  # Donated outputs live in the arguments' memory.
  outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
  return memory.argument_size_in_bytes + memory.temp_size_in_bytes + outputs


def state_bytes(compiled: Any) -> int:
  """Memory per device of a compiled step's state and batch in bytes; 0 if the backend does not report it."""
  memory = compiled.memory_analysis()
  return 0 if memory is None else memory.argument_size_in_bytes


def describe_result(summary: dict[str, Any], run_path: Path) -> list[Row]:
  """Describes a finished run: final loss, depths and output files."""
  rows = [
    (
      'validation',
      f'loss {summary["validation/nll"]:.4f} nats per token, '
      f'{summary["validation/bits_per_byte"]:.4f} bits per byte',
    ),
    (
      'n-grams',
      f'unigram entropy {summary["validation/unigram_entropy"]:.4f}, '
      f'bigram entropy {summary["validation/bigram_entropy"]:.4f} nats per token, of the same split',
    ),
  ]
  depths = [key for key in summary if key.startswith('validation/depth_share_')]
  if depths:
    shares = ', '.join(f'{key.rsplit("_", 1)[1]}: {summary[key]:.1%}' for key in depths)
    rows += [
      ('depth', f'tokens by recursions taken: {shares}; mean {summary["validation/mean_depth"]:.2f}'),
      (
        'router',
        f'dead tokens {summary["validation/dead_token_ratio"]:.1%}, '
        f'sampling accuracy {summary["validation/sampling_accuracy"]:.1%}',
      ),
    ]
  elsewhere = '://' in summary['checkpoint']
  if summary['sample']:
    rows += [('sample', summary['sample'])]
  return [
    *rows,
    ('trained', f'{quantity(summary["tokens"])} tokens in {summary["seconds"]:,.0f} s'),
    describe_time(summary['goodput'], summary['restarts']),
    ('checkpoint', summary['checkpoint'] if elsewhere else str(run_path / summary['checkpoint'])),
    ('metrics', f'{run_path / "metrics.jsonl"} and {run_path / "tensorboard"}'),
  ]


def describe_time(seconds: dict[str, float], restarts: int) -> Row:
  """Time spent by kind of work, over all processes of the run (`goodput.Ledger`)."""
  total = sum(seconds.values())
  shares = ', '.join(f'{kind.replace("_", " ")} {value / total:.1%}' for kind, value in seconds.items())
  times = f' in {restarts + 1} processes' if restarts else ''
  return 'time', f'{total:,.0f} s{times}: {shares}'
