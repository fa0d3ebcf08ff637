"""Continues texts with a trained model, or talks with it: python -m mor_jax.generate --checkpoint=runs/tiny-mor --prompt='def '

Text appears as it is generated; routing is causal (threshold), keys and values are cached. --show_depth
colours every token by the recursions that it took. With --input=FILE.jsonl many prompts are answered
together: each line is an object with "prompt" (text) or "tokens" (ids), and, where it differs from the
flags, any of max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty,
frequency_penalty, logit_bias ({"id": number}), seed, stop_tokens, stop_strings, max_recursions, threshold_shift,
speculate; an "id" comes back with the answer. Line i (from 0) has the seed --seed + i, so that equal lines get different texts. --output
has a line for each, in the same order: "text", "tokens", "depths", "finish" (length, stop_token or stop_string), with
--logprobs=K the log-probabilities of prompt and text and the K likeliest tokens in each place, or "error" where a line
cannot be answered. A batch that was interrupted goes on with --resume.

--chat talks with a model that has a chat template (docs/instruction_tuning.md): lines in, answers out, from a terminal
or a pipe; each answer sees what was said before, on a terminal in the colours of its depth. /reset forgets it, /exit or
the end of input ends it, and Ctrl-C stops an answer.

One device is used, unless the settings below ask for all: --config.parallel.tensor=4 splits heads and matrices
over four, texts are divided among the rest.
"""

import dataclasses
import importlib.util
import sys
from functools import partial
from pathlib import Path

from absl import flags
from jax.sharding import Mesh

from mor_jax import cli
from mor_jax.cli import engines
from mor_jax.config import ConfigError
from mor_jax.console import has_colours, open_console, print_line
from mor_jax.data.conventions import Conventions
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.inference import batch
from mor_jax.inference.requests import Request, RequestError
from mor_jax.inference.scheduler import Scheduler
from mor_jax.inference.state import STOP_TOKENS
from mor_jax.inference.terminal import Writer, describe_statistics
from mor_jax.runs.restore import LoadedRun

FLAGS = flags.FLAGS
STREAMING_TICKS = 8
DEFAULT_SLOTS = 16


def define_flags() -> None:
  """Defines the flags of this command."""
  cli.define_checkpoint()
  flags.DEFINE_string('prompt', None, 'beginning of the text')
  flags.DEFINE_string('prompt_file', None, 'file with the beginning of the text')
  flags.DEFINE_string('input', None, 'batch mode: JSONL file with prompts')
  flags.DEFINE_string('output', None, 'batch mode: JSONL file for the answers; default: standard output')
  flags.DEFINE_boolean('chat', False, 'talk: messages from standard input, answers to standard output')
  flags.DEFINE_string('system', None, 'chat: message of the system that the conversation begins with')
  flags.DEFINE_boolean(
    'resume', False, 'batch mode: keep the answers that are in --output, and go on behind them'
  )
  flags.DEFINE_integer(
    'logprobs', None, 'batch mode: also give log-probabilities, and so many of the likeliest tokens'
  )
  flags.DEFINE_integer('num_samples', 1, 'continuations of the prompt, with seeds --seed, --seed + 1, ...')
  flags.DEFINE_integer('max_new_tokens', 128, 'tokens to generate at most; --max_len may end a text before')
  flags.DEFINE_float('temperature', 0.7, 'divides the logits; 0 always takes the most likely token')
  flags.DEFINE_integer('top_k', 0, 'sample from so many of the most likely tokens; 0: from all')
  flags.DEFINE_float('top_p', 1.0, 'sample from the most likely tokens that together have this probability')
  flags.DEFINE_float('repetition_penalty', 1.0, 'above 1: tokens that occurred before become less likely')
  flags.DEFINE_float('min_p', 0.0, 'drop tokens below this share of the probability of the likeliest one')
  flags.DEFINE_float('presence_penalty', 0.0, 'taken from the logits of tokens that were generated before')
  flags.DEFINE_float('frequency_penalty', 0.0, 'the same, as often as they were')
  flags.DEFINE_integer('seed', 0, 'equal seeds give equal texts')
  flags.DEFINE_multi_string('stop', [], 'text that ends the continuation; may be given several times')
  flags.DEFINE_boolean('ignore_end_of_text', False, 'go on after the token that ends documents')
  flags.DEFINE_float(
    'threshold_shift', 0.0, 'added to the router thresholds: above 0 saves computation, below 0 spends more'
  )
  flags.DEFINE_boolean('show_depth', False, 'colour every token by the recursions that it took')
  engines.define_flags(
    None, 'texts generated together; default: --num_samples, or 16 in batch mode, and more if devices need it'
  )


