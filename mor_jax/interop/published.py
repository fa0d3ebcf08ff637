"""Folders for others to use: weights of a model of any kind beside the PyTorch modules that run them in transformers.

The modules, in the folder `hub` beside this file, are copied and never imported. config.json has the settings of the
model under our names, so that the folder can be read back bit for bit.
"""

import dataclasses
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mor_jax.config import Config, ConfigError, ModelConfig, with_changes
from mor_jax.config.typed import from_dict
from mor_jax.data.conventions import Conventions
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.evaluation import calibration
from mor_jax.evaluation.calibration import Calibration
from mor_jax.interop import folders, imported, names, tensors, vocabulary
from mor_jax.interop.names import Place, Table
from mor_jax.interop.reader import Reader
from mor_jax.interop.weights import NamedWeights, Weights
from mor_jax.model import relaxation, sharing

MODEL_TYPE = 'mor_jax'
MODULES = Path(__file__).parent / 'hub'
CLASSES = {'AutoConfig': 'configuration_mor.MoRConfig', 'AutoModelForCausalLM': 'modeling_mor.MoRForCausalLM'}
SCALINGS = ('none', 'linear', 'llama3', 'yarn', 'dynamic')
# Settings that the modules obey, and those that only training and our own programs have.
KNOWN = frozenset(
  """
  kind vocab_size num_layers d_model num_heads num_kv_heads head_dim mlp_dim norm_epsilon tie_embeddings embed_factor
  attention_bias qk_norm sliding_window no_rope_layers
  rope_theta rope_scaling rope_scaling_factor rope_low_frequency_factor rope_high_frequency_factor rope_original_length
  rope_beta_fast rope_beta_slow rope_truncate rope_attention_factor rope_length
  num_recursions sharing kv share_norms lora_rank lora_alpha lora_targets recursion_encoding threshold_slack
  router router_head router_target router_activation router_alpha router_temperature gating token_gating capacities
  token_capacity_factor selection random_router causality balancing balance_warmup_steps

  init init_std embed_std benefit_margin benefit_rows depth_prior_weight router_noise router_z_loss_weight ema_decay
  random_gate capacity_warmup_steps aux_loss_weight bias_update_rate balancing_loss_weight
  dtype remat attention dispatch unroll_layers
  """.split()  # noqa: SIM905
)
_ROUTING = {'threshold': 'router_threshold', 'updates': 'router_updates', 'bias': 'router_bias'}


@dataclasses.dataclass(frozen=True)
class Texts:
  """What goes with the weights.

  Attributes:
    tokenizer: of the model.
    conventions: of its texts.
    longest: text that recursions have places for, in tokens.
    step: of the checkpoint.
    calibrations: of that checkpoint.
  """

  tokenizer: Tokenizer
  conventions: Conventions
  longest: int
  step: int = 0
  calibrations: tuple[Calibration, ...] = ()


@dataclasses.dataclass(frozen=True)
class Opened:
  """A folder that was read: weights, leaf by leaf, and what goes with them."""

  weights: Weights
  texts: Texts


def is_published(path: Path) -> bool:
  """Whether a folder was written by `write`, or by transformers from what it opened there."""
  return (path / 'config.json').is_file() and folders.read_config(path).get('model_type') == MODEL_TYPE


def write(folder: str | Path, opened: Weights, texts: Texts, card: str) -> None:
  """Writes a folder that `transformers` opens with trust_remote_code=True.

  Args:
    card: README.md, the model card.

  Raises:
    ConfigError: the folder exists, or the model has a setting that the PyTorch modules do not know.
  """
  check(opened.config)
  own = {path.name: path.read_text(encoding='utf-8') for path in sorted(MODULES.glob('*.py'))}
  files = own | {'README.md': card} | _vocabulary_files(texts)
  described = describe(opened, texts)
  folders.write(folder, table(opened.config), opened, described, texts.tokenizer, texts.conventions, files)


