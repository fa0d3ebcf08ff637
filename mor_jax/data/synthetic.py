"""Tasks whose difficulty is known: rows made on the fly, of which every scored token says how hard it is.

`data.source='synthetic:NAME,KEY=VALUE...'`. The rows are endless, a function of their index alone, and need no
tokenizer: a task has a vocabulary of words. Whether an example is for training or for validation is decided by a
hash of what it asks about, so that no validation example can occur in training.

A control for routers, not a benchmark of models: here a token that needs k steps of computation needs k recursions,
so that depths can be compared with the truth.
"""

import dataclasses
import functools
import hashlib
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from mor_jax.config import ConfigError, DataConfig
from mor_jax.data.dataset import FORMAT_VERSION, Manifest, SplitCounts
from mor_jax.data.packing import ROW_ARRAYS
from mor_jax.data.tokenizer import END_OF_TEXT, Tokenizer

PREFIX = 'synthetic:'
ENDLESS = 2**31  # rows: at a million tokens a second of rows of 64, a day and a half
HELD_OUT = 16  # one example in so many is for validation
MOST_TRIES = 1000  # to find an example of a split, where one in HELD_OUT should be
UNKNOWN = '<unk>'
NOT_SCORED = -1  # difficulty of tokens that no loss is taken of
_LETTERS = 'abcdefghijklmnopqrstuvwxyz'

Row = dict[str, np.ndarray]


class Example(NamedTuple):
  """A document of a task.

  Attributes:
    words: its tokens, as words of the task's vocabulary.
    difficulty: of each token that is scored when it is predicted, else NOT_SCORED.
    about: what it asks about, which decides its split.
    targets: what is to be predicted where that is not the token itself, by place.
  """

  words: list[str]
  difficulty: list[int]
  about: str
  targets: Mapping[int, str] | None = None


@dataclasses.dataclass(frozen=True)
class Chase:
  """A mapping of nodes, then questions for its k-fold composition: k look-ups, each of which needs the one before.

  `nodes` facts 'n3>n5' in random order, a single cycle, then `questions` such as '2:n3': which node is 2 steps from n3?
  The answer '=n1' is predicted where the question stands and appears nowhere, so that nothing can be learned from
  earlier ones; its difficulty is k, and every k from 1 to `hops` is asked equally often. With `hidden=true` the question
  is 'b:n3' instead, and the document begins with what the letters stand for, 'b>2', anew for every document: how far
  to go is then in the context, not in the token.

  Words are pairs, and number first * nodes + second, for models with `embed_factor` = nodes.
  """

  nodes: int = 12
  hops: int = 4
  questions: int = 16
  hidden: bool = False

  def check(self) -> None:
    """Raises ValueError for sizes that make no task."""
    _at_least('nodes', self.nodes, 3)
    _at_least('hops', self.hops, 1)
    _at_least('questions', self.questions, 1)
    if self.hops >= self.nodes:
      raise ValueError(f'hops={self.hops} must be fewer than nodes={self.nodes}, or one comes round')
    if self.hops > len(_LETTERS):
      raise ValueError(f'hops={self.hops} must be at most {len(_LETTERS)}')

  @property
  def vocabulary(self) -> dict[str, int]:
    """Id of every word: facts, questions, answers, meanings of letters."""
    nodes, hops = range(self.nodes), range(1, self.hops + 1)
    firsts = [[f'n{a}>n{b}' for b in nodes] for a in nodes]
    firsts += [[f'{_LETTERS[k - 1] if self.hidden else k}:n{a}' for a in nodes] for k in hops]
    firsts += [[f'=n{a}' for a in nodes]]
    if self.hidden:
      firsts += [[f'{_LETTERS[letter - 1]}>{k}' for k in hops] for letter in hops]
    return {
      word: first * self.nodes + second
      for first, words in enumerate(firsts, start=1)  # the first of all are special tokens
      for second, word in enumerate(words)
    }

  def example(self, rng: np.random.Generator) -> Example:
    """A document."""
    cycle = rng.permutation(self.nodes)
    following = np.empty(self.nodes, int)
    following[cycle] = np.roll(cycle, -1)
    words, names = [], [str(k) for k in range(1, self.hops + 1)]
    if self.hidden:
      names = [_LETTERS[letter] for letter in rng.permutation(self.hops)]
      words += [f'{names[k]}>{k + 1}' for k in rng.permutation(self.hops)]
    words += [f'n{node}>n{following[node]}' for node in rng.permutation(self.nodes)]
    difficulty, targets = [NOT_SCORED] * (len(words) + 1), {}
    for hops in rng.permutation(np.arange(self.questions) % self.hops) + 1:
      node = int(rng.integers(self.nodes))
      words.append(f'{names[hops - 1]}:n{node}')
      for _ in range(hops):
        node = following[node]
      targets[len(words)] = f'=n{node}'
      difficulty.append(int(hops))
    return Example([*words, END_OF_TEXT], difficulty, f'{following.tolist()}', targets)


