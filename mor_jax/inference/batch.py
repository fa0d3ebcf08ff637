"""Many prompts in a JSONL file, answered together."""

import codecs
import contextlib
import dataclasses
import json
import os
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from mor_jax.config import ConfigError
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.files import parse_json
from mor_jax.inference.requests import Request, RequestError, Result, short
from mor_jax.inference.scheduler import Scheduler

FORMS = 'with either "prompt", a text, or "tokens", a list of ids'
_KINDS = {int: (int,), float: (int, float), tuple: (list,), bool: (bool,)}


@dataclasses.dataclass(frozen=True)
class Answered:
  """What an earlier run of the same batch left in its output.

  Attributes:
    lines: how many lines of the input it answered.
    size: bytes of these answers; what stands behind them was being written when it ended.
  """

  lines: int = 0
  size: int = 0


def samples(template: Request, prompt: tuple[int, ...], count: int) -> list[Request]:
  """Requests for several continuations of a prompt, with consecutive seeds."""
  return [dataclasses.replace(template, prompt=prompt, seed=_seed(template, index)) for index in range(count)]


def read(path: str) -> list[bytes]:
  """The lines of a file that are not empty. Raises ConfigError if it cannot be read or has none.

  Lines end with a newline alone: JSON may contain what Unicode calls line separators.
  """
  try:
    text = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
  except OSError as error:
    raise ConfigError(f'--input={path} cannot be read: {error}') from None
  lines = [line for line in text.split(b'\n') if line.strip()]
  if not lines:
    raise ConfigError(f'--input={path} is empty: give a JSON object a line')
  return lines


def check_output(path: str, source: str) -> None:
  """Raises ConfigError if the answers cannot be written to a file, which is left as it is."""
  if os.path.exists(path) and os.path.samefile(path, source):
    raise ConfigError(f'--output={path} is the file of --input, which it would overwrite; name another')
  folder = Path(path).absolute().parent
  if Path(path).is_dir() or not folder.is_dir():
    found = f'{path} is a folder' if Path(path).is_dir() else f'there is no folder {folder}'
    raise ConfigError(f'--output={path} cannot be written: {found}')


def answered(path: str, lines: Sequence[bytes]) -> Answered:
  """What is left of an earlier run in its output, none: nothing.

  Raises:
    ConfigError: the file has no answers, or those of other lines.
  """
  if not os.path.exists(path):
    return Answered()
  done, size = 0, 0
  for index, line in enumerate(Path(path).read_bytes().split(b'\n')[:-1]):
    entry = _object(line)
    if not {'text', 'error'} & entry.keys():
      raise ConfigError(f'--resume: line {index + 1} of --output={path} is no answer; name another file')
    if index >= len(lines) or entry.get('id') != _object(lines[index]).get('id'):
      raise ConfigError(
        f'--resume: line {index + 1} of --output={path} does not belong to this --input; name another file'
      )
    done, size = index + 1, size + len(line) + 1
  return Answered(done, size)


@contextlib.contextmanager
def open_output(path: str | None, before: Answered) -> Iterator[TextIO]:
  """The file for the answers, cut behind those to be kept; None: standard output.

  Raises:
    ConfigError: it cannot be written.
  """
  if path is None:
    yield sys.stdout
    return
  try:
    file = open(path, 'r+' if before.size else 'w', encoding='utf-8')  # noqa: SIM115
  except OSError as error:
    raise ConfigError(f'--output={path} cannot be written: {error}') from None
  with file:
    file.truncate(before.size)
    file.seek(before.size)
    yield file


def answer(
  scheduler: Scheduler,
  tokenizer: Tokenizer,
  template: Request,
  lines: Sequence[bytes],
  output: TextIO,
  first: int = 0,
) -> int:
  """Writes an answer for every line, in their order, each as soon as those before are written.

  Args:
    first: line to begin with.

  Returns:
    How many lines could not be answered.
  """
  entries: list[Result | str] = []
  names: list[dict[str, Any]] = []  # the id of each line, if it has one
  for index, line in enumerate(lines[first:], start=first):
    names.append({})
    try:
      fields = _fields(line)
      names[-1] = {'id': fields.pop('id')} if 'id' in fields else {}
      entries.append(scheduler.submit(parse(fields, template, tokenizer, index)))
    except RequestError as error:
      entries.append(str(error))
  to_ascii = (getattr(output, 'encoding', None) or 'utf-8').lower() not in ('utf-8', 'utf8')
  written = 0
  while written < len(entries):
    for entry in _ended(entries[written:]):
      text = json.dumps({**names[written], **entry}, ensure_ascii=to_ascii)
      # What is no text in UTF-8, half of a surrogate pair, is written as JSON spells it.
      output.write(text.encode('utf-8', 'backslashreplace').decode('utf-8') + '\n')
      output.flush()
      written += 1
    if scheduler.busy:
      scheduler.step()
  return sum(isinstance(entry, str) for entry in entries)


