"""The validation between training steps."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jax.sharding import Mesh

from mor_jax.config import Config
from mor_jax.data import loader
from mor_jax.evaluation import nll
from mor_jax.model.transformer import Transformer
from mor_jax.parallel import mesh as mesh_lib


def make_validation(
  model: Transformer,
  config: Config,
  mesh: Mesh,
  dataset: loader.Dataset,
  over: Callable[[Iterable[Any]], Iterator[Any]],
) -> Callable[[Any], dict[str, float]]:
  """Variables -> validation/nll, validation/bits_per_byte and router metrics, under top-k routing.

  Args:
    over: goes over the batches, and may end or watch that.
  """
  nll_step = nll.make_nll_step(model, config, mesh)
  rows = config.train.global_batch // config.train.accumulation
  split = dataset.manifest.splits['validation']

  def validate(variables: Any) -> dict[str, float]:
    batches = loader.validation_batches(dataset, rows, config.train.eval_rows, *mesh_lib.data_hosts(mesh))
    metrics = nll.evaluate(nll_step, variables, over(batches), mesh)
    metrics['bits_per_byte'] = nll.bits_per_byte(metrics['nll'], split.tokens, split.bytes)
    return {f'validation/{name}': value for name, value in metrics.items()}

  return validate
