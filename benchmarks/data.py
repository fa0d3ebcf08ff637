"""Speed and memory of the data pipeline: python -m benchmarks.data --corpus='texts/**/*.txt' --tokenizer=tokenizer.json

Makes three measurements. Preparation: tokenises the same text with `tokenizers` alone (encode_batch_fast, all
cores) and with mor_jax, in turns, and reports the ratio. Loading: tokens/s of the loader from a warm page cache,
with rows of 2,048 tokens and for the tiny model, whose training step runs in the same process. Memory: that of
preparation, summed over all processes, beyond that of a process that only loads the tokenizer. Run it from the
root of the repository.
"""

import argparse
import json
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable

MB = 1e6


def main() -> None:
  """Runs the three measurements, prints a table and writes results/data.json."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--corpus', required=True, help='pattern of text files')
  parser.add_argument('--tokenizer', required=True, help='a tokenizer.json')
  parser.add_argument('--megabytes', type=float, default=64, help='text prepared in the speed measurement')
  parser.add_argument(
    '--memory_megabytes', type=float, default=500, help='text prepared to measure memory; 0: no'
  )
  parser.add_argument('--repeats', type=int, default=3, help='of the speed measurement')
  arguments = parser.parse_args()
  result = {}

  def measured(part: dict[str, float]) -> None:
    print(json.dumps(part), flush=True)  # the whole takes minutes
    result.update(part)

  with tempfile.TemporaryDirectory() as scratch:
    corpus = repeated(arguments.corpus, pathlib.Path(scratch, 'speed.jsonl'), arguments.megabytes)
    measured(prepare_speed(corpus, arguments.tokenizer, scratch, arguments.repeats))
    measured(loader_speed(f'{scratch}/0'))
    measured(tiny_speed(scratch))
    if arguments.memory_megabytes:
      corpus = repeated(arguments.corpus, pathlib.Path(scratch, 'memory.jsonl'), arguments.memory_megabytes)
      measured(prepare_memory(corpus, arguments.tokenizer, scratch, arguments.memory_megabytes))
  from benchmarks import results

  rows = [
    [name.replace('_', ' '), f'{value:,.4g}' if value < 1000 else f'{value:,.0f}']
    for name, value in result.items()
  ]
  asked = {name: value for name, value in vars(arguments).items() if name not in ('corpus', 'tokenizer')}
  print(results.keep('data', ['what', 'measured'], rows, asked, figures=result))


def repeated(pattern: str, path: pathlib.Path, megabytes: float) -> pathlib.Path:
  """Writes the texts as JSON lines in documents of 8,000 characters, repeated up to `megabytes`."""
  import glob

  texts = [
    pathlib.Path(name).read_text(encoding='utf-8') for name in sorted(glob.glob(pattern, recursive=True))
  ]
  pieces = [text[i : i + 8000] for text in texts for i in range(0, len(text), 8000)]
  size = 0
  with path.open('w') as file:
    while size < megabytes * MB:
      for i, piece in enumerate(pieces):
        file.write(json.dumps({'text': piece, 'i': i}) + '\n')
        size += len(piece.encode())
        if size >= megabytes * MB:
          break
  return path


def settings(corpus: pathlib.Path, tokenizer: str, cache_dir: str) -> list[str]:
  """The command that prepares the dataset of `corpus`."""
  values = {'source': f'files:{corpus}', 'tokenizer': tokenizer, 'seq_len': 2048, 'cache_dir': cache_dir}
  return [sys.executable, '-m', 'mor_jax.prepare'] + [f'--config.data.{k}={v}' for k, v in values.items()]


def prepare_speed(corpus: pathlib.Path, tokenizer: str, scratch: str, repeats: int) -> dict[str, float]:
  """MB/s of both sides, in alternation; that of mor_jax as it reports it (without start-up) and with start-up."""
  import tokenizers

  backend = tokenizers.Tokenizer.from_file(tokenizer)
  texts = [json.loads(line)['text'] for line in corpus.open()]
  megabytes = sum(len(text.encode()) for text in texts) / MB
  alone, ours, whole, cpu = [], [], [], []
  for repeat in range(repeats):
    cpu_alone = cpu_seconds(resource.RUSAGE_SELF)
    begin = time.perf_counter()
    for first in range(0, len(texts), 500):  # 4 MB at once: all at once would need gigabytes
      backend.encode_batch_fast(texts[first : first + 500], add_special_tokens=False)
    alone.append(megabytes / (time.perf_counter() - begin))
    cpu_alone = cpu_seconds(resource.RUSAGE_SELF) - cpu_alone
    cpu_ours = cpu_seconds(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    output = subprocess.run(
      settings(corpus, tokenizer, f'{scratch}/{repeat}'), capture_output=True, text=True, check=True
    ).stdout
    whole.append(megabytes / (time.perf_counter() - begin))
    cpu.append(cpu_alone / (cpu_seconds(resource.RUSAGE_CHILDREN) - cpu_ours))
    ours.append(megabytes / float(output.split('written in ')[1].split()[0]))
  ratios = [a / b for a, b in zip(ours, alone, strict=True)]
  return {
    'corpus_mb': megabytes,
    'tokenizers_mb_per_second': statistics.median(alone),
    'prepare_mb_per_second': statistics.median(ours),
    'prepare_of_tokenizers': statistics.median(ratios),
    'prepare_of_tokenizers_lowest': min(ratios),
    'prepare_of_tokenizers_by_cpu_seconds': statistics.median(
      cpu
    ),  # start-up included; holds on a busy machine
    'prepare_with_startup_mb_per_second': statistics.median(whole),
    'prepare_with_startup_of_tokenizers': statistics.median(a / b for a, b in zip(whole, alone, strict=True)),
  }


def cpu_seconds(whose: int) -> float:
  """CPU time in seconds of this process or of its ended children."""
  usage = resource.getrusage(whose)
  return usage.ru_utime + usage.ru_stime


def loader_speed(cache_dir: str) -> dict[str, float]:
  """Tokens/s of the loader with rows of 2,048 tokens, after a pass that warms the page cache."""
  from mor_jax.config import DataConfig
  from mor_jax.data import dataset, loader, schedule

  (folder,) = (path.parent for path in pathlib.Path(cache_dir, 'datasets').glob('*/manifest.json'))
  prepared = dataset.open_dataset(folder)
  batches = loader.train_batches(prepared, DataConfig(seq_len=2048), schedule.constant(32))
  speeds = []
  for _ in range(6):
    begin = time.perf_counter()
    tokens = sum(next(batches)['tokens'].size for _ in range(40))
    speeds.append(tokens / (time.perf_counter() - begin))
  return {'loader_tokens_per_second': statistics.median(speeds[1:])}


def tiny_speed(scratch: str) -> dict[str, float]:
  """Tokens/s consumed by the training step of configs/tiny.py, and tokens/s of its loader."""
  import jax
  import jax.numpy as jnp

  from mor_jax import cli
  from mor_jax.config import with_changes
  from mor_jax.data import loader, schedule
  from mor_jax.model.transformer import Transformer
  from mor_jax.parallel import mesh as mesh_lib
  from mor_jax.training.optimizer import make_optimizer
  from mor_jax.training.state import initializer
  from mor_jax.training.step import make_train_step, split_batch

  config = cli.load_config('configs/tiny.py', {'data.cache_dir': f'{scratch}/tiny'})
  dataset = loader.open_dataset(config.data)
  config = with_changes(config, model={'vocab_size': dataset.tokenizer.vocab_size})
  batches = loader.train_batches(dataset, config.data, schedule.of(config.train))
  mesh, model, optimizer = mesh_lib.make_mesh(), Transformer(config.model), make_optimizer(config.train)
  state = initializer(model, optimizer, mesh, config.data.seq_len)(jnp.uint32(0))
  step, sharding = make_train_step(model, config, optimizer, mesh), mesh_lib.micro_batch_sharding(mesh)
  tokens, steps, loads = config.train.global_batch * config.data.seq_len, [], []
  for _ in range(30):
    begin = time.perf_counter()
    for _ in range(50):
      batch = next(batches)
    loads.append((time.perf_counter() - begin) / 50)
    batch = mesh_lib.put(split_batch(batch, config.train.accumulation), sharding)
    begin = time.perf_counter()
    state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    steps.append(time.perf_counter() - begin)
  consumed, given = tokens / statistics.median(steps[2:]), tokens / statistics.median(loads[2:])
  return {
    'tiny_model_tokens_per_second': consumed,
    'tiny_loader_tokens_per_second': given,
    'tiny_loader_of_model': given / consumed,
  }


def prepare_memory(corpus: pathlib.Path, tokenizer: str, scratch: str, megabytes: float) -> dict[str, float]:
  """Peak memory of all processes together (shared pages count once), also for each half of the run."""
  load = f'import mor_jax.prepare, tokenizers, time; t = tokenizers.Tokenizer.from_file({tokenizer!r}); time.sleep(2)'
  base = max(watched([sys.executable, '-c', load]))
  seen = watched(settings(corpus, tokenizer, f'{scratch}/memory'))
  half = len(seen) // 2
  return {
    'memory_corpus_mb': megabytes,
    'tokenizer_process_mb': base,
    'prepare_peak_mb': max(seen),
    'prepare_beyond_tokenizer_mb': max(seen) - base,
    'prepare_peak_first_half_mb': max(seen[:half]),
    'prepare_peak_second_half_mb': max(seen[half:]),
  }


def watched(command: list[str]) -> list[float]:
  """Runs a command; returns its memory in MB, children included, sampled twice a second."""
  process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
  seen: list[float] = []
  watcher = threading.Thread(target=_watch, args=(process.pid, lambda: process.poll() is None, seen))
  watcher.start()
  if process.wait():
    raise SystemExit(f'{command} ended with exit code {process.returncode}')
  watcher.join()
  return seen


def _watch(pid: int, running: Callable[[], bool], seen: list[float]) -> None:
  while running():
    seen.append(sum(map(_proportional_mb, _family(pid))))
    time.sleep(0.5)


def _family(pid: int) -> list[int]:
  try:
    children = pathlib.Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
  except OSError:
    return []
  return [pid, *(member for child in children for member in _family(int(child)))]


def _proportional_mb(pid: int) -> float:
  try:
    lines = pathlib.Path(f'/proc/{pid}/smaps_rollup').read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith('Pss:')) * 1024 / MB
  except OSError:  # it has ended
    return 0.0


if __name__ == '__main__':
  main()