def _ended(entries: Sequence[Result | str]) -> Iterator[dict[str, Any]]:
  """Answers up to the first that is not complete."""
  for entry in entries:
    if isinstance(entry, str):
      yield {'error': entry}
    elif entry.finish:
      start = len(entry.request.prompt)
      depths = {'prompt_depths': entry.depths[:start], 'depths': entry.depths[start:]}
      said = {'logprobs': entry.logprobs, 'top_logprobs': entry.top_logprobs} if entry.logprobs else {}
      yield {'text': entry.text, 'tokens': entry.tokens, **depths, **said, 'finish': entry.finish}
    else:
      return


def _object(line: bytes) -> dict[str, Any]:
  """The object of a line, {} if it is something else."""
  try:
    return _fields(line)
  except RequestError:
    return {}


def _fields(line: bytes | str) -> dict[str, Any]:
  """The object of a line. Raises RequestError if it is something else."""
  try:
    fields = parse_json(line)
  except ValueError as error:
    raise RequestError(f'the line is not JSON: {error}') from None
  if not isinstance(fields, dict):
    raise RequestError(f'a line must be an object {FORMS}')
  return fields


def parse(fields: dict[str, Any], template: Request, tokenizer: Tokenizer, index: int = 0) -> Request:
  """The request of a line.

  Args:
    fields: its object, without the id.
    index: of the line. It is added to the seed, unless the line has its own, so that equal lines get other texts.

  Raises:
    RequestError: a field is unknown or of another type.
  """
  if ('prompt' in fields) == ('tokens' in fields):
    raise RequestError(f'a line must be an object {FORMS}')
  hints = typing.get_type_hints(Request)
  if 'prompt' in fields:
    text = fields.pop('prompt')
    if not isinstance(text, str):
      raise RequestError(f'prompt={text!r} must be a text')
    fields['prompt'] = _encode(text, tokenizer)
  else:
    fields['prompt'] = fields.pop('tokens')
  changes: dict[str, Any] = {'seed': _seed(template, index)}
  for name, value in fields.items():
    if name not in hints:
      raise RequestError(
        f'unknown field "{name}"; known are prompt, tokens, id and {", ".join(list(hints)[1:])}'
      )
    changes[name] = _convert(name, value, hints[name])
  return dataclasses.replace(template, **changes)


def _seed(template: Request, index: int) -> int:
  return (template.seed + index) % 2**32


def _encode(text: str, tokenizer: Tokenizer) -> list[int]:
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise RequestError(
      f'prompt has {text[error.start]!r} at character {error.start}, half of a surrogate pair, which is no text'
    ) from None
  return tokenizer.encode_text(text)


def _biases(value: Any) -> tuple[tuple[int, float], ...]:
  """{"id": number} as the request has it."""
  try:
    if not isinstance(value, dict) or any(type(bias) not in (int, float) for bias in value.values()):
      raise ValueError
    return tuple((int(token), float(bias)) for token, bias in value.items())
  except (ValueError, OverflowError):
    raise RequestError(f'logit_bias={short(value)} must be an object of numbers by token id') from None


def _convert(name: str, value: Any, hint: Any) -> Any:
  if value is None and type(None) in typing.get_args(hint):
    return None
  if name == 'logit_bias':
    return _biases(value)
  kind = typing.get_origin(hint) or hint
  if kind not in _KINDS:  # int | None
    kind = int
  if not isinstance(value, _KINDS[kind]) or (isinstance(value, bool) and kind is not bool):
    raise RequestError(f'{name}={short(value)} must be a {"list" if kind is tuple else kind.__name__}')
  if kind is not tuple:
    try:
      return kind(value)
    except OverflowError:
      raise RequestError(f'{name}={short(value)} is too large') from None
  item = typing.get_args(hint)[0]
  if not all(isinstance(entry, item) and not isinstance(entry, bool) for entry in value):
    raise RequestError(f'{name}={short(value)} must be a list of {item.__name__}')
  return tuple(value)
