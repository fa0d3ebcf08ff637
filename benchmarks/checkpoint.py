"""How long a checkpoint blocks the training: python -m benchmarks.checkpoint [--megabytes=1000] [--rounds=5]

Saves a state of that size while steps continue. Compares the time until `save` returns with the time until the
checkpoint is written, hashed and published, and the steps during a save with steps without one.
Writes benchmarks/results/checkpoint.*.
"""

import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags

from benchmarks import results
from mor_jax import cli
from mor_jax.checkpoints.checkpoint import Checkpoints
from mor_jax.config import CheckpointConfig
from mor_jax.training.state import TrainState

FLAGS = flags.FLAGS
flags.DEFINE_integer('megabytes', 1000, 'size of the state')
flags.DEFINE_integer('rounds', 5, 'checkpoints that are timed')
flags.DEFINE_string('folder', None, 'disk to write to; default: the folder for temporary files')


@jax.jit
def step(state: TrainState) -> TrainState:
  """Updates the whole state, as an optimiser does."""
  return state.replace(step=state.step + 1, params=jax.tree.map(lambda leaf: leaf * 1.0001, state.params))


def main() -> None:
  """Measures and writes the table."""
  leaves = 24
  size = FLAGS.megabytes * 250_000 // leaves
  params = {f'layer_{i}': jax.random.normal(jax.random.key(i), (size,)) for i in range(leaves)}
  state = step(TrainState(jnp.int32(0), params, ()))
  blocked, complete, alone, meanwhile = [], [], [], []

  def timed_step() -> float:
    nonlocal state
    begin = time.perf_counter()
    state = jax.block_until_ready(step(state))
    return time.perf_counter() - begin

  with (
    tempfile.TemporaryDirectory(dir=FLAGS.folder) as folder,
    Checkpoints(Path(folder) / 'checkpoints', CheckpointConfig(keep=1)) as checkpoints,
  ):
    for number in range(1, FLAGS.rounds + 2):
      alone += [timed_step() for _ in range(5)]
      begin = time.perf_counter()
      checkpoints.save(number, state)
      blocked.append(time.perf_counter() - begin)
      while checkpoints.latest_step != number:
        meanwhile.append(timed_step())
      complete.append(time.perf_counter() - begin)
      checkpoints.wait()
    read = time.perf_counter()
    checkpoints.newest_good()
    read = time.perf_counter() - read
  blocked, complete = blocked[1:], complete[1:]  # the first one warms up
  share = statistics.median(a / b for a, b in zip(blocked, complete, strict=True))
  columns = ['state, MB', 'save returns after, s', 'complete after, s', 'blocked']
  columns += ['steps meanwhile', 'ms each', 'ms alone', 'verified in, s']
  row = [
    FLAGS.megabytes,
    f'{statistics.median(blocked):.3f}',
    f'{statistics.median(complete):.2f}',
    f'{share:.1%}',
    f'{len(meanwhile) / (FLAGS.rounds + 1):.0f}',
    f'{1e3 * statistics.median(meanwhile):.0f}',
    f'{1e3 * statistics.median(alone):.0f}',
    f'{read:.2f}',
  ]
  print(results.keep('checkpoint', columns, [row], {'rounds': FLAGS.rounds}))


if __name__ == '__main__':
  cli.run(main, __doc__, with_config=False)
