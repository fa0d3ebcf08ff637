"""Stands in for mor_jax.train in tests of sweeps: quick, and leaves the files that a sweep looks at.

Takes 20 steps of --step_seconds, resumes after the last line of metrics.jsonl, ends with 143 on SIGTERM after
saving, and fails at step 5 if the run's learning rate is 1e9. With --best_rate its loss grows with the distance
of the learning rate from it. Every start appends a line to `starts`.
"""

import json
import math
import os
import pathlib
import signal
import sys
import time

STEPS = 20


def main(words: list[str]) -> int:
  flags = dict(word.removeprefix('--').split('=', 1) for word in words)
  folder = pathlib.Path(flags['workdir'])
  folder.mkdir(parents=True, exist_ok=True)
  print(f'training {flags["config.name"]} on cores {sorted(os.sched_getaffinity(0))}')
  print(f'GPUs {os.environ.get("CUDA_VISIBLE_DEVICES")}', flush=True)
  told = []
  signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
  with (folder / 'starts').open('a') as file:
    file.write(f'{os.getpid()}\n')
  metrics = folder / 'metrics.jsonl'
  done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
  for step in range(done + 1, STEPS + 1):
    time.sleep(float(flags.get('step_seconds', '0.05')))
    if float(flags.get('config.train.learning_rate', 0)) == 1e9 and step == 5:
      print('error: loss is nan')
      return 1
    with metrics.open('a') as file:
      file.write(json.dumps({'step': step}) + '\n')
    if told:
      return 143
  (folder / 'data.json').write_text(json.dumps({'tokenizer_digest': flags['config.name'].partition(',')[0]}))
  nll = 2.0 + float(flags.get('config.train.seed', 0))
  if 'best_rate' in flags:
    nll += math.log2(float(flags['config.train.learning_rate']) / float(flags['best_rate'])) ** 2
  result = {'validation/nll': nll, 'validation/bits_per_byte': nll, 'tokens': 1, 'train_flops': 1}
  result |= {'parameters': 1, 'non_embedding_parameters': 1, 'goodput': {'step': 3.0, 'compile': 1.0}}
  (folder / 'summary.json').write_text(json.dumps(result))
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