def check(config: ModelConfig) -> None:
  """Raises ConfigError for what the PyTorch modules do not do."""
  unknown = [
    f'model.{field.name}={getattr(config, field.name)}'
    for field in dataclasses.fields(config)
    if field.name not in KNOWN and getattr(config, field.name) != field.default
  ]
  if config.rope_scaling not in SCALINGS:
    unknown.append(f'model.rope_scaling={config.rope_scaling}')
  if unknown:
    raise ConfigError(f'{", ".join(unknown)}: the PyTorch modules for transformers do not know this setting')
  if config.kind == 'mor' and config.random_router:
    raise ConfigError(
      'model.random_router=True chooses by noise that PyTorch cannot draw; such a model is a control for training, and '
      'is evaluated with python -m mor_jax.evaluate'
    )


def describe(opened: Weights, texts: Texts) -> dict[str, Any]:
  """config.json of a folder."""
  config = opened.config
  described = vocabulary.described(texts.tokenizer, texts.conventions)
  return {
    'architectures': ['MoRForCausalLM'],
    'model_type': MODEL_TYPE,
    'auto_map': CLASSES,
    'mor': dataclasses.asdict(config),
    **described,
    'pad_token_id': texts.tokenizer.end_of_text,
    'max_position_embeddings': texts.longest,
    'separator': texts.tokenizer.separator,
    'begin': texts.tokenizer.begin,
    'step': texts.step,
    'calibrations': [dataclasses.asdict(entry) for entry in texts.calibrations],
    'dtype': str(opened.dtypes['params/final_norm/scale']),
  }


def _vocabulary_files(texts: Texts) -> dict[str, str]:
  """Files beside tokenizer.json, where the model did not come with its own."""
  tokenizer, conventions = texts.tokenizer, texts.conventions
  about = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'eos_token': tokenizer.separator,
    'pad_token': tokenizer.separator,
    'padding_side': 'left',
    'model_max_length': texts.longest,
  } | ({'bos_token': tokenizer.begin} if tokenizer.begin else {})
  ids = vocabulary.described(tokenizer, conventions)
  generation = {name: ids[name] for name in ('bos_token_id', 'eos_token_id')}
  generation |= {'pad_token_id': tokenizer.end_of_text}
  found = {'tokenizer_config.json': about, 'generation_config.json': generation}
  return {
    name: json.dumps(content, indent=2) + '\n'
    for name, content in found.items()
    if name not in conventions.files
  }


# ---- the way back ----


def open_folder(folder: str | Path, separator: str | None = None, tokenizer: Path | None = None) -> Opened:
  """A folder of `write`, or one that transformers saved after opening such a folder.

  Args:
    separator: token that ends a document; None: that of the folder.
    tokenizer: a tokenizer.json elsewhere.

  Raises:
    ConfigError: it is not such a folder, or damaged, or has no tokenizer.
  """
  folder = Path(folder)
  raw = folders.read_config(folder)
  if raw.get('model_type') != MODEL_TYPE or not isinstance(raw.get('mor'), dict):
    raise ConfigError(f'{folder} was not written by python -m mor_jax.convert --to=transformers')
  try:
    config = with_changes(Config(model=from_dict(ModelConfig, raw['mor'], 'model.'))).model
    calibrations = tuple(
      Calibration(tuple(entry['capacities']), tuple(entry['thresholds']), entry['step'], entry['rows'])
      for entry in raw.get('calibrations') or ()
    )
  except (TypeError, KeyError) as error:
    raise ConfigError(f'{folder}/config.json cannot be read ({error!r})') from None
  problems: list[str] = []
  numbers = Reader(raw, problems)
  longest, step = numbers.whole('max_position_embeddings'), numbers.whole('step') if raw.get('step') else 0
  if problems:
    raise ConfigError(f'{folder}/config.json cannot be read: {"; ".join(problems)}')
  weights = NamedWeights(config, table(config), tensors.open_tensors(folder))
  separator = separator or raw.get('separator')
  read, conventions = vocabulary.read(folder, raw, config, separator, tokenizer)
  if read is None:
    raise ConfigError(f'{folder} has no tokenizer.json; name one with --tokenizer')
  try:
    read = Tokenizer.load(tokenizer or folder / 'tokenizer.json', read.separator, raw.get('begin'))
  except ValueError as error:
    raise ConfigError(f'{folder}: {error}') from None
  return Opened(weights, Texts(read, conventions, longest, step, calibrations))


