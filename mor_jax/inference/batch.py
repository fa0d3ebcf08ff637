"""Many prompts in a JSONL file, answered together."""

import dataclasses
import json
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from mor_jax.config import ConfigError
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.files import parse_json
from mor_jax.inference.requests import Request, RequestError, Result
from mor_jax.inference.scheduler import Scheduler

_KINDS = {int: (int,), float: (int, float), tuple: (list,)}


def samples(template: Request, prompt: tuple[int, ...], count: int) -> list[Request]:
  """Requests for several continuations of a prompt, with consecutive seeds."""
  return [
    dataclasses.replace(template, prompt=prompt, seed=(template.seed + index) % 2**32)
    for index in range(count)
  ]


def read(path: str) -> list[str]:
  """The lines of a file that are not empty. Raises ConfigError if it cannot be read or has none."""
  try:
    lines = [line for line in Path(path).read_text(encoding='utf-8').splitlines() if line.strip()]
  except (OSError, UnicodeDecodeError) as error:
    raise ConfigError(f'--input={path} cannot be read: {error}') from None
  if not lines:
    raise ConfigError(f'--input={path} is empty: give a JSON object a line')
  return lines


def answer(
  scheduler: Scheduler, tokenizer: Tokenizer, template: Request, lines: Sequence[str], output: TextIO
) -> int:
  """Writes an answer for every line, in their order, each as soon as those before are written.

  Returns:
    How many lines could not be answered.
  """
  entries: list[Result | dict[str, Any]] = []
  for line in lines:
    try:
      entries.append(scheduler.submit(parse(line, template, tokenizer)))
    except RequestError as error:
      entries.append({'error': str(error)})
  written = 0
  while written < len(entries):
    for entry in _ended(entries[written:]):
      output.write(json.dumps(entry, ensure_ascii=False) + '\n')
      output.flush()
      written += 1
    if scheduler.busy:
      scheduler.step()
  return sum(isinstance(entry, dict) for entry in entries)


def _ended(entries: Sequence[Result | dict[str, Any]]) -> Iterator[dict[str, Any]]:
  """Answers up to the first that is not complete."""
  for entry in entries:
    if isinstance(entry, dict):
      yield entry
    elif entry.finish:
      start = len(entry.request.prompt)
      depths = {'prompt_depths': entry.depths[:start], 'depths': entry.depths[start:]}
      yield {'text': entry.text, 'tokens': entry.tokens, **depths, 'finish': entry.finish}
    else:
      return


def parse(line: str, template: Request, tokenizer: Tokenizer) -> Request:
  """The request of a line. Raises RequestError if it is not a JSON object or has fields of another type."""
  try:
    fields = parse_json(line)
  except ValueError as error:
    raise RequestError(f'the line is not JSON: {error}') from None
  if not isinstance(fields, dict) or ('prompt' in fields) == ('tokens' in fields):
    raise RequestError('a line must be an object with either "prompt", a text, or "tokens", a list of ids')
  hints = typing.get_type_hints(Request)
  if 'prompt' in fields:
    text = fields.pop('prompt')
    if not isinstance(text, str):
      raise RequestError(f'prompt={text!r} must be a text')
    fields['prompt'] = tokenizer.encode_text(text)
  else:
    fields['prompt'] = fields.pop('tokens')
  changes = {}
  for name, value in fields.items():
    if name not in hints:
      raise RequestError(f'unknown field "{name}"; known are prompt, tokens and {", ".join(list(hints)[1:])}')
    changes[name] = _convert(name, value, hints[name])
  return dataclasses.replace(template, **changes)


def _convert(name: str, value: Any, hint: Any) -> Any:
  if value is None and type(None) in typing.get_args(hint):
    return None
  kind = typing.get_origin(hint) or hint
  if kind not in _KINDS:  # int | None
    kind = int
  if not isinstance(value, _KINDS[kind]) or isinstance(value, bool):
    raise RequestError(f'{name}={value!r} must be a {"list" if kind is tuple else kind.__name__}')
  if kind is not tuple:
    return kind(value)
  item = typing.get_args(hint)[0]
  if not all(isinstance(entry, item) and not isinstance(entry, bool) for entry in value):
    raise RequestError(f'{name}={value!r} must be a list of {item.__name__}')
  return tuple(value)