@dataclasses.dataclass(frozen=True)
class Permutations:
  """Where a token stands after k swaps: 'p3 s12 s13 = p2'.

  A place, k swaps of two of `places` places each, '=' and the place at the end, which is scored. Difficulty k; a
  model may compose swaps in pairs, so that k bounds the depth from above.
  """

  places: int = 5
  hops: int = 4

  def check(self) -> None:
    """Raises ValueError for sizes that make no task."""
    _at_least('places', self.places, 3)
    _at_least('hops', self.hops, 1)
    if self.places > 9:
      raise ValueError(f'places={self.places} must be at most 9')

  @property
  def vocabulary(self) -> dict[str, int]:
    """Places, swaps, '='."""
    return _numbered(
      [*(f'p{place}' for place in range(self.places)), *(f's{a}{b}' for a, b in self._swaps), '=']
    )

  @property
  def _swaps(self) -> list[tuple[int, int]]:
    return [(a, b) for a in range(self.places) for b in range(a + 1, self.places)]

  def example(self, rng: np.random.Generator) -> Example:
    """A document."""
    place, hops = int(rng.integers(self.places)), int(rng.integers(1, self.hops + 1))
    words = [f'p{place}']
    for index in rng.integers(len(self._swaps), size=hops):
      a, b = self._swaps[index]
      place = {a: b, b: a}.get(place, place)
      words.append(f's{a}{b}')
    words += ['=', f'p{place}']
    return Example(words, [NOT_SCORED] * (hops + 2) + [hops], ' '.join(words))


@dataclasses.dataclass(frozen=True)
class Chains:
  """A chain of k operations modulo `modulus`: '3 +2 *4 = 6'. The number at the end is scored, with difficulty k."""

  modulus: int = 7
  hops: int = 4

  def check(self) -> None:
    """Raises ValueError for sizes that make no task."""
    _at_least('modulus', self.modulus, 3)
    _at_least('hops', self.hops, 1)

  @property
  def vocabulary(self) -> dict[str, int]:
    """Numbers, operations, '='."""
    numbers = range(self.modulus)
    return _numbered(
      [*map(str, numbers), *(f'+{n}' for n in numbers[1:]), *(f'*{n}' for n in numbers[2:]), '=']
    )

  def example(self, rng: np.random.Generator) -> Example:
    """A document."""
    value, hops = int(rng.integers(self.modulus)), int(rng.integers(1, self.hops + 1))
    words = [str(value)]
    for is_sum in rng.integers(2, size=hops):
      number = int(rng.integers(1 if is_sum else 2, self.modulus))
      value = (value + number if is_sum else value * number) % self.modulus
      words.append(f'{"+" if is_sum else "*"}{number}')
    words += ['=', str(value)]
    return Example(words, [NOT_SCORED] * (hops + 2) + [hops], ' '.join(words))


@dataclasses.dataclass(frozen=True)
class Copy:
  """Filler of difficulty 0: `length` random words, ':', and the same words again, which are scored."""

  length: int = 8
  words: int = 16

  def check(self) -> None:
    """Raises ValueError for sizes that make no task."""
    _at_least('length', self.length, 1)
    _at_least('words', self.words, 2)

  @property
  def vocabulary(self) -> dict[str, int]:
    """Words and ':'."""
    return _numbered([*(f'w{word}' for word in range(self.words)), ':'])

  def example(self, rng: np.random.Generator) -> Example:
    """A document."""
    told = [f'w{word}' for word in rng.integers(self.words, size=self.length)]
    return Example([*told, ':', *told], [NOT_SCORED] * (self.length + 1) + [0] * self.length, ' '.join(told))


