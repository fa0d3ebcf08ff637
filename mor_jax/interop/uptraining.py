"""A vanilla model's weights as the beginning of a model that shares layers (docs/uptraining.md)."""

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np

from mor_jax.config import ConfigError, ModelConfig
from mor_jax.interop import merging, names
from mor_jax.interop.weights import Weights
from mor_jax.model import relaxation, sharing

METHODS = ('stepwise', 'average', 'lower', 'upper', 'random')

# What must be as it was: the meaning of the weights depends on it.
_SAME = (
  'vocab_size',
  'd_model',
  'num_heads',
  'num_kv_heads',
  'head_width',
  'mlp_dim',
  'tie_embeddings',
  'embed_factor',
  'norm_epsilon',
  'attention_bias',
  'qk_norm',
  'sliding_window',
  'rope_theta',
  'rope_scaling',
  'rope_scaling_factor',
)
_OF_SCALING = {  # further ones that must be, by rope_scaling
  'llama3': ('rope_low_frequency_factor', 'rope_high_frequency_factor', 'rope_original_length'),
  'yarn': ('rope_beta_fast', 'rope_beta_slow', 'rope_truncate', 'rope_scores_factor', 'rope_original_length'),
  'dynamic': ('rope_original_length',),
}
_SET_BY = {'head_width': 'head_dim', 'rope_scores_factor': 'rope_attention_factor'}  # derived: the setting

# The norm before each kernel that has one, whose scale can be folded into the kernel.
_NORM_BEFORE = {
  'attention/query/kernel': 'attention_norm/scale',
  'attention/key/kernel': 'attention_norm/scale',
  'attention/value/kernel': 'attention_norm/scale',
  'mlp/gate/kernel': 'mlp_norm/scale',
  'mlp/up/kernel': 'mlp_norm/scale',
}
_FROM, _LORA, _NORMS = 'params/block/', 'params/steps/lora/', 'params/steps/norms/'


