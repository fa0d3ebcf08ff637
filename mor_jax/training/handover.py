"""The state of a training at the border of two stages, or after a change of what is trained (`train.stages`).

A stage has moments for what it trains and no others. What goes on being trained keeps its own, what begins gets
moments of zero whose bias correction counts from there, and of what ends nothing stays.
"""

from collections.abc import Callable

import jax
import optax
from jax.sharding import Mesh

from mor_jax.config import Config
from mor_jax.model import flops
from mor_jax.model.transformer import Transformer
from mor_jax.parallel import device_memory, rules
from mor_jax.training import trainable
from mor_jax.training.optimizer import make_optimizer
from mor_jax.training.state import TrainState, abstract_state, initializer
from mor_jax.units import byte_count, quantity


def begins_stage(config: Config, done: int) -> bool:
  """Whether other parameters are trained after `done` updates than before."""
  return done > 0 and _past(config, done) != _past(config, done - 1)


def abstract_after(config: Config, mesh: Mesh, done: int) -> TrainState:
  """Shapes and shardings of the state after `done` updates, as the stage that made the last of them leaves it."""
  return abstract_state(initializer_after(config, mesh, done))


def initializer_after(config: Config, mesh: Mesh, done: int) -> Callable[[jax.Array], TrainState]:
  """The function from a seed to a fresh state with the moments that there are after `done` updates."""
  optimizer = make_optimizer(config.train, config.model, max(done - 1, 0))
  return initializer(Transformer(config.model), optimizer, mesh, config.data.seq_len)


def compile_entry(config: Config, mesh: Mesh, done: int) -> Callable[[TrainState], TrainState]:
  """The compiled function from the state that a stage leaves after `done` updates to that of the next; donates it."""
  before, after = (abstract_after(config, mesh, count) for count in (done, done + 1))
  optimizer = make_optimizer(config.train, config.model, done)
  layout = jax.tree.map(lambda leaf: leaf.sharding, after)
  jitted = jax.jit(
    rules.on_mesh(mesh, lambda state: _carried_over(optimizer, state)), donate_argnums=0, out_shardings=layout
  )
  return jitted.lower(before).compile()


def renewed(config: Config, mesh: Mesh, done: int, state: TrainState) -> TrainState:
  """The state after `done` updates with moments as at the beginning; the schedule of the learning rate goes on.

  For runs that resume with other parameters trained than before, whose moments there are none of.

  Args:
    state: without the optimiser's; donated.
  """
  optimizer = make_optimizer(config.train, config.model, max(done - 1, 0))

  def is_schedule(node):
    return isinstance(node, optax.ScaleByScheduleState)

  def renew(state):
    updates = state.step - state.skipped
    opt_state = jax.tree.map(
      lambda node: node._replace(count=updates) if is_schedule(node) else node,
      optimizer.init(state.params),
      is_leaf=is_schedule,
    )
    return state.replace(opt_state=opt_state)

  layout = jax.tree.map(lambda leaf: leaf.sharding, abstract_after(config, mesh, done))
  return jax.jit(rules.on_mesh(mesh, renew), donate_argnums=0, out_shardings=layout)(state)


def _carried_over(optimizer: optax.GradientTransformation, state: TrainState) -> TrainState:
  """The state with the optimiser's moments: those that it has already, and zeros."""
  old = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(state.opt_state)}
  opt_state = jax.tree_util.tree_map_with_path(
    lambda path, leaf: old.get(jax.tree_util.keystr(path), leaf), optimizer.init(state.params)
  )
  return state.replace(opt_state=opt_state)


def _past(config: Config, done: int) -> list[str]:
  return trainable.past_stages(config.train, done)


# ---- what it takes ----


def largest(config: Config) -> tuple[int, str]:
  """(updates done before, what is trained) of the stage that trains most: the one that decides on memory."""
  return max(
    trainable.stages_of(config.train), key=lambda stage: trainable.count_parameters(config.model, stage[1])
  )


def describe(config: Config, mesh: Mesh) -> str:
  """What is trained, of how many parameters, and the memory that the optimiser's state takes."""
  planned, all_of_them = trainable.stages_of(config.train), flops.count_parameters(config.model).total
  parts = []
  for first, name in planned:
    begin = f'from step {first + 1} ' if len(planned) > 1 else ''
    trained = trainable.count_parameters(config.model, name)
    parts.append(f'{begin}{name}' + (f' ({quantity(trained)} parameters)' if trained < all_of_them else ''))
  first, name = largest(config)
  size = device_memory.bytes_on_a_device(abstract_after(config, mesh, first + 1).opt_state)
  of_stage = f' (of {name}, the most)' if len(planned) > 1 else ''
  return f'{", ".join(parts)}; optimiser state {byte_count(size)} a device{of_stage}'