TASKS: dict[str, type] = {'chase': Chase, 'permutations': Permutations, 'chains': Chains, 'copy': Copy}


@dataclasses.dataclass(frozen=True)
class Source:
  """What `data.source` asks for.

  Attributes:
    task: a task of `TASKS`.
    copy: share of the documents that are filler instead.
    rows: validation rows.
    seed: other examples for another seed.
  """

  task: Any
  copy: float = 0.0
  rows: int = 256
  seed: int = 0

  @functools.cached_property
  def vocabulary(self) -> dict[str, int]:
    """Id of every word."""
    words = {END_OF_TEXT: 0, UNKNOWN: 1, **self.task.vocabulary}
    if self.copy:
      others = [word for word in Copy().vocabulary if word not in words]
      words |= _numbered(others, first=max(words.values()) + 1)
    return words

  def row(self, split: str, index: int, seq_len: int) -> Row:
    """A row (T,): as many examples as fit, each a segment of its own; see `SyntheticRows`."""
    rng = np.random.default_rng((self.seed, int(split == 'validation'), index))
    row = {name: np.zeros(seq_len, np.int32) for name in (*ROW_ARRAYS, *SyntheticDataset.extras)}
    row['difficulty'] -= 1
    begin, segment = 0, 0
    while (example := self._example(rng, split)) and begin + (size := len(example.words)) <= seq_len:
      segment += 1
      place = slice(begin, begin + size)
      words = [(example.targets or {}).get(index, word) for index, word in enumerate(example.words)]
      row['tokens'][place] = [self.vocabulary[word] for word in example.words]
      row['targets'][place] = [self.vocabulary[word] for word in words]
      row['segment_ids'][place], row['positions'][place] = segment, np.arange(size)
      row['difficulty'][place] = example.difficulty
      begin += size
    row['loss_mask'][:] = row['difficulty'] >= 0
    return row

  def _example(self, rng: np.random.Generator, split: str) -> Example:
    """The next document that belongs to the split."""
    for _ in range(MOST_TRIES):
      task = Copy() if self.copy and rng.random() < self.copy else self.task
      example = task.example(rng)
      digest = hashlib.blake2b(f'{self.seed} {example.about}'.encode(), digest_size=8).digest()
      if (int.from_bytes(digest) % HELD_OUT == 0) == (split == 'validation'):
        return example
    raise ConfigError(
      f'{self.task} has so few different examples that none of them is left for {split}; make it larger'
    )

  def tokenizer(self) -> Tokenizer:
    """The task's words as a tokenizer, which only those need who read or write its texts."""
    backend = tokenizers.Tokenizer(models.WordLevel(self.vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([END_OF_TEXT])
    return Tokenizer(backend, END_OF_TEXT, None)


def parse(source: str) -> Source:
  """What 'synthetic:NAME,KEY=VALUE...' asks for. Raises ConfigError for what is no task."""
  name, *settings = source.removeprefix(PREFIX).split(',')
  if name not in TASKS:
    raise ConfigError(f'data.source={source}: {name!r} is not one of the tasks {", ".join(TASKS)}')
  made: dict[type, dict[str, Any]] = {TASKS[name]: {}, Source: {}}
  kinds: dict[str, tuple[type, type]] = {
    key: (owner, kind)
    for owner in made
    for key, kind in typing.get_type_hints(owner).items()
    if key != 'task'
  }
  for setting in settings:
    key, equals, text = setting.partition('=')
    if not equals or key not in kinds:
      raise ConfigError(
        f'data.source={source}: {setting!r} is no setting of {name}; it has {", ".join(sorted(kinds))}, '
        f'each written as KEY=VALUE'
      )
    owner, kind = kinds[key]
    try:
      made[owner][key] = {'true': True, 'false': False}[text] if kind is bool else kind(text)
    except (ValueError, KeyError):
      kind_name = 'true or false' if kind is bool else f'a number ({kind.__name__})'
      raise ConfigError(f'data.source={source}: {key}={text} must be {kind_name}') from None
  try:
    task = TASKS[name](**made[TASKS[name]])
    task.check()
    found = Source(task, **made[Source])
    _at_least('rows', found.rows, 1)
    _at_least('seed', found.seed, 0)
    if not 0 <= found.copy < 1:
      raise ValueError(f'copy={found.copy} must be in [0, 1)')
  except ValueError as error:
    raise ConfigError(f'data.source={source}: {error}') from None
  return found


def _numbered(words: Sequence[str], first: int = 2) -> dict[str, int]:
  """Ids of words in their order, after those of the special tokens."""
  return {word: index for index, word in enumerate(words, start=first)}


def _at_least(name: str, value: int, least: int) -> None:
  if value < least:
    raise ValueError(f'{name}={value} must be at least {least}')


class SyntheticRows(Sequence):
  """The rows of a split by index.

  `rows[i]` is a dict of int32 arrays (T,): 'tokens', 'segment_ids' and 'positions' as those of a prepared dataset;
  'targets', what is to be predicted in a token's place; 'loss_mask', 1 for tokens that are scored when they are
  predicted; and their 'difficulty', else NOT_SCORED.
  """

  def __init__(self, source: Source, split: str, seq_len: int):
    self._row: Callable[[int], Row] = lambda index: source.row(split, index, seq_len)
    self._length = source.rows if split == 'validation' else ENDLESS

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> Row:  # type: ignore[override]  # slices are not needed
    return self._row(range(len(self))[index])


@dataclasses.dataclass(frozen=True)
class SyntheticDataset:
  """A task as a dataset; in place of a `PreparedDataset`. Its manifest counts the validation split exactly."""

  source: Source
  tokenizer: Tokenizer
  manifest: Manifest
  extras: ClassVar[tuple[str, ...]] = ('targets', 'loss_mask', 'difficulty')

  def identity(self) -> dict[str, Any]:
    """What all processes of a training must find alike."""
    return {"the data's documents_digest": self.manifest.documents_digest}

  def rows(self, split: str) -> SyntheticRows:
    """The rows of 'train' or 'validation'."""
    return SyntheticRows(self.source, split, self.manifest.seq_len)


def open_dataset(data: DataConfig) -> SyntheticDataset:
  """The task of `data.source` as a dataset.

  Raises:
    ConfigError: there is no such task, or its examples are longer than a row.
  """
  source, length = parse(data.source), data.seq_len
  longest = max(len(source.task.example(np.random.default_rng(seed)).words) for seed in range(64))
  if longest > length:
    raise ConfigError(
      f'data.seq_len={length} is too short for data.source={data.source}, whose examples have up to {longest} '
      f'tokens; set data.seq_len={longest}, or ask for smaller ones'
    )
  tokenizer = source.tokenizer()
  rows = [source.row('validation', index, length) for index in range(source.rows)]
  tokens = sum(int((row['segment_ids'] > 0).sum()) for row in rows)
  validation = SplitCounts(
    documents=sum(int(row['segment_ids'].max()) for row in rows),
    bytes=sum(len(tokenizer.decode(row['tokens'][row['segment_ids'] > 0].tolist())) for row in rows),
    tokens=tokens,
    targets=sum(int(row['loss_mask'].sum()) for row in rows),
    rows=len(rows),
    cut=0,
  )
  share = ENDLESS / len(rows)
  train = SplitCounts(
    **{
      name: round(value * share) for name, value in dataclasses.asdict(validation).items() if name != 'rows'
    },
    rows=ENDLESS,
  )
  manifest = Manifest(
    format_version=FORMAT_VERSION,
    source=data.source,
    documents_digest=hashlib.sha256(repr(source).encode()).hexdigest(),
    seq_len=length,
    packing='examples',
    tokenizer='words',
    separator=END_OF_TEXT,
    vocab_size=tokenizer.vocab_size,
    tokenizer_digest=tokenizer.digest,
    dropped={},
    dropped_examples=[],
    splits={'train': train, 'validation': validation},
    files={},
  )
  return SyntheticDataset(source, tokenizer, manifest)
