"""Time, FLOPs and memory of a training step: vanilla against recursive and MoR models.

  python -m benchmarks.train_step [--rounds=7] [--layers=14] [--width=384] [--rows=4] [--seq_len=512]
  python -m benchmarks.train_step --size=360m                a shape of configs/ in bfloat16, for a GPU

All models have the width, tokens and depth of the vanilla model. If R recursions do not divide that depth, the
model is as deep as in the paper and is compared with a vanilla model of the same depth. Steps alternate in one
process, and the table shows medians. A time ratio is the median over rounds of a model's time divided by
vanilla's in the same round. "Executed" is the ratio of the FLOPs that the compiled steps execute in matrix
products, "paper" that of the paper's formula (forward pass, without the head). "Delivered" is the time ratio
divided by the executed ratio: 1 if the whole saving becomes speed. Memory is that of arguments and temporaries.
MFU excludes recomputation and counts causal attention as half. Writes benchmarks/results/train_step.json and .md.
"""

import statistics
from collections.abc import Iterator

import jax
from absl import flags
from rich.console import Console
from rich.progress import track

from benchmarks import results, training
from mor_jax import cli
from mor_jax.config import Config, ConfigError, with_changes
from mor_jax.model import flops
from mor_jax.planning.executed import executed_flops
from mor_jax.units import megabytes

FLAGS = flags.FLAGS
flags.DEFINE_integer('rounds', 7, 'steps of every model that are timed')
flags.DEFINE_list('models', None, 'names of the models to compare with vanilla; none: all')
training.define_flags()

MODELS = {
  'recursive R=2': {'kind': 'recursive', 'num_recursions': 2},
  'mor R=2': {'num_recursions': 2},
  'mor R=3': {'num_recursions': 3},
  'mor R=4': {'num_recursions': 4},
  'mor R=3, shared KV': {'num_recursions': 3, 'kv': 'shared'},
  'mor R=3, token-choice': {'num_recursions': 3, 'router': 'token_choice', 'token_capacity_factor': 1.0},
}


class Contender:
  """A model, its compiled step, and the seconds of every timed step."""

  def __init__(self, config: Config):
    self.config, self._step, self.seconds = config, training.TrainingStep(config), []

  def run(self, turn: int) -> None:
    """Runs one step; the first is not timed."""
    seconds, _ = self._step.run(turn)
    if turn:
      self.seconds.append(seconds)

  def figures(self) -> dict[str, float]:
    """Figures of a step: median seconds, tokens, FLOPs, and bytes per device."""
    memory, model, seq_len = (
      self._step.compiled.memory_analysis(),
      self.config.model,
      self.config.data.seq_len,
    )
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes  # donated ones lie in the arguments
    return {
      'seconds': statistics.median(self.seconds),
      'tokens': self.config.train.global_batch * seq_len,
      'executed_flops': executed_flops(self._step.jaxpr),
      'model_flops_per_token': flops.train_flops_per_token(model, seq_len, attention=0.5),
      'paper_flops_per_token': flops.paper_flops_per_token(model, seq_len),
      'temporary_bytes': memory.temp_size_in_bytes,
      'peak_bytes': memory.argument_size_in_bytes + memory.temp_size_in_bytes + outputs,
    }


def contenders_of(base: Config, names: list[str]) -> dict[str, tuple[str, Config]]:
  """name -> (name of the vanilla model to compare with, config), for the named models and their vanilla models.

  Raises:
    ConfigError: a model does not exist.
  """
  found = {}
  for name in names:
    if name not in MODELS:
      raise ConfigError(f'--models={name} is not one of {", ".join(MODELS)}')
    recursions = MODELS[name]['num_recursions']
    depth = 2 + -(-(base.model.num_layers - 2) // recursions) * recursions
    vanilla = 'vanilla' if depth == base.model.num_layers else f'vanilla, {depth} layers'
    found[vanilla] = (vanilla, with_changes(base, model={'num_layers': depth}))
    found[name] = (vanilla, with_changes(base, model={'num_layers': depth, 'kind': 'mor', **MODELS[name]}))
  return dict(sorted(found.items(), key=lambda entry: entry[0] != entry[1][0]))


def main() -> None:
  """Measures all models and writes the table. Raises ConfigError for invalid flags."""
  if FLAGS.rounds < 1:
    raise ConfigError(f'--rounds={FLAGS.rounds} is not allowed: must be >= 1')
  chosen = contenders_of(training.base_config(kind='vanilla'), FLAGS.models or list(MODELS))
  contenders = {name: Contender(config) for name, (_, config) in track(chosen.items(), 'compiling')}
  for turn in track(range(FLAGS.rounds + 1), 'measuring'):
    for contender in contenders.values():
      contender.run(turn)
  figures = {name: contender.figures() for name, contender in contenders.items()}
  seconds = {name: contender.seconds for name, contender in contenders.items()}
  bases = {name: base for name, (base, _) in chosen.items()}
  rows = list(table_rows(figures, seconds, bases, jax.devices()[0].device_kind))
  used = {name: FLAGS[name].value for name in training.SHAPE_FLAGS if FLAGS[name].value is not None}
  settings = {'rounds': FLAGS.rounds, **used}
  table = results.keep('train_step', COLUMNS, rows, settings, models=figures, seconds=seconds)
  Console().print(table, highlight=False, soft_wrap=True)


COLUMNS = (
  'model',
  'step, ms',
  'tokens/s',
  'MFU',
  'time ratio',
  'executed',
  'paper',
  'delivered',
  'temporaries',
  'ratio',
  'peak',
  'peak ratio',
)


def table_rows(
  figures: dict[str, dict[str, float]], seconds: dict[str, list[float]], bases: dict[str, str], device: str
) -> Iterator[list[str]]:
  """Rows of the table.

  Args:
    figures: model -> `Contender.figures`.
    seconds: model -> seconds of every timed step; the models take turns.
    bases: model -> the vanilla model to compare it with.
    device: kind of the device.
  """
  for name, own in figures.items():
    base = figures[bases[name]]
    times = statistics.median(
      one / other for one, other in zip(seconds[name], seconds[bases[name]], strict=True)
    )
    work, paper, temporary, peak = (
      own[key] / base[key]
      for key in ('executed_flops', 'paper_flops_per_token', 'temporary_bytes', 'peak_bytes')
    )
    speed = own['tokens'] / own['seconds']
    used = training.utilization(speed * own['model_flops_per_token'], device)
    yield [
      name,
      f'{own["seconds"] * 1e3:,.0f}',
      f'{speed:,.0f}',
      '-' if used is None else f'{used:.0%}',
      f'{times:.3f}',
      f'{work:.3f}',
      f'{paper:.3f}',
      f'{times / work:.2f}',
      megabytes(own['temporary_bytes']),
      f'{temporary:.2f}',
      megabytes(own['peak_bytes']),
      f'{peak:.2f}',
    ]


if __name__ == '__main__':
  cli.run(main, __doc__, with_config=False)