class SharedWeights:
  """Weights of a model with shared layers, from those of a vanilla model, leaf by leaf in float32.

  The first and the last layer are kept where the sharing scheme keeps them, and every slot of the shared
  block is made of layers of the original, as `source_layers` says. Embedding, head and final norm are the
  original's. Routers are not among the leaves: they begin fresh.

  With `lora_rank` the low-rank changes that each step has of its own are the best approximation (SVD) to what sharing lost
  of that step's own layer of the original. Where norm scales are shared too, they are folded into the
  kernels after them, so that nothing is lost beside the kernels. Where they are not, each step has the
  scales of its own layer. So at full rank the model is the original, but for what no step has of its own: biases,
  norms of queries and keys, and whether a layer rotates them. A recursion encoding begins at zero. Changes that are the
  same in all recursions are not among the leaves: they begin fresh, and change nothing yet.

  Args:
    config: of the model to begin with.
    source: a vanilla model's.
    method: one of METHODS.
    seed: of method 'random'.

  Raises:
    ConfigError: the source is not vanilla, its layers are of other shape, they are too few, or those that rotate
      queries and keys are not those of the config.
  """

  def __init__(self, config: ModelConfig, source: Weights, method: str, seed: int = 0):
    _check(config, source.config)
    self.config, self._source = config, merging.without_adapters(source)
    self._sources = source_layers(config, source.config.num_layers, method, seed)
    _check_rotation(config, source.config, method, self._sources)
    self._folds = config.own_lora and config.share_norms
    shapes = names.shapes(config)
    fresh = ('params/router/', 'params/aux_router/', 'params/lora/', 'routing/')
    self.shapes = {path: shape for path, shape in shapes.items() if not path.startswith(fresh)}
    self.dtypes = dict.fromkeys(self.shapes, np.dtype(np.float32))
    self._second: tuple[str, np.ndarray] | None = None

  def leaf(self, path: str) -> np.ndarray:
    """One leaf, float32."""
    _, part, *name = path.split('/')
    if part in ('first', 'block', 'last'):
      slots = self._slots[part]
      value = self._unique_layers('/'.join(name), slots)
      return value if part == 'block' else value[0]
    if path.startswith(_LORA):
      return self._lora(path)
    if path.startswith(_NORMS):
      return self._norms(path)
    if path == 'params/steps/encoding/embedding':
      return np.zeros(self.shapes[path], np.float32)
    return self._source.leaf(path).astype(np.float32)

  def leaves(self) -> Iterator[tuple[str, np.ndarray]]:
    """(path, leaf) of all, one at a time."""
    for path in self.shapes:
      yield path, self.leaf(path)

  @cached_property
  def _slots(self) -> dict[str, list[int]]:
    """Numbers of the unique layers in each part of the model."""
    slots: dict[str, list[int]] = {}
    for slot in range(self.config.num_unique_layers):
      slots.setdefault(sharing.place(self.config, slot).part, []).append(slot)
    return slots

  def _unique_layers(self, name: str, slots: Sequence[int]) -> np.ndarray:
    """A leaf of some unique layers, on a leading axis: each the mean of the layers that it is made of."""
    ours, folded = self._source.leaf(_FROM + name), self._folded(name)
    value = np.empty((len(slots), *self.shapes['params/block/' + name][1:]), np.float32)
    for row, slot in enumerate(slots):
      is_shared = sharing.place(self.config, slot).part == 'block'
      rows = [folded(ours, layer) if is_shared else ours[layer] for layer in self._sources[slot]]
      value[row] = rows[0] if len(rows) == 1 else np.mean(rows, axis=0, dtype=np.float64)
    return value

  def _block(self, name: str) -> np.ndarray:
    return self._unique_layers(name, self._slots['block'])

  def _folded(self, name: str):
    """(leaf of all layers, layer) -> the layer's part, in float32, with the norm's scale folded if it is to be."""
    if not self._folds:
      return lambda leaf, layer: leaf[layer].astype(np.float32)
    if name in _NORM_BEFORE.values():
      return lambda leaf, layer: np.ones(leaf.shape[1:], np.float32)
    if name not in _NORM_BEFORE:
      return lambda leaf, layer: leaf[layer].astype(np.float32)
    scales = self._source.leaf(_FROM + _NORM_BEFORE[name]).astype(np.float32)
    return lambda leaf, layer: scales[layer][:, None] * leaf[layer].astype(np.float32)

  def _lora(self, path: str) -> np.ndarray:
    """`down` or `up` of one kernel; both come of one decomposition, and the second is kept until it is asked for."""
    if self._second is not None and self._second[0] == path:
      value, self._second = self._second[1], None
      return value
    name, part = path.removeprefix(_LORA).split('/')
    kernel = next(
      f'{target}/kernel' for target in relaxation.LORA_TARGETS['all'] if target.replace('/', '_') == name
    )
    shared, original, folded = self._block(kernel), self._source.leaf(_FROM + kernel), self._folded(kernel)
    rank, scale = self.config.lora_rank, self.config.lora_alpha / self.config.lora_rank
    both = {each: np.zeros(self.shapes[f'{_LORA}{name}/{each}'], np.float32) for each in ('down', 'up')}
    for (step, layer), source in self._steps:
      down, up = relaxation.low_rank(folded(original, source) - shared[layer], rank, scale)
      full = up.shape[0]  # a rank above that of the kernel adds nothing
      both['down'][step, layer, :, :full], both['up'][step, layer, :full] = down, up
    other = 'up' if part == 'down' else 'down'
    self._second = f'{_LORA}{name}/{other}', both[other]
    return both[part]

  def _norms(self, path: str) -> np.ndarray:
    """Changes of the norm scales, (R, N, D)."""
    name = path.removeprefix(_NORMS)
    shared, original = self._block(name), self._source.leaf(_FROM + name).astype(np.float32)
    value = np.empty(self.shapes[path], np.float32)
    for (step, layer), source in self._steps:
      value[step, layer] = original[source] - shared[layer]
    return value

  @cached_property
  def _steps(self) -> list[tuple[tuple[int, int], int]]:
    """((step, layer of the block), layer of the original) of every layer within the recursions."""
    config = self.config
    mapped = depths(config, self._source.config.num_layers)
    seen: dict[int, int] = {}
    steps = []
    for depth, slot in enumerate(sharing.layer_slots(config)):
      part, layer = sharing.place(config, slot)
      if part == 'block':
        step = seen[slot] = seen.get(slot, -1) + 1
        steps.append(((step, layer), mapped[depth]))
    return steps


def depths(config: ModelConfig, num_layers: int) -> list[int]:
  """Layer of a vanilla model of so many that stands at each depth of the unrolled model.

  The same where both are equally deep. Else the layers between the ends that stay are taken at equal
  distances and rounded, so that some are left out (as the authors do) or come twice.
  """
  ends = _kept_ends(config)
  middle = np.linspace(ends, num_layers - 1 - ends, config.num_layers - 2 * ends)
  return [*[0] * ends, *(round(float(layer)) for layer in middle), *[num_layers - 1] * ends]


