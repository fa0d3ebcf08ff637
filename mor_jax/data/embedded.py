"""The embedded corpus: text that every complete Python installation contains.

It consists of Python's documentation topics and of the docstrings and sources of the standard
library. It needs no network, and it differs between Python versions.
"""

import ast
import os
import pathlib
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator

from mor_jax.config import ConfigError
from mor_jax.data.document import Document, uniform_hash

# Tests, tables made by programs, an application with tests of its own, and what is not the library's.
_SKIPPED_FOLDERS = frozenset(
  ('site-packages', 'dist-packages', '__pycache__', 'test', 'tests', 'idlelib', 'encodings', 'pydoc_data')
)
_SKIPPED_PREFIXES = ('config-', '_sysconfigdata')
_SHORTEST_DOCUMENT = 200  # characters; shorter files are empty packages and one-line shims
_SMALLEST_WORD_SHARE = 1 / 3  # below it a file is mostly a table of numbers or codes

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class EmbeddedCorpus:
  """Topics, docstrings and sources, mixed so that any prefix is representative of the whole."""

  total_bytes: int | None = None
  bytes_read = 0

  def fingerprint(self) -> str:
    """The version of Python, which determines the content."""
    return f'embedded-python{platform.python_version()}'

  def records(self) -> Iterator[Document]:
    """Yields all documents. The docstrings and the source of a file share it as their origin.

    Raises:
      ConfigError: this Python installation does not contain the texts.
    """
    topics = _topics()
    folder, files = library()
    names = [f'topics/{topic}' for topic in topics]
    names += [f'{kind}/{file}' for file in files for kind in ('docstrings', 'source')]
    for name in sorted(names, key=lambda name: uniform_hash('order', name)):
      kind, file = name.split('/', 1)
      text = topics[file] if kind == 'topics' else _library_text(folder, kind, file)
      if len(text) >= _SHORTEST_DOCUMENT:
        yield Document(name, text, origin=name if kind == 'topics' else file)


def _topics() -> dict[str, str]:
  try:
    from pydoc_data import topics
  except ImportError as error:
    raise ConfigError(
      "data.source='embedded' needs Python's documentation topics, and this installation has no "
      'module pydoc_data.topics; use a complete Python installation'
    ) from error
  return topics.topics


def library() -> tuple[pathlib.Path, list[str]]:
  """The folder of the standard library, and the sorted relative paths of the modules to include. Raises ConfigError."""
  folder = pathlib.Path(sysconfig.get_path('stdlib'))
  files = _library_files(folder)
  if not files:
    raise ConfigError(
      f"data.source='embedded' needs the sources of Python's standard library, and {folder} holds none; "
      f'use a complete Python installation'
    )
  return folder, files


def _library_files(folder: pathlib.Path) -> list[str]:
  """Sorted relative paths of the modules to include."""
  found = []
  for parent, subfolders, files in os.walk(folder):
    subfolders[:] = [name for name in subfolders if not _skipped(name)]
    paths = (pathlib.Path(parent, name) for name in files if name.endswith('.py') and not _skipped(name))
    found += [path.relative_to(folder).as_posix() for path in paths]
  return sorted(found)


def _skipped(name: str) -> bool:
  return name in _SKIPPED_FOLDERS or name.startswith(_SKIPPED_PREFIXES)


def _library_text(folder: pathlib.Path, kind: str, file: str) -> str:
  """Source or docstrings of a module; empty if it isn't UTF-8, is a table, or cannot be parsed."""
  source = library_source(folder, file)
  return source if kind == 'source' else docstrings(source, module_name(file))


def library_source(folder: pathlib.Path, file: str) -> str:
  """Source of a module; empty if it isn't UTF-8 or is a table."""
  try:
    source = (folder / file).read_text(encoding='utf-8')
  except UnicodeDecodeError:
    return ''
  letters = sum(map(len, re.findall('[A-Za-z]{3,}', source)))
  return '' if letters < _SMALLEST_WORD_SHARE * len(source) else source


def module_name(file: str) -> str:
  """Name of the module in a file of the library."""
  return file.removesuffix('.py').removesuffix('/__init__').replace('/', '.')


def docstrings(source: str, module: str) -> str:
  """Returns the docstrings of a module as one text, each after a heading for its class or function.

  The module is parsed but not imported. Returns '' if it has no docstrings or doesn't parse.
  """
  return '\n'.join(f'{heading}\n\n{text}\n' for heading, text in documented(source, module))


def documented(source: str, module: str) -> list[tuple[str, str]]:
  """(heading, docstring) of a module, its classes and functions: 'Module m', 'class C(B)', 'C.f(self)'; [] as `docstrings`."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # invalid escape sequences in the library's sources
    try:
      tree = ast.parse(source)
    except SyntaxError:
      return []
  return list(_sections(tree, f'Module {module}', prefix=''))


def _sections(node: ast.AST, heading: str, prefix: str) -> Iterator[tuple[str, str]]:
  """Yields (heading, docstring) of a module, class or function and of its public members."""
  text = ast.get_docstring(node) if isinstance(node, (*_FUNCTIONS, ast.ClassDef, ast.Module)) else None
  if text:
    yield heading, text
  if isinstance(node, _FUNCTIONS):
    return  # functions inside functions are not public
  for child in ast.iter_child_nodes(node):
    if isinstance(child, (ast.ClassDef, *_FUNCTIONS)):
      yield from _sections(child, _heading(child, prefix), f'{prefix}{child.name}.')


def _heading(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, prefix: str) -> str:
  if isinstance(node, _FUNCTIONS):
    return f'{prefix}{node.name}({ast.unparse(node.args)})'
  bases = ', '.join(map(ast.unparse, node.bases))
  return f'class {prefix}{node.name}({bases})' if bases else f'class {prefix}{node.name}'
