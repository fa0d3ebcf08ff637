"""One optimiser step: gradients of all micro-batches, one update, metrics."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh

from mor_jax.config import Config
from mor_jax.data.packing import ROW_ARRAYS
from mor_jax.model import router
from mor_jax.model.transformer import parameter_axes
from mor_jax.parallel import mesh as mesh_lib
from mor_jax.parallel import rules
from mor_jax.training import loss as loss_lib
from mor_jax.training import targets as targets_lib
from mor_jax.training import trainable
from mor_jax.training.distillation import Teacher
from mor_jax.training.optimizer import learning_rate_schedule
from mor_jax.training.state import TrainState

_MADE = itertools.count()
TrainStep = Callable[..., tuple[TrainState, dict[str, Any]]]


def make_train_step(
  model: nn.Module,
  config: Config,
  optimizer: optax.GradientTransformation,
  mesh: Mesh,
  teacher: Teacher | None = None,
) -> TrainStep:
  """The jitted step (state, batch) -> (state, metrics); the state given is donated.

  With a `teacher` it takes the teacher's parameters as a third argument, which is not donated.

  A batch holds int32 arrays (A, B, T): A = `train.accumulation` micro-batches. Metrics are
  those of the loss (`make_loss`), of the global batch, and grad_norm (before clipping; also by
  module, grad_norm/NAME, of what is trained), learning_rate, skipped and halted (as in `TrainState`), scalars.

  Trained are the parameters of `train.trainable`, for which the optimiser must have been made.

  An update whose loss or gradient is not finite is not applied: the first `train.max_skipped` are
  left out (`train.on_nonfinite=skip`), another one halts the state for good.
  """
  if bool(config.distill.weight) != (teacher is not None):
    raise ValueError(
      f'distill.weight={config.distill.weight} goes with a teacher, and a teacher with a weight'
    )
  schedule = learning_rate_schedule(config.train)
  may_skip = config.train.max_skipped if config.train.on_nonfinite == 'skip' else 0
  loss = loss_lib.make_loss(
    model.apply, config.model, config.train.loss_chunk, mesh, teacher, config.train.recursions
  )

  def loss_of_trained(trained, frozen, *arguments):
    return loss(trainable.merge(trained, frozen), *arguments)

  gradient = jax.value_and_grad(loss_of_trained, has_aux=True)
  names = parameter_axes(config.model)

  def train_step(state: TrainState, batch_ABT: targets_lib.Batch, *theirs):
    batch_ABT = targets_lib.visible_batch(batch_ABT, config.data.segment_mask)
    key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
    if config.train.readout_rows:
      batch_ABT['most'] = _row_limits(config, jax.random.fold_in(key, 2), batch_ABT['tokens'].shape[:2])
    whole = loss_lib.normalizers(config.model, batch_ABT)
    trained, frozen = trainable.split(config.train.trainable, state.params)
    grads, metrics = _add_up(gradient, (trained, frozen), state.routing, batch_ABT, whole, key, *theirs)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = trainable.merge(optax.apply_updates(trained, updates), frozen)
    routing = router.update_state(config.model, state.routing, metrics.get('counts', {}), state.step)
    metrics |= _grad_norms(grads)
    metrics['learning_rate'] = jnp.asarray(schedule(state.step - state.skipped), jnp.float32)
    new_state = TrainState(state.step + 1, params, opt_state, routing, state.skipped, state.halted)
    is_finite = jnp.isfinite(metrics['loss']) & jnp.isfinite(metrics['grad_norm'])
    new_state = _only_finite(state, new_state, is_finite, may_skip)
    metrics |= {'skipped': new_state.skipped, 'halted': new_state.halted}
    return rules.laid_out(mesh, new_state, names), rules.laid_out(mesh, metrics, {})

  return jax.jit(rules.on_mesh(mesh, _traced_once(train_step)), donate_argnums=0)


def _row_limits(config: Config, key: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """Recursions (A, B) that each row's tokens take at most: all, or for `readout_rows` of them a random number."""
  all_of_them = config.train.recursions or config.model.recursions
  share, number = jax.random.split(key)
  drawn = jax.random.randint(number, shape, 1, all_of_them + 1)
  return jnp.where(jax.random.uniform(share, shape) < config.train.readout_rows, drawn, all_of_them)


