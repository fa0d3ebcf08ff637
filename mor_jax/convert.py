"""Converts checkpoints: python -m mor_jax.convert --checkpoint=PATH --output=FOLDER

What PATH is decides what FOLDER, which must not exist, will be:

  the folder of a run    a folder of safetensors with config.json and tokenizer: of a vanilla model one
                         that `transformers` opens; of a MoR or recursive model in the authors' form
  a checkpoint           of Hugging Face (Llama, SmolLM, Qwen, Mistral, docs/families.md): a run folder, for
                         mor_jax.train --init_from, mor_jax.evaluate and mor_jax.generate
  a run of format 1      that an earlier mor_jax made: a run folder of today's format, to evaluate, generate
                         and train from
  the folder of a run with --merge_lora
                         a run folder of the same model without low-rank changes, which are merged into the kernels
  the authors' weights   a file (.safetensors; .bin or .pt where torch is installed) or a folder of a MoR or
                         recursive model, described by --settings unless mor_jax wrote it: a run folder
  a published folder     made with --to=transformers: a run folder, equal to the one it came from

--weights=int8 and --weights=int4 make a run folder whose kernels are kept in 8 or 4 bits (docs/inference.md), of
a run, a published folder or a checkpoint of Hugging Face; with --to=transformers, llama or authors a folder of
safetensors with the numbers that such a model computes with. A run folder of such weights becomes safetensors too.

--to=transformers makes a folder to publish of any run: safetensors, tokenizer, a model card, and PyTorch modules,
which AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True) runs (docs/hub.md). --to=llama and
--to=authors are the two forms above, --to=mor a run folder; what PATH cannot become is refused.

Low-rank changes that are the same in all recursions (model.lora_sharing=one, or vanilla) are merged whenever a run
becomes a folder of safetensors. Tensors are read and written one at a time, and keep every bit unless --dtype says otherwise.
"""

import dataclasses
import tempfile
from functools import partial
from pathlib import Path

import jax
from absl import flags

from mor_jax import cli
from mor_jax.cli import engines
from mor_jax.cli import weights as weight_flags
from mor_jax.config import ConfigError
from mor_jax.console import open_console, print_line
from mor_jax.evaluation import calibration
from mor_jax.files import require_new
from mor_jax.interop import (
  folders,
  huggingface,
  imported,
  merging,
  model_card,
  official,
  published,
  sources,
  vocabulary,
)
from mor_jax.interop.checked import checked
from mor_jax.interop.old_format import OldWeights
from mor_jax.interop.weights import HeldWeights
from mor_jax.parallel import mesh as mesh_lib
from mor_jax.runs import stored
from mor_jax.runs.run_folder import FORMAT, OLDEST_FORMAT, RunFolder

FLAGS = flags.FLAGS
TARGETS = ('transformers', 'llama', 'authors', 'mor')


def define_flags() -> None:
  """Defines the flags of this command."""
  flags.DEFINE_string(
    'checkpoint', None, 'what to convert: folder of a run, folder of Hugging Face, or weights of the authors'
  )
  flags.DEFINE_string('output', None, 'folder to write, which must not exist')
  flags.DEFINE_enum('to', None, TARGETS, 'what to write; default: as --checkpoint decides')
  flags.DEFINE_string(
    'settings', None, "JSON file with the settings of the authors' weights (docs/uptraining.md)"
  )
  flags.DEFINE_string(
    'tokenizer', None, 'a tokenizer.json or tokenizer.model to use instead of the one beside the weights'
  )
  flags.DEFINE_string(
    'separator',
    None,
    'its token that ends a document; default: <|endoftext|>, else what the checkpoint names',
  )
  flags.DEFINE_enum('untied', 'refuse', ['refuse', 'average'], 'where copies of a shared tensor differ')
  flags.DEFINE_boolean(
    'merge_lora', False, 'write a run folder whose low-rank changes are merged into the kernels, in float32'
  )
  weight_flags.define_flags()
  flags.DEFINE_enum('dtype', None, ['float32', 'bfloat16'], 'dtype to write; default: as it is')


