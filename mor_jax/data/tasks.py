"""Tasks whose difficulty is known: what an example says, what is to be answered, and how many steps that takes.

A control for routers, not a benchmark of models: here a token that needs k steps of computation needs k recursions,
so that depths can be compared with the truth. `synthetic.py` makes rows of them.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from mor_jax.data.tokenizer import END_OF_TEXT

NOT_SCORED = -1  # difficulty of tokens that no loss is taken of
_LETTERS = 'abcdefghijklmnopqrstuvwxyz'
MOST_WORDS = 1000


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


class Task(Protocol):
  """What all tasks have."""

  def check(self) -> None:
    """Raises ValueError for sizes that make no task."""

  @property
  def vocabulary(self) -> dict[str, int]:
    """Id of every word, above those of the two special tokens."""

  @property
  def lengths(self) -> tuple[int, int]:
    """Fewest and most tokens that an example has."""

  def example(self, rng: np.random.Generator) -> Example:
    """A document."""


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
    at_least('nodes', self.nodes, 3)
    at_least('hops', self.hops, 1)
    at_least('questions', self.questions, 1)
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
    return paired(firsts, self.nodes)

  @property
  def lengths(self) -> tuple[int, int]:
    """Fewest and most tokens that an example has."""
    length = self.hidden * self.hops + self.nodes + self.questions + 1
    return length, length

  def example(self, rng: np.random.Generator) -> Example:
    """A document."""
    cycle = rng.permutation(self.nodes)
    places = np.argsort(cycle)
    following = cycle[(places + 1) % self.nodes].tolist()
    words, names = [], [str(k) for k in range(1, self.hops + 1)]
    if self.hidden:
      names = [_LETTERS[letter] for letter in rng.permutation(self.hops)]
      words += [f'{names[k]}>{k + 1}' for k in rng.permutation(self.hops)]
    words += [f'n{node}>n{following[node]}' for node in rng.permutation(self.nodes).tolist()]
    hops = rng.permutation(np.arange(self.questions) % self.hops) + 1
    asked = rng.integers(self.nodes, size=self.questions)
    answers = cycle[(places[asked] + hops) % self.nodes].tolist()
    difficulty = [NOT_SCORED] * (len(words) + 1) + hops.tolist()
    targets = {len(words) + index: f'=n{node}' for index, node in enumerate(answers, start=1)}
    words += [f'{names[k - 1]}:n{node}' for k, node in zip(hops.tolist(), asked.tolist(), strict=True)]
    return Example([*words, END_OF_TEXT], difficulty, f'{following}', targets)


@dataclasses.dataclass(frozen=True)
class Automaton:
  """Which state a random automaton reaches: a transition for each letter of a word, each of which needs the state before.

  The transitions 'a3>5' of every letter and state in random order, each letter a permutation of the `states`, then
  `questions` such as 'aba:3': where does it end if it reads aba in state 3? The answer '=5' is predicted where the
  question stands and appears nowhere; its difficulty is the length of the word, and every length from 1 to `hops` is
  asked equally often.

  Words are pairs, and number first * states + second, for models with `embed_factor` = states.
  """

  states: int = 8
  letters: int = 2
  hops: int = 4
  questions: int = 16

  def check(self) -> None:
    """Raises ValueError for sizes that make no task."""
    at_least('states', self.states, 3)
    at_least('letters', self.letters, 2)
    at_least('hops', self.hops, 1)
    at_least('questions', self.questions, 1)
    if (words := sum(self.letters**size for size in range(1, self.hops + 1))) > MOST_WORDS:
      raise ValueError(
        f'letters={self.letters} and hops={self.hops} make {words} words to read; at most {MOST_WORDS} may be'
      )

  @functools.cached_property
  def _read(self) -> list[str]:
    """All words that may be asked for, by length."""
    letters = _LETTERS[: self.letters]
    return [
      ''.join(word) for size in range(1, self.hops + 1) for word in itertools.product(letters, repeat=size)
    ]

  @property
  def vocabulary(self) -> dict[str, int]:
    """Id of every word: transitions, questions, answers."""
    states = range(self.states)
    firsts = [[f'{letter}{a}>{b}' for b in states] for letter in _LETTERS[: self.letters] for a in states]
    firsts += [[f'{word}:{a}' for a in states] for word in self._read]
    firsts += [[f'={a}' for a in states]]
    return paired(firsts, self.states)

  @property
  def lengths(self) -> tuple[int, int]:
    """Fewest and most tokens that an example has."""
    length = self.letters * self.states + self.questions + 1
    return length, length

  def example(self, rng: np.random.Generator) -> Example:
    """A document."""
    following = {letter: rng.permutation(self.states).tolist() for letter in _LETTERS[: self.letters]}
    facts = [f'{letter}{a}>{b}' for letter, ends in following.items() for a, b in enumerate(ends)]
    words = [facts[index] for index in rng.permutation(len(facts)).tolist()]
    hops = (rng.permutation(np.arange(self.questions) % self.hops) + 1).tolist()
    difficulty, targets = [NOT_SCORED] * (len(words) + 1) + hops, {}
    begins = rng.integers(self.states, size=self.questions).tolist()
    drawn = rng.integers(self.letters, size=(self.questions, self.hops)).tolist()
    for size, state, indexes in zip(hops, begins, drawn, strict=True):
      letters = ''.join([_LETTERS[index] for index in indexes[:size]])
      words.append(f'{letters}:{state}')
      for letter in letters:
        state = following[letter][state]
      targets[len(words)] = f'={state}'
    return Example([*words, END_OF_TEXT], difficulty, f'{following}', targets)


@dataclasses.dataclass(frozen=True)
class Permutations:
  """Where a token stands after k moves of all places: 'p3 m20413 m14320 = p2'.

  A place, k permutations of `places` places each ('m20413' moves what stands at 0 to 2, at 1 to 0, and so on), '=' and
  the place at the end, which is scored. Difficulty k; a model may compose moves in pairs, so that k bounds the depth
  from above. With `swaps=true` the moves are swaps of two places, most of which leave a token where it is: a much
  shallower task.
  """

  places: int = 5
  hops: int = 4
  swaps: bool = False

  def check(self) -> None:
    """Raises ValueError for sizes that make no task."""
    at_least('places', self.places, 3)
    at_least('hops', self.hops, 1)
    most = 9 if self.swaps else 6
    if self.places > most:
      raise ValueError(f'places={self.places} must be at most {most}')

  @property
  def vocabulary(self) -> dict[str, int]:
    """Places, moves, '='."""
    return numbered([*(f'p{place}' for place in range(self.places)), *map(_named, self._moves), '='])

  @functools.cached_property
  def _moves(self) -> list[tuple[int, ...]]:
    """Where what stands at each place goes; never all of them where they are."""
    stay = tuple(range(self.places))
    if self.swaps:
      pairs = itertools.combinations(stay, 2)
      return [tuple({a: b, b: a}.get(place, place) for place in stay) for a, b in pairs]
    return [move for move in itertools.permutations(stay) if move != stay]

  @property
  def lengths(self) -> tuple[int, int]:
    """Fewest and most tokens that an example has."""
    return 4, self.hops + 3

  def example(self, rng: np.random.Generator) -> Example:
    """A document."""
    place, hops = int(rng.integers(self.places)), int(rng.integers(1, self.hops + 1))
    words = [f'p{place}']
    for index in rng.integers(len(self._moves), size=hops).tolist():
      move = self._moves[index]
      place = move[place]
      words.append(_named(move))
    words += ['=', f'p{place}']
    return Example(words, [NOT_SCORED] * (hops + 2) + [hops], ' '.join(words))


def _named(move: Sequence[int]) -> str:
  return f'm{"".join(map(str, move))}'


@dataclasses.dataclass(frozen=True)
class Chains:
  """A chain of k operations modulo `modulus`: '3 +2 *4 = 6'. The number at the end is scored, with difficulty k."""

  modulus: int = 7
  hops: int = 4

  def check(self) -> None:
    """Raises ValueError for sizes that make no task."""
    at_least('modulus', self.modulus, 3)
    at_least('hops', self.hops, 1)

  @property
  def vocabulary(self) -> dict[str, int]:
    """Numbers, operations, '='."""
    return numbered([*map(str, range(self.modulus)), *self._operations, '='])

  @property
  def _operations(self) -> list[str]:
    return [*(f'+{n}' for n in range(1, self.modulus)), *(f'*{n}' for n in range(2, self.modulus))]

  @property
  def lengths(self) -> tuple[int, int]:
    """Fewest and most tokens that an example has."""
    return 4, self.hops + 3

  def example(self, rng: np.random.Generator) -> Example:
    """A document."""
    value, hops = int(rng.integers(self.modulus)), int(rng.integers(1, self.hops + 1))
    words = [str(value)]
    operations = self._operations
    for index in rng.integers(len(operations), size=hops).tolist():
      words.append(word := operations[index])
      number = int(word[1:])
      value = (value + number if word[0] == '+' else value * number) % self.modulus
    words += ['=', str(value)]
    return Example(words, [NOT_SCORED] * (hops + 2) + [hops], ' '.join(words))


@dataclasses.dataclass(frozen=True)
class Copy:
  """Filler of difficulty 0: `length` random words, ':', and the same words again, which are scored."""

  length: int = 8
  words: int = 16

  def check(self) -> None:
    """Raises ValueError for sizes that make no task."""
    at_least('length', self.length, 1)
    at_least('words', self.words, 2)

  @property
  def vocabulary(self) -> dict[str, int]:
    """Words and ':'."""
    return numbered([*(f'w{word}' for word in range(self.words)), ':'])

  @property
  def lengths(self) -> tuple[int, int]:
    """Fewest and most tokens that an example has."""
    length = 2 * self.length + 1
    return length, length

  def example(self, rng: np.random.Generator) -> Example:
    """A document."""
    told = [f'w{word}' for word in rng.integers(self.words, size=self.length)]
    return Example([*told, ':', *told], [NOT_SCORED] * (self.length + 1) + [0] * self.length, ' '.join(told))


TASKS: dict[str, type[Task]] = {
  'chase': Chase,
  'automaton': Automaton,
  'permutations': Permutations,
  'chains': Chains,
  'copy': Copy,
}


def numbered(words: Sequence[str], first: int = 2) -> dict[str, int]:
  """Ids of words in their order, after those of the special tokens."""
  return {word: index for index, word in enumerate(words, start=first)}


def paired(firsts: Sequence[Sequence[str]], width: int) -> dict[str, int]:
  """Ids first * width + second of words that are pairs; the first of all are those of the special tokens."""
  return {
    word: first * width + second
    for first, words in enumerate(firsts, start=1)
    for second, word in enumerate(words)
  }


def at_least(name: str, value: int, least: int) -> None:
  """Raises ValueError for a number that is too small."""
  if value < least:
    raise ValueError(f'{name}={value} must be at least {least}')
