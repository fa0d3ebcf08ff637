"""Where chat templates run: jinja2's immutable sandbox, in which loops and texts have an end.

Templates come with models from anywhere. The sandbox keeps them from attributes that lead out of it; here what they
compute is counted as well, so that none can hang a run or fill the memory. Counts, unlike a clock, give the same
answer on every machine.
"""

import functools
import json
import re
import threading
from collections.abc import Callable
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.environment import Template
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

GENERATED = ('\ufdd0', '\ufdd1')
"""Around what stands in {% generation %}: characters that Unicode reserves for such use within a program."""
MOST_ROUNDS = 2 * 10**5  # of all loops and macros of a rendering
MOST_CHARACTERS = 2**26  # that a rendering makes, parts that are joined later counted again
LARGEST_NUMBER = 2**31
LARGEST_COUNT = 10_000  # copies of a text, its padding

# Formats that pad a text beyond 9,999 places, or by a number that comes with what is formatted.
_WIDE_PERCENT = re.compile(r'%[-+ #0]*(\*|\d{5}|\d*\.(\*|\d{5}))')
_WIDE_BRACES = re.compile(r'\{[^{}]*:[^{}]*\d{5}')
_FORMATS = ('format', 'format_map')  # methods of texts


class _Spent(threading.local):
  rounds = characters = 0


class Environment(ImmutableSandboxedEnvironment):
  """The sandbox, with what templates of chats expect and with its bounds.

  There is no `strftime_now`: templates fall back to a date of their own, and the same messages are always the same text.
  """

  intercepted_binops = frozenset(('+', '-', '*', '**', '/', '//', '%'))

  def __init__(self) -> None:
    # Not optimised: constants would be computed while the template is compiled, before anything is counted.
    super().__init__(
      trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[Counted, loopcontrols]
    )
    self.spent = _Spent()
    self.globals['raise_exception'] = _raise
    del self.globals['lipsum']
    self.filters['tojson'] = lambda value, **options: json.dumps(value, **{'ensure_ascii': False, **options})
    self.filters = {name: self._bounded(function) for name, function in self.filters.items()}

  def render(self, template: Template, **variables: Any) -> str:
    """What a template of this environment makes of the variables. Raises whatever it raises."""
    self.spent.rounds = self.spent.characters = 0
    return template.render(**variables)

  def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
    return _Counting(self.extensions[Counted.identifier]).visit(super()._parse(source, name, filename))

  # ---- what is counted ----

  def count_round(self) -> bool:
    """One more round of a loop, or call of a macro."""
    self.spent.rounds += 1
    if self.spent.rounds > MOST_ROUNDS:
      raise TemplateError(f'it loops more than {MOST_ROUNDS:,} times')
    return True

  def _count(self, value: Any) -> Any:
    """A value that was made."""
    if isinstance(value, str | list | tuple | dict):
      self.spent.characters += len(value)
      if self.spent.characters > MOST_CHARACTERS:
        raise TemplateError(f'it makes more than {MOST_CHARACTERS:,} characters')
    elif isinstance(value, int) and abs(value) > LARGEST_NUMBER:
      raise TemplateError(f'it counts beyond {LARGEST_NUMBER:,}')
    return value

  def concat(self, parts: Any) -> str:
    """The text of parts, which jinja2 asks for wherever it joins some."""
    found = []
    for part in parts:
      found.append(self._count(part))
    return self._count(''.join(found))

  def joined(self, *parts: Any) -> str:
    """`a ~ b`."""
    return self.concat(map(str, parts))

  def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
    """The value of an operation. Raises TemplateError if it would be too large."""
    if operator == '**':
      raise TemplateError('it raises numbers to powers')
    if operator == '*' and not (isinstance(left, int | float) and isinstance(right, int | float)):
      _check_counts((left, right))
    if operator == '%' and isinstance(left, str):
      _check_format(left, _WIDE_PERCENT)
    return self._count(super().call_binop(context, operator, left, right))

  def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805  # as in jinja2, whose callees may have an argument `self`
    """The value of a call. Raises TemplateError if it would be too large, SecurityError if it is not allowed."""
    if getattr(__obj, '__func__', None) is Counted._round:  # in every loop
      return __self.count_round()
    _check_counts(() if __obj is __self.globals['range'] else (*args, *kwargs.values()))
    if getattr(__obj, '__name__', '') in _FORMATS:  # the sandbox has wrapped it
      _check_format(getattr(getattr(__obj, '__wrapped__', __obj), '__self__', None), _WIDE_BRACES)
    return __self._count(super().call(__context, __obj, *args, **kwargs))

  def _bounded(self, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # keeps jinja's mark of what is handed over first
    def bounded(*args: Any, **kwargs: Any) -> Any:
      _check_counts((*args, *kwargs.values()))
      if function is FILTERS['format']:
        _check_format(args[0], _WIDE_PERCENT)
      return self._count(function(*args, **kwargs))

    return bounded


class Counted(Extension):
  """`{% generation %}`, and what the environment counts."""

  environment: Environment
  tags = {'generation'}  # noqa: RUF012  # as jinja2 declares it

  def parse(self, parser: Parser) -> nodes.Node:
    """`{% generation %}...{% endgeneration %}`: what the assistant says."""
    line = next(parser.stream).lineno
    body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
    return nodes.CallBlock(self.call_method('_generated'), [], [], body).set_lineno(line)

  def _generated(self, caller: Callable[[], str]) -> str:
    return f'{GENERATED[0]}{caller()}{GENERATED[1]}'

  def _round(self) -> bool:
    return self.environment.count_round()

  def _joined(self, *parts: Any) -> str:
    return self.environment.joined(*parts)


class _Counting(NodeTransformer):
  """Counts the rounds of loops and macros, and the characters of `a ~ b`."""

  def __init__(self, extension: Extension):
    self._extension = extension

  def visit_For(self, node: nodes.For) -> nodes.For:
    self.generic_visit(node)
    node.body.insert(0, self._round(node))
    if node.test is not None:
      node.test = nodes.And(self._call('_round', [], node), node.test, lineno=node.lineno)
    return node

  def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:
    self.generic_visit(node)
    node.body.insert(0, self._round(node))
    return node

  def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
    self.generic_visit(node)
    return self._call('_joined', node.nodes, node)

  def _round(self, node: nodes.Node) -> nodes.ExprStmt:
    return nodes.ExprStmt(self._call('_round', [], node), lineno=node.lineno)

  def _call(self, name: str, arguments: list[nodes.Expr], node: nodes.Node) -> nodes.Call:
    return self._extension.call_method(name, arguments, lineno=node.lineno)


def _check_counts(values: Any) -> None:
  for value in values:
    if isinstance(value, int) and abs(value) > LARGEST_COUNT:
      raise TemplateError(f'it asks for {value} copies or places, more than {LARGEST_COUNT:,}')


def _check_format(value: Any, wide: re.Pattern[str]) -> None:
  if isinstance(value, str) and wide.search(value):
    raise TemplateError('it formats with more than 9,999 places')


def _raise(message: str) -> NoReturn:
  raise TemplateError(message)
