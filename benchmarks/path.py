"""From an open model to a server, by the commands that users give: python -m benchmarks.path --model=SMOLLM2 --corpus=FOLDER

  uptrain     the model becomes a MoR of two recursions: layers picked stepwise, residual gates, distilled
  tune        it learns to answer: questions about Python's library, the loss on the answers
  evaluate    both runs and the original, on text and on answers that were held out
  calibrate   thresholds by which as many tokens take the second recursion as in training
  export      a folder for transformers, with its own PyTorch module
  ask         some questions, greedily, with these thresholds: mor_jax.generate, transformers without mor_jax, and mor_jax.serve must give
              the same tokens

SMOLLM2 is a Llama checkpoint of SmolLM2-135M, or another model that is read; --shape=qwen3 takes a small random model of
Qwen3's shape with its tokenizer instead. FOLDER has .txt files in English. Everything goes to --workdir, what is there
already is not made again, and what the commands print is kept there. Writes benchmarks/results/path.* (path_qwen3.*),
and fails where answers differ or the uptrained model is not within --within nats of the original.
"""

import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from absl import flags

from benchmarks import path_model, results, serving_process
from mor_jax import cli
from mor_jax.config import ConfigError
from mor_jax.data import tokenizer as tokenizers
from mor_jax.errors import RunError

FLAGS = flags.FLAGS
flags.DEFINE_string('model', None, 'folder of a Llama-type checkpoint with its tokenizer')
flags.DEFINE_string('corpus', None, 'folder with .txt files')
flags.DEFINE_string('workdir', 'runs/path', 'where everything goes')
flags.DEFINE_enum(
  'shape', None, ['qwen3'], 'a small random model of this shape in place of the weights of --model'
)
flags.DEFINE_integer('steps', 240, 'optimiser steps of the uptraining')
flags.DEFINE_integer('tune_steps', 120, 'optimiser steps of the tuning')
flags.DEFINE_integer('batch', 4, 'rows in a step')
flags.DEFINE_integer('questions', 8, 'that are asked')
flags.DEFINE_float('within', 1.0, 'nats per token that the uptrained model may be worse than the original')

HELD_OUT = 20  # every so many-th file
ROW, ANSWER = 128, 32  # tokens
EVALUATED = 64  # rows
CAPACITIES = '1,0.5'  # those of the training, for which thresholds are calibrated


class Loss(NamedTuple):
  """Nats per token, and the recursions that tokens took in the mean; None: there are no routers."""

  nll: float
  depth: float | None


Run = Callable[..., None]
"""Runs a command, `run(name, module, *flags, done=result)`, unless its result is there."""


def main() -> int:
  """Goes the path; 1 if something is not as it must be."""
  for name in ('model', 'corpus'):
    if not FLAGS[name].value:
      raise ConfigError(f'--{name} is missing (--help says what it is)')
  place, seconds = Path(FLAGS.workdir), {}
  place.mkdir(parents=True, exist_ok=True)

  def run(name: str, *arguments: str, done: Path | None = None) -> None:
    seconds[name] = _run(place, name, arguments, done)

  source, (text, held_out) = _source(place), _split(Path(FLAGS.corpus), place)
  uptrain(run, place, source, text)
  tune(run, place)
  losses = evaluate(run, place, source, held_out)
  calibrations = place / 'tuned' / 'calibrations.json'
  calibrate = 'mor_jax.calibrate', f'--checkpoint={place / "tuned"}', f'--capacities={CAPACITIES}'
  run('calibrate', *calibrate, done=calibrations)
  exported = place / 'exported'
  export = ('mor_jax.convert', f'--checkpoint={place / "tuned"}', '--to=transformers', f'--output={exported}')
  run('export', *export, done=exported / 'config.json')
  asked = _ask(place, exported, run)
  until = _tokens_until(place / 'mor', losses['original']['threshold'].nll + FLAGS.within)
  return report(losses, asked, seconds, until)


# ---- the commands ----


def uptrain(run: Run, place: Path, source: Path, text: Path) -> None:
  """The model becomes a MoR."""
  run(
    'uptrain',
    *('mor_jax.train', '--config=configs/uptrain_smollm2_135m.py', f'--workdir={place / "mor"}'),
    *(f'--init_from={source}', f'--config.data.source=files:{text}/*.txt', '--config.distill.weight=1'),
    *_sizes(FLAGS.steps),
    f'--config.model.capacity_warmup_steps={FLAGS.steps // 3}',
    '--config.train.eval_every=80',
    done=place / 'mor' / 'summary.json',
  )


def tune(run: Run, place: Path) -> None:
  """It learns to answer."""
  run(
    'tune',
    *('mor_jax.train', '--config=configs/sft_smollm2_135m.py', f'--workdir={place / "tuned"}'),
    *(f'--init_from={place / "mor"}', '--config.data.source=embedded'),
    f'--config.data.chat_template={path_model.write_template(place)}',
    *_sizes(FLAGS.tune_steps),
    *('--config.train.learning_rate=2e-4', '--config.model.capacity_warmup_steps=0'),
    '--config.train.eval_every=60',
    done=place / 'tuned' / 'summary.json',
  )