def main() -> int:
  """Generates, and returns the exit code. Raises ConfigError for flags that cannot work."""
  _check_flags()
  mesh = engines.make_mesh()
  run = engines.load_as_asked(mesh)
  tokenizer = engines.tokenizer_of(run)
  template = _template(tokenizer, run.folder.conventions(run.config, tokenizer))
  try:
    template.check()
  except RequestError as error:
    raise ConfigError(f'--{error}') from None
  cli.use_compilation_cache(run.config)
  answer = _chat if FLAGS.chat else _answer_file if FLAGS.input else _stream
  return answer(run, tokenizer, template, mesh)


def _check_flags() -> None:
  cli.require_checkpoint()
  if FLAGS.chat:
    _check_chat()
    return
  if FLAGS.system is not None:
    raise ConfigError(f'--system={FLAGS.system} begins a conversation: give --chat too')
  given = [name for name in ('prompt', 'prompt_file', 'input') if FLAGS[name].value is not None]
  if len(given) != 1:
    found = ' and '.join(f'--{name}' for name in given) or 'none of them'
    raise ConfigError(f'give one of --prompt, --prompt_file, --input and --chat; there is {found}')
  if FLAGS.input and (FLAGS.show_depth or FLAGS.num_samples != 1):
    raise ConfigError(
      '--show_depth and --num_samples are for a single prompt; with --input the answers have "depths", and a '
      'prompt that is wanted several times stands on several lines'
    )
  for name in ('output', 'logprobs'):
    if FLAGS[name].value is not None and not FLAGS.input:
      raise ConfigError(f'--{name}={FLAGS[name].value} is for batch mode: give --input too')
  if FLAGS.resume and not FLAGS.output:
    raise ConfigError('--resume goes on with the answers in a file: name it with --output')
  if FLAGS.output:
    batch.check_output(FLAGS.output, FLAGS.input)
  cli.check_least(num_samples=1, slots=1, logprobs=0)


def _check_chat() -> None:
  others = (
    'prompt',
    'prompt_file',
    'input',
    'output',
    'resume',
    'logprobs',
    'num_samples',
    'ignore_end_of_text',
  )
  for name in others:
    if FLAGS[name].value != FLAGS[name].default:
      raise ConfigError(
        f'--{name}={FLAGS[name].value} does not go with --chat, whose messages come from standard input, each with one '
        f'answer: leave one of them out'
      )
  if importlib.util.find_spec('jinja2') is None:
    raise ConfigError("--chat needs jinja2: pip install 'mor_jax[chat]'")
  cli.check_least(slots=1)


def _template(tokenizer: Tokenizer, conventions: Conventions) -> Request:
  """The request that the flags describe, with a prompt to be filled in."""
  return Request(
    prompt=(tokenizer.end_of_text,),
    max_new_tokens=FLAGS.max_new_tokens,
    temperature=FLAGS.temperature,
    top_k=FLAGS.top_k,
    top_p=FLAGS.top_p,
    min_p=FLAGS.min_p,
    repetition_penalty=FLAGS.repetition_penalty,
    presence_penalty=FLAGS.presence_penalty,
    frequency_penalty=FLAGS.frequency_penalty,
    seed=FLAGS.seed,
    stop_tokens=() if FLAGS.ignore_end_of_text else conventions.ends[:STOP_TOKENS],
    stop_strings=tuple(FLAGS.stop),
    threshold_shift=FLAGS.threshold_shift,
    prompt_logprobs=FLAGS.logprobs is not None,
  )


# ---- one prompt, streamed ----


def _stream(run: LoadedRun, tokenizer: Tokenizer, template: Request, mesh: Mesh) -> int:
  _check_depths(run)
  requests = batch.samples(template, tuple(tokenizer.encode_text(_prompt())), FLAGS.num_samples)
  engine = engines.make_engine(run, FLAGS.num_samples, mesh)
  scheduler = Scheduler(engine, tokenizer, ticks_per_call=STREAMING_TICKS, drafting=engines.drafting())
  try:
    results = [scheduler.submit(request) for request in requests]
  except RequestError as error:
    raise ConfigError(str(error)) from None
  writer = Writer(open_console(), tokenizer, engine.steps, FLAGS.show_depth)
  for number, result in enumerate(results):
    writer.begin(result, number if len(results) > 1 else None)
    while not result.finish:
      scheduler.step()
      writer.update(result)
    writer.end(result)
  print(describe_statistics(scheduler.statistics, run.config.model), file=sys.stderr)
  return 0


