"""The weights of a model as the beginning of another training of the same model, such as instruction tuning."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from mor_jax.config import ConfigError, ModelConfig
from mor_jax.interop import merging, names
from mor_jax.interop.weights import Weights

_LORA = ('lora_rank', 'lora_alpha', 'lora_targets', 'lora_sharing', 'lora_layers')
# What may be another than before: how the model is computed, initialised and taught, and which tokens go on.
_MAY_DIFFER = (
  *_LORA,
  *('init', 'init_std', 'embed_std', 'dtype'),
  *('remat', 'attention', 'unroll_layers', 'dispatch'),
  *('threshold_slack', 'capacities', 'selection', 'capacity_warmup_steps'),
  *('ema_decay', 'random_router', 'random_gate', 'token_capacity_factor'),
  *('router_target', 'benefit_margin', 'benefit_rows', 'depth_prior_weight'),
  *('router_noise', 'router_z_loss_weight', 'aux_loss_weight', 'balancing'),
  *('bias_update_rate', 'balance_warmup_steps', 'balancing_loss_weight'),
)
_MAY_BE_NEW = ('params/steps/lora/', 'params/lora/')  # begin with a change of nothing


class SameModel:
  """Weights of the same model, leaf by leaf in float32; routers and what they keep come along.

  Low-rank changes of another form than the source's are not among the leaves: they begin fresh, on kernels into which
  the source's are merged.

  Args:
    config: of the model to begin with.
    source: the weights.

  Raises:
    ConfigError: the models differ in a setting that their weights depend on.
  """

  def __init__(self, config: ModelConfig, source: Weights):
    _check(config, source.config)
    if any(getattr(config, name) != getattr(source.config, name) for name in _LORA):
      source = merging.without_adapters(source)
    self.config, self._source = config, source
    shapes = names.shapes(config)
    problems = [
      f'{path} {shapes.get(path, "is not in this model")}'
      for path, shape in source.shapes.items()
      if shapes.get(path) != tuple(shape)
    ]
    problems += [
      f'{path} is not in init.source'
      for path in shapes
      if path not in source.shapes and not path.startswith(_MAY_BE_NEW)
    ]
    if problems:
      raise ConfigError(f'init.source has other parameters than this model: {"; ".join(problems[:5])}')
    self.shapes = {path: shape for path, shape in shapes.items() if path in source.shapes}
    self.dtypes = dict.fromkeys(self.shapes, np.dtype(np.float32))

  def leaf(self, path: str) -> np.ndarray:
    """One leaf, float32."""
    return self._source.leaf(path).astype(np.float32)

  def leaves(self) -> Iterator[tuple[str, np.ndarray]]:
    """(path, leaf) of all, one at a time."""
    for path in self.shapes:
      yield path, self.leaf(path)


def _check(config: ModelConfig, source: ModelConfig) -> None:
  fields = [field.name for field in dataclasses.fields(config) if field.name not in _MAY_DIFFER]
  different = {name: (getattr(config, name), getattr(source, name)) for name in fields}
  different = {name: pair for name, pair in different.items() if pair[0] != pair[1]}
  if different:
    ours = ', '.join(f'model.{name}={pair[0]}' for name, pair in different.items())
    remedy = ' '.join(f'--config.model.{name}={pair[1]}' for name, pair in different.items())
    raise ConfigError(
      f'{ours} cannot begin from init.source: a model whose layers share parameters, or keys and '
      f'values, begins only the same model; set {remedy}'
    )