def write_run(output: Path, opened: Opened, weights: Weights, source: str) -> Config:
  """Writes a run folder, which must not exist, and returns its settings.

  Args:
    weights: those of `opened`, or the same in another dtype.
    source: where the model comes from, for the record.
  """
  texts = opened.texts
  with tempfile.TemporaryDirectory() as folder:
    calibrations = Path(folder) / 'calibrations.json'
    for entry in texts.calibrations:
      calibration.store(calibrations, entry)
    about = {'step': texts.step, 'seq_len': texts.longest, 'extras': (calibrations,)}
    return imported.write_run(output, weights, texts.tokenizer, texts.conventions, source, **about)


# ---- names ----


def table(config: ModelConfig) -> Table:
  """Names of the tensors in the PyTorch modules, in which every tensor appears once."""
  return dict(_table(config))


def _table(config: ModelConfig) -> Iterator[tuple[str, Place]]:
  rows = ('embedding',) if config.embed_factor is None else ('quotient', 'remainder')
  for name in rows:
    theirs = 'weight' if name == 'embedding' else name
    yield f'model.embed_tokens.{theirs}', Place(f'params/embed/{name}')
  for slot in range(config.num_unique_layers):
    place = sharing.place(config, slot)
    prefix = f'model.{place.part}' if place.index is None else f'model.layers.{place.index}'
    for ours, theirs in names.layer(config).items():
      yield f'{prefix}.{theirs}', Place(f'params/{place.part}/{ours}', place.index)
  yield from _steps(config)
  if config.kind == 'mor':
    yield from _routers(config)
  yield 'model.norm.weight', Place('params/final_norm/scale')
  if not config.tie_embeddings:
    yield names.HEAD, Place('params/head/kernel')


def _steps(config: ModelConfig) -> Iterator[tuple[str, Place]]:
  """What recursions have of their own."""
  for step in range(config.recursions):
    if config.kind == 'vanilla':
      return
    for kernel in relaxation.LORA_TARGETS[config.lora_targets] if config.lora_rank else ():
      name = kernel.replace('/', '_')
      for factor in ('down', 'up'):
        yield (
          f'model.steps.{step}.lora.{name}.{factor}',
          Place(f'params/steps/lora/{name}/{factor}', step),
        )
    for norm in () if config.share_norms else relaxation.NORMS:
      yield f'model.steps.{step}.norms.{norm}', Place(f'params/steps/norms/{norm}/scale', step)
    if config.recursion_encoding:
      yield f'model.steps.{step}.encoding', Place('params/steps/encoding/embedding', step)


def _routers(config: ModelConfig) -> Iterator[tuple[str, Place]]:
  kernels = ('output',) if config.router_head == 'linear' else ('hidden', 'output')
  for router in ('router', *(['aux_router'] if config.has_aux_router else [])):
    for kernel in kernels:
      leaf = f'params/{router}/{kernel}/kernel'
      if config.router == 'token_choice':
        yield f'model.{router}.{kernel}.weight', Place(leaf)
      else:
        for step in range(config.recursions):
          yield f'model.{router}.{step}.{kernel}.weight', Place(leaf, step)
  for leaf in names.shapes(config):
    if leaf.startswith('routing/'):
      yield f'model.{_ROUTING[leaf.removeprefix("routing/")]}', Place(leaf)