def source_layers(config: ModelConfig, num_layers: int, method: str, seed: int = 0) -> list[tuple[int, ...]]:
  """Layers of a vanilla model that each parameter slot is made of; several are averaged.

  Between the ends that stay: 'stepwise' takes layers at equal distances, 'lower' the first, 'upper' the
  last, 'random' a random choice in order (the authors' four), 'average' the mean of all that a slot
  stands for in the unrolled model.

  Raises:
    ConfigError: there are fewer layers than slots.
  """
  if method not in METHODS:
    raise ConfigError(f'init.method={method} is not one of {", ".join(METHODS)}')
  ends = _kept_ends(config)
  depth = config.num_unique_layers - 2 * ends
  first, last = ends, num_layers - 1 - ends
  if last - first + 1 < depth or num_layers < 1:
    raise ConfigError(
      f'model.num_layers={config.num_layers} with model.sharing={config.sharing} has a block of {depth} layers, but '
      f'the {num_layers} layers of init.source leave only {max(0, last - first + 1)} for it; lower model.num_layers'
    )
  if method == 'average':
    mapped, of_slot = depths(config, num_layers), [[] for _ in range(config.num_unique_layers)]
    for layer, slot in zip(mapped, sharing.layer_slots(config), strict=True):
      of_slot[slot].append(layer)
    return [tuple(layers) for layers in of_slot]
  picks = {
    'stepwise': lambda: [round(float(layer)) for layer in np.linspace(first, last, depth)],
    'lower': lambda: range(first, first + depth),
    'upper': lambda: range(last - depth + 1, last + 1),
    'random': lambda: sorted(
      first + np.random.default_rng(seed).choice(last - first + 1, depth, replace=False)
    ),
  }[method]()
  return [*[(0,)] * ends, *((int(layer),) for layer in picks), *[(num_layers - 1,)] * ends]


def _kept_ends(config: ModelConfig) -> int:
  """Layers at either end that the sharing scheme keeps as they are, in a vanilla model as in those that share."""
  return 1 if config.sharing.startswith('middle') else 0


def _check(config: ModelConfig, source: ModelConfig) -> None:
  if source.kind != 'vanilla' or source.kv == 'shared':
    raise ConfigError(
      f'init.source has a model of model.kind={source.kind}, model.kv={source.kv}; only vanilla models, whose layers '
      f'all have parameters, keys and values of their own, can be begun from'
    )
  fields = (*_SAME, *_OF_SCALING.get(source.rope_scaling, ()))
  different = {name: (getattr(config, name), getattr(source, name)) for name in fields}
  different = {_SET_BY.get(name, name): pair for name, pair in different.items() if pair[0] != pair[1]}
  if different:
    text = ', '.join(f'model.{name}={ours}' for name, (ours, _) in different.items())
    remedy = ' '.join(f'--config.model.{name}={theirs}' for name, (_, theirs) in different.items())
    raise ConfigError(f'{text} cannot begin from init.source, whose layers are others; set {remedy}')


def _check_rotation(
  config: ModelConfig, source: ModelConfig, method: str, sources: list[tuple[int, ...]]
) -> None:
  """A slot rotates as the layers do that it is made of; raises ConfigError where they or the config disagree."""
  rotates = [{layer not in source.no_rope_layers for layer in layers} for layers in sources]
  if mixed := next((layers for layers, kinds in zip(sources, rotates, strict=True) if len(kinds) > 1), None):
    without = [layer for layer in mixed if layer in source.no_rope_layers]
    raise ConfigError(
      f'init.method={method} would average layers {", ".join(map(str, mixed))} of init.source, of which '
      f'{", ".join(map(str, without))} do not rotate queries and keys and the others do: their weights have no common '
      f'meaning; use init.method=stepwise'
    )
  expected = tuple(slot for slot, kinds in enumerate(rotates) if kinds == {False})
  if set(config.no_rope_layers) != set(expected):
    flag = ','.join(map(str, expected)) + (',' if len(expected) == 1 else '')
    raise ConfigError(
      f'model.no_rope_layers={config.no_rope_layers} cannot begin from init.source with init.method={method}, which '
      f'makes {expected} of layers that do not rotate queries and keys; set --config.model.no_rope_layers="({flag})"'
    )