def _traced_once(function: Callable) -> Callable:
  """The function, which fails when it is traced again: a step that is compiled anew during a run takes minutes."""

  @functools.wraps(function)
  def counted(*args):
    return function(*args)

  # Chex counts by source and name, so that two steps in one process need two names.
  counted.__name__ = f'{function.__name__}_{next(_MADE)}'
  guarded = chex.assert_max_traces(counted, n=1)
  guarded.__name__ = function.__name__
  return guarded


def _only_finite(old: TrainState, new: TrainState, is_finite: jax.Array, may_skip: int) -> TrainState:
  """The new state if its update is finite; else the old one, one step on or, with nothing left to skip, halted.

  The choice is made on the device, since the host sees a loss only after later steps were dispatched.
  """
  halted = old.halted | (~is_finite & (old.skipped >= may_skip))
  chosen = jax.tree.map(lambda one, other: jnp.where(is_finite & ~halted, one, other), new, old)
  return chosen.replace(step=old.step + ~halted, skipped=old.skipped + (~is_finite & ~halted), halted=halted)


def _grad_norms(grads: Any) -> dict[str, jax.Array]:
  """'grad_norm' of everything, and 'grad_norm/NAME' of each module: 'embed', 'block.attention' (all its layers), ..."""
  modules = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
    names = [entry.key for entry in path[:2]]
    modules.setdefault('.'.join(names) if names[0] in ('first', 'block', 'last') else names[0], []).append(
      leaf
    )
  norms = {f'grad_norm/{name}': optax.tree.norm(leaves) for name, leaves in modules.items()}
  return {'grad_norm': optax.tree.norm(grads), **norms}


def _add_up(
  gradient: Callable,
  params: tuple[Any, Any],
  routing: Any,
  batch_ABT: targets_lib.Batch,
  whole: loss_lib.Normalizers,
  key: jax.Array,
  *theirs: Any,
) -> tuple[Any, dict[str, Any]]:
  """Sums of the gradients and of the loss's parts over the micro-batches, run one after the other.

  Args:
    params: trained, of which the gradients are, and frozen.
  """
  count = batch_ABT['tokens'].shape[0]
  if count == 1:
    batch_BT = jax.tree.map(lambda rows: rows[0], batch_ABT)
    (_, parts), grads = gradient(*params, batch_BT, whole, routing, key, *theirs)
    return grads, parts

  def add(total, batch_and_key):
    batch_BT, own_key = batch_and_key
    (_, parts), grads = gradient(*params, batch_BT, whole, routing, own_key, *theirs)
    return jax.tree.map(jnp.add, total, grads), parts

  zeros = jax.tree.map(jnp.zeros_like, params[0])
  grads, parts_A = jax.lax.scan(add, zeros, (batch_ABT, jax.random.split(key, count)))
  return grads, jax.tree.map(lambda part_A: part_A.sum(axis=0), parts_A)


def split_batch(batch: dict[str, np.ndarray], micro_batches: int) -> dict[str, np.ndarray]:
  """Rows (A * B, T) as A micro-batches (A, B, T)."""
  return {name: rows.reshape(micro_batches, -1, rows.shape[-1]) for name, rows in batch.items()}


def abstract_batch(
  config: Config, mesh: Mesh, arrays: Sequence[str] = ROW_ARRAYS
) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes and sharding of the batches that the step takes, to compile it before there is data.

  Args:
    arrays: names of what the rows have (`loader.train_arrays`).
  """
  accumulation = config.train.accumulation
  shape = (accumulation, config.train.global_batch // accumulation, config.data.seq_len)
  spec = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=mesh_lib.micro_batch_sharding(mesh))
  return dict.fromkeys(arrays, spec)