def main() -> None:
  """Reads, converts and writes. Raises ConfigError, with nothing written."""
  cli.require('checkpoint', 'output')
  weight_flags.check_flags()
  source, output = Path(FLAGS.checkpoint), Path(FLAGS.output)
  require_new(output)
  if not source.exists():
    raise ConfigError(f'--checkpoint={source} does not exist')
  if FLAGS.weights:
    what = quantise(source, output)
  elif FLAGS.merge_lora:
    _require('mor', 'becomes a run folder by --merge_lora')
    what = merge(source, output, FLAGS.dtype)
  elif not sources.is_run(source):
    _require('mor', 'is no run folder, which is what it can become; convert that one then')
    what = bring_in(source, output)
  elif RunFolder(source).read_format() == OLDEST_FORMAT:
    _require('mor', f'is a run of format {OLDEST_FORMAT}; first convert it to format {FORMAT}, without --to')
    what = renew(source, output)
  elif FLAGS.to == 'transformers':
    what = publish(source, output, FLAGS.dtype)
  else:
    what = export(source, output, FLAGS.dtype, FLAGS.to)
  print_line(open_console(), f'wrote {what} to {output}')


def _require(target: str, reason: str) -> None:
  if FLAGS.to not in (None, target):
    raise ConfigError(f'--to={FLAGS.to}: --checkpoint={FLAGS.checkpoint} {reason}')


def export(source: Path, output: Path, dtype: str | None = None, to: str | None = None) -> str:
  """A run as a folder of safetensors in one of TARGETS, by default the one for its kind; returns what it wrote."""
  run = stored.open_run(source)
  weights = checked(merging.without_adapters(run), dtype)
  to = to or ('llama' if run.config.kind == 'vanilla' else 'authors')
  if to == 'mor':
    raise ConfigError(f'--to=mor: --checkpoint={source} is a run folder already')
  if to == 'llama':
    huggingface.write(output, weights, run.tokenizer(), run.conventions())
    return f'the model of step {run.step}, as a checkpoint of Hugging Face,'
  official.write(output, weights, run.tokenizer(), run.conventions())
  return f"the model of step {run.step}, under the authors' names,"


def quantise(source: Path, output: Path) -> str:
  """A model with weights as --weights says: a run folder, or with --to its numbers elsewhere; returns what it wrote.

  Raises:
    ConfigError: it is a model of a form that must become a run folder first, or a flag does not go with --weights.
  """
  for name in ('merge_lora', 'settings', 'tokenizer', 'separator', 'dtype'):
    if FLAGS[name].value:
      raise ConfigError(
        f'--{name}={FLAGS[name].value} does not go with --weights={FLAGS.weights}; convert without --weights first, and '
        f'then what that wrote'
      )
  mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
  run = engines.load(mesh)
  tokenizer = engines.tokenizer_of(run)
  run = weight_flags.quantised(run, mesh, None, partial(print_line, open_console()))
  conventions, extras = run.folder.conventions(run.config, tokenizer), (run.folder.calibrations,)

  def write(folder: Path) -> None:
    weights = HeldWeights(run.config.model, run.variables)
    stored.write_model(folder, run.config, weights, tokenizer, str(source), conventions, run.step, extras)

  if FLAGS.to in (None, 'mor'):
    write(output)
    return f'the model of step {run.step} in {FLAGS.weights}, as a run folder (without the state of the optimiser),'
  with tempfile.TemporaryDirectory(prefix='mor_jax-') as folder:
    quantised = Path(folder) / run.folder.path.resolve().name
    write(quantised)
    what = (
      publish(quantised, output) if FLAGS.to == 'transformers' else export(quantised, output, to=FLAGS.to)
    )
  return f'{what.removesuffix(",")}, with the numbers of {FLAGS.weights},'