def _check_depths(run: LoadedRun) -> None:
  if run.config.model.kind != 'mor' and FLAGS.show_depth:
    raise ConfigError(
      f'--show_depth: this run has model.kind={run.config.model.kind}, whose tokens all take the same depth'
    )


def _prompt() -> str:
  if FLAGS.prompt_file is None:
    text, flag = FLAGS.prompt, '--prompt'
  else:
    flag = f'--prompt_file={FLAGS.prompt_file}'
    try:
      text = Path(FLAGS.prompt_file).read_text(encoding='utf-8-sig')
    except (OSError, UnicodeDecodeError) as error:
      raise ConfigError(f'{flag} cannot be read: {error}') from None
  if not text:
    raise ConfigError(f'{flag} is empty: give at least one character')
  return text


# ---- a conversation ----


def _chat(run: LoadedRun, tokenizer: Tokenizer, template: Request, mesh: Mesh) -> int:
  from mor_jax.data.chats import Chats  # jinja2, which nothing else here needs
  from mor_jax.inference import dialogue

  _check_depths(run)
  conventions = run.folder.conventions(run.config, tokenizer)
  chats = Chats.of(conventions, tokenizer)
  if chats is None:
    raise ConfigError(
      f'--chat needs a chat template, and --checkpoint={FLAGS.checkpoint} has none: use --prompt, or a model that was '
      f'tuned to conversations (docs/instruction_tuning.md)'
    )
  ends = tuple(dict.fromkeys((*chats.ends(), *conventions.ends)))[:STOP_TOKENS]
  engine = engines.make_engine(run, 1, mesh)
  scheduler = Scheduler(engine, tokenizer, ticks_per_call=STREAMING_TICKS, drafting=engines.drafting())
  console, notes = open_console(), open_console(stderr=True)
  say = partial(print_line, notes)
  shows_depth = FLAGS.show_depth or (run.config.model.kind == 'mor' and has_colours(console))
  writer = Writer(console, tokenizer, engine.steps, shows_depth)
  talk = dialogue.Dialogue(scheduler, chats, dataclasses.replace(template, stop_tokens=ends), FLAGS.system)
  writer.explain()
  is_typed = sys.stdin.isatty() and console.is_terminal
  lines = dialogue.typed_lines('> ', say) if is_typed else dialogue.piped_lines()
  dialogue.talk(talk, writer, lines, say)
  if scheduler.statistics.first_token_seconds:
    tokens, reused = scheduler.prompt_tokens
    speed = describe_statistics(scheduler.statistics, run.config.model)
    say(f'{speed}; {reused} of {tokens} tokens of prompts kept from the answer before')
  return 0


# ---- many prompts ----


def _answer_file(run: LoadedRun, tokenizer: Tokenizer, template: Request, mesh: Mesh) -> int:
  lines = batch.read(FLAGS.input)
  before = batch.answered(FLAGS.output, lines) if FLAGS.resume else batch.Answered()
  if before.lines == len(lines):
    print(f'all {len(lines)} lines have been answered', file=sys.stderr)
    return 0
  slots = min(DEFAULT_SLOTS, len(lines) - before.lines)
  engine = engines.make_engine(run, slots, mesh, FLAGS.logprobs)
  scheduler = Scheduler(engine, tokenizer, drafting=engines.drafting())
  with batch.open_output(
    FLAGS.output, before
  ) as output:  # opened last: nothing is lost if something does not work
    refused = batch.answer(scheduler, tokenizer, template, lines, output, before.lines)
  print(describe_statistics(scheduler.statistics, run.config.model), file=sys.stderr)
  if refused:
    print(f'error: {refused} of {len(lines)} lines could not be answered, see "error"', file=sys.stderr)
  return cli.FAILED if refused else 0


if __name__ == '__main__':
  define_flags()
  cli.run(main, __doc__, with_config=False, sections=('parallel',))