def _sizes(steps: int) -> list[str]:
  """Settings of a training that two cores can do."""
  train = {
    'steps': steps,
    'global_batch': FLAGS.batch,
    'accumulation': 1,
    'warmup_steps': max(steps // 20, 1),
  }
  train |= {'log_every': 10, 'eval_rows': 32}
  return [
    *(f'--config.train.{name}={value}' for name, value in train.items()),
    f'--config.data.seq_len={ROW}',
    '--config.model.dtype=float32',
    '--config.checkpoint.every_steps=40',
    *path_model.settings(FLAGS.shape),
  ]


def evaluate(run: Run, place: Path, source: Path, held_out: Path) -> dict[str, dict[str, Loss]]:
  """Losses by model and routing: of the original and both runs on text, and of the tuned one on answers."""
  original, losses = place / 'original', {}
  convert = 'mor_jax.convert', f'--checkpoint={source}', f'--output={original}'
  run('convert', *convert, done=original / 'config.json')
  _shorten_rows(original)
  text = f'--data=files:{held_out}/*.txt', '--data_format=text', f'--rows={EVALUATED}', '--dtype=float32'
  for name, folder, more in (
    ('original', original, text),
    ('mor', place / 'mor', text),
    ('tuned', place / 'tuned', text),
    ('answers', place / 'tuned', ()),
  ):
    output = place / f'evaluation-{name}.json'
    run(
      f'evaluate {name}',
      'mor_jax.evaluate',
      f'--checkpoint={folder}',
      *more,
      f'--output={output}',
      done=output,
    )
    losses[name] = _losses(output)
  return losses


def report(
  losses: dict[str, dict[str, Loss]], asked: dict[str, Any], seconds: dict[str, float], until: int | None
) -> int:
  """Prints and keeps the table; returns 1 where something is not as it must be."""
  faults = [
    f'{name} gives other answers than mor_jax.generate'
    for name in ('transformers', 'server')
    if not asked[name]
  ]
  gap = losses['mor']['threshold'].nll - losses['original']['threshold'].nll
  if gap > FLAGS.within:
    faults.append(
      f'the uptrained model is {gap:.2f} nats behind the original, more than --within={FLAGS.within}'
    )
  rows = [
    [name, *(number for loss in (of['topk'], of['threshold']) for number in _numbers(loss))]
    for name, of in losses.items()
  ]
  settings = {
    'model': FLAGS.shape or Path(FLAGS.model).name,
    'losses': 'nats per token and recursions of a token under top-k and threshold routing (threshold 0), of held-out '
    'text and (answers) of the answers to held-out questions after the tuning',
    'uptraining': f'{FLAGS.steps} steps of {FLAGS.batch} x {ROW} tokens, distilled from the original',
    f'tokens until the validation is within {FLAGS.within} of the original': until or 'not reached',
    'tuning': f'{FLAGS.tune_steps} steps of {FLAGS.batch} x {ROW} tokens',
    'answers compared': f'{asked["count"]} of {ANSWER} tokens: transformers {"equal" if asked["transformers"] else "OTHER"}, '
    f'server {"equal" if asked["server"] else "OTHER"}; recursions of their tokens {asked["depth"]:.2f}, by thresholds '
    f'calibrated for {CAPACITIES}',
    'seconds': ', '.join(f'{name} {value:.0f}' for name, value in seconds.items() if value),
  }
  print(
    results.keep(
      f'path_{FLAGS.shape}' if FLAGS.shape else 'path',
      ['model', 'top-k', 'depth', 'threshold', 'depth '],
      rows,
      settings,
    )
  )
  for example in asked['examples']:
    print(f'  {example["question"]!r}\n    {example["answer"]!r}')
  for fault in faults:
    print(f'FAULT: {fault}', file=sys.stderr)
  return int(bool(faults))


def _numbers(loss: Loss) -> tuple[str, str]:
  return f'{loss.nll:.3f}', '-' if loss.depth is None else f'{loss.depth:.2f}'


# ---- what the commands need ----


def _source(place: Path) -> Path:
  """The folder of the model that the path begins with."""
  if FLAGS.shape is None:
    return Path(FLAGS.model)
  folder = place / 'source'
  if not folder.exists():
    path_model.write(FLAGS.shape, Path(FLAGS.model), folder)
  return folder


def _split(corpus: Path, place: Path) -> tuple[Path, Path]:
  """Folders with the files to train on and those held out."""
  files = sorted(corpus.rglob('*.txt'))
  if len(files) < HELD_OUT:
    raise ConfigError(f'--corpus={corpus} has {len(files)} .txt files; at least {HELD_OUT} are needed')
  folders = place / 'text', place / 'held_out'
  for number, file in enumerate(files):
    folder = folders[number % HELD_OUT == 0]
    folder.mkdir(exist_ok=True)
    if not (folder / file.name).exists():
      shutil.copy(file, folder / file.name)
  return folders


def _run(place: Path, name: str, arguments: Sequence[str], done: Path | None) -> float:
  """Runs a command unless its result is there; returns its seconds, 0 if it did not run.

  Raises:
    RunError: it failed.
  """
  if done is not None and done.exists():
    return 0.0
  shown = ' '.join(f"'{part}'" if '*' in part else part for part in arguments)
  print(f'\n$ python -m {shown}', flush=True)
  begin, log = time.perf_counter(), place / f'{name.replace(" ", "-")}.log'
  with log.open('w', encoding='utf-8') as file:
    ended = subprocess.run(
      [sys.executable, '-m', *arguments],
      stdout=file,
      stderr=subprocess.STDOUT,
      stdin=subprocess.DEVNULL,
      check=False,
    )
  print('\n'.join(log.read_text(encoding='utf-8').splitlines()[-12:]), flush=True)
  if ended.returncode:
    raise RunError(f'{name} failed, exit code {ended.returncode}: {log}')
  return time.perf_counter() - begin


def _shorten_rows(run: Path) -> None:
  """Lets a converted run be evaluated in rows as short as those of the others: what came before a token counts."""
  path = run / 'config.json'
  config = json.loads(path.read_text(encoding='utf-8'))
  config['data']['seq_len'] = ROW
  path.write_text(json.dumps(config, indent=2), encoding='utf-8')


def _losses(file: Path) -> dict[str, Loss]:
  """Losses by routing; a model without routers has the same under both."""
  found = json.loads(file.read_text(encoding='utf-8'))['routing']
  by_routing = {name: Loss(one['nll'], one.get('mean_depth')) for name, one in found.items()}
  return {name: by_routing.get(name, next(iter(by_routing.values()))) for name in ('topk', 'threshold')}


def _tokens_until(run: Path, loss: float) -> int | None:
  """Tokens after which the run's own validation was first below a loss; None: never."""
  for line in (run / 'metrics.jsonl').read_text(encoding='utf-8').splitlines():
    record = json.loads(line)
    if record.get('validation/nll', loss) < loss:
      return record['step'] * FLAGS.batch * ROW
  return None


# ---- the same questions, in three ways ----


def _ask(place: Path, exported: Path, run: Run) -> dict[str, Any]:
  """Whether transformers and the server answer as mor_jax.generate does."""
  tuned, questions = place / 'tuned', path_model.questions(FLAGS.questions)
  tokenizer = tokenizers.Tokenizer.load(exported / 'tokenizer.json')
  theirs = place / 'answers-transformers.json'
  asked = place / 'questions.json'
  asked.write_text(json.dumps(questions), encoding='utf-8')
  theirs.unlink(missing_ok=True)
  run(
    'transformers', 'benchmarks.path_transformers', *map(str, (exported, asked, theirs, ANSWER, CAPACITIES))
  )
  found = json.loads(theirs.read_text(encoding='utf-8'))
  lines, ours = place / 'prompts.jsonl', place / 'answers.jsonl'
  lines.write_text(''.join(json.dumps({'tokens': one['prompt']}) + '\n' for one in found), encoding='utf-8')
  ours.unlink(missing_ok=True)
  decided = f'--checkpoint={tuned}', f'--capacities={CAPACITIES}', '--cache_dtype=float32'
  options = f'--input={lines}', f'--output={ours}', f'--max_new_tokens={ANSWER}', '--temperature=0'
  run('generate', 'mor_jax.generate', *decided, *options)
  answers = [json.loads(line) for line in ours.read_text(encoding='utf-8').splitlines()]
  with serving_process.ours([*decided, '--name=tuned', '--slots=4'], place) as server:
    served = [_served(server.address, question) for question in questions]
  ends = {tokenizer.end_of_text, *(one['end'] for one in found)}
  same = [
    one['answer'][: len(answer['tokens'])] == answer['tokens']
    and set(one['answer'][len(answer['tokens']) :]) <= ends
    for one, answer in zip(found, answers, strict=True)
  ]
  depths = [depth for answer in answers for depth in answer['depths']]
  return {
    'count': len(questions),
    'depth': statistics.mean(depths),
    'transformers': all(same),
    'server': served == [answer['text'] for answer in answers],
    'examples': [
      {'question': question, 'answer': answer['text']}
      for question, answer in zip(questions[:3], answers, strict=False)
    ],
  }


def _served(address: str, question: str) -> str:
  body = {
    'model': 'tuned',
    'messages': [{'role': 'user', 'content': question}],
    'max_tokens': ANSWER,
    'temperature': 0,
  }
  answer = httpx.post(f'{address}/v1/chat/completions', json=body, timeout=600)
  answer.raise_for_status()
  return answer.json()['choices'][0]['message']['content']


if __name__ == '__main__':
  cli.run(main, __doc__, with_config=False)