def merge(source: Path, output: Path, dtype: str | None = None) -> str:
  """A run as a run folder of the same model without low-rank changes; returns what it wrote.

  Raises:
    ConfigError: it is no run, has none, or each recursion has its own.
  """
  if not sources.is_run(source):
    raise ConfigError(
      f'--merge_lora is for the folder of a run, which --checkpoint={source} is not; leave it out'
    )
  run = stored.open_run(source)
  if not run.config.lora_rank:
    raise ConfigError(
      f'--merge_lora: the model of {source} has model.lora_rank=0, so there is nothing to merge'
    )
  merged = merging.MergedWeights(run)
  # What was trained may be what is no more.
  settings = dataclasses.replace(run.run_config.train, trainable='all', stages=None)
  config = dataclasses.replace(run.run_config, model=merged.config, train=settings)
  texts, extras = (run.tokenizer(), str(source), run.conventions()), (run.folder.calibrations,)
  stored.write_model(output, config, checked(merged, dtype), *texts, run.step, extras)
  return f'the model of step {run.step} with its low-rank changes merged, as a run folder (without the state of the optimiser),'


def publish(source: Path, output: Path, dtype: str | None = None) -> str:
  """A run as a folder that `transformers` opens; returns what it wrote."""
  run = stored.open_run(source)
  weights = checked(merging.without_adapters(run), dtype)
  published.check(weights.config)
  calibrations = [entry for entry in calibration.read(run.folder.calibrations) if entry.step == run.step]
  longest, conventions = run.run_config.data.seq_len, run.conventions()
  texts = published.Texts(run.tokenizer(), conventions, longest, run.step, tuple(calibrations))
  published.write(output, weights, texts, model_card.write(run, weights, texts, output.name))
  return f'the model of step {run.step}, for transformers,'


def renew(source: Path, output: Path) -> str:
  """A run of the former format as a run folder of today's; returns what it wrote."""
  run = stored.open_run(source, OLDEST_FORMAT)
  weights, extras = checked(OldWeights(run), FLAGS.dtype), (run.folder.calibrations,)
  texts = run.tokenizer(), str(source), None
  stored.write_model(output, run.run_config, weights, *texts, run.step, extras)
  return (
    f'the model of step {run.step}, as a run folder of format {FORMAT} (without the state of the optimiser),'
  )


def bring_in(source: Path, output: Path) -> str:
  """A checkpoint of another library, or a published folder, as a run folder; returns what it wrote."""
  if published.is_published(source):
    if FLAGS.settings:
      raise ConfigError(
        f'--settings={FLAGS.settings}: {source} says itself which model it holds; leave it out'
      )
    opened = published.open_folder(source, FLAGS.separator, _tokenizer())
    config = published.write_run(output, opened, checked(opened.weights, FLAGS.dtype), str(source))
    return f'the {config.model.kind} model of {source}, as a run folder,'
  if FLAGS.settings or sources.has_settings(source, official.OURS) or source.is_file():
    if source.is_file() and not FLAGS.settings:
      raise ConfigError(f'--checkpoint={source} is a file, which needs --settings to describe its model')
    settings = official.read_settings(FLAGS.settings) if FLAGS.settings else None
    weights = official.open_weights(source, settings, FLAGS.untied)
    beside = source if source.is_dir() else source.parent
    raw = folders.read_config(beside) if (beside / 'config.json').is_file() else {}
    tokenizer, conventions = vocabulary.read(beside, raw, weights.config, FLAGS.separator, _tokenizer())
  else:
    weights, tokenizer, conventions = huggingface.open_folder(source, FLAGS.separator, _tokenizer())
  if tokenizer is None:
    raise ConfigError(
      f'there is no tokenizer.json and no tokenizer.model beside the weights of {source}; name one with --tokenizer'
    )
  weights = checked(weights, FLAGS.dtype)
  config = imported.write_run(output, weights, tokenizer, conventions, str(source))
  return f'the {config.model.kind} model of {source}, as a run folder,'


def _tokenizer() -> Path | None:
  """The file of --tokenizer. Raises ConfigError if there is none."""
  if FLAGS.tokenizer is None:
    return None
  path = Path(FLAGS.tokenizer)
  path = (vocabulary.tokenizer_file(path) or path / 'tokenizer.json') if path.is_dir() else path
  if not path.is_file():
    raise ConfigError(f'there is no {path}; name a tokenizer.json or tokenizer.model with --tokenizer')
  return path


if __name__ == '__main__':
  define_flags()
  cli.run(main, __doc__, with_config=False)
