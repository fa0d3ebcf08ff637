"""What one checkout does in `before_after`; run by it, in that checkout's folder, as a process of its own.

Uses only what checkouts have in common: `benchmarks.training.TrainingStep` and `benchmarks.decode.Contender`.
"""

import sys
import time

from absl import flags

from benchmarks import sides

FLAGS = flags.FLAGS


def _training(model: str):
  from benchmarks import train_step, training  # not both benchmarks: their flags have the same names

  FLAGS(sys.argv[:1])
  begin = time.process_time()
  change = {'kind': 'vanilla'} if model == 'vanilla' else {'kind': 'mor', **train_step.MODELS[model]}
  made = training.TrainingStep(training.base_config(**change))
  compile_cpu_seconds = time.process_time() - begin
  memory = made.compiled.memory_analysis()
  about = {
    'compile_cpu_seconds': compile_cpu_seconds,
    'bytes': memory.argument_size_in_bytes + memory.temp_size_in_bytes,
  }

  def answer(turn: int):
    begin = time.process_time()
    seconds, loss = made.run(turn)
    return {'seconds': seconds, 'cpu_seconds': time.process_time() - begin, 'loss': loss}

  return about, answer


def _decoding(model: str):
  from benchmarks import decode

  FLAGS(sys.argv[:1])
  recursions = 1 if model == 'vanilla' else 3
  made = decode.Contender(14, recursions, FLAGS.slots, max(1, FLAGS.slots // 4))
  made.run(seconds=1.0)

  def answer(ticks: int):
    found = made.run(ticks=ticks)
    return {
      'seconds': 1 / found['tokens_per_second'],
      'cpu_seconds': 1 / found['tokens_per_cpu_second'],
    }

  return {}, answer


if __name__ == '__main__':
  what, name = sys.argv[1:]
  sides.serve(lambda: {'training': _training, 'decoding': _decoding}[what](name))
