"""Engines of tiny models for tests, and what they computed beside the full forward pass."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from mor_jax.inference.engine import Engine
from mor_jax.inference.requests import Request, Result
from mor_jax.inference.scheduler import Scheduler
from mor_jax.model.transformer import ModelOutput
from tests import tiny


class KeepingScheduler(Scheduler):
  """Also keeps, of every request that has ended, the logits of all its tokens (`keep_logits`)."""

  def __init__(self, *args, **options):
    super().__init__(*args, **options)
    self.logits: dict[Result, np.ndarray] = {}

  def _free(self, slot: int, is_running: bool = True) -> None:
    self.logits[self._resident[slot]] = np.asarray(self._state.logits_NTV[slot])
    super()._free(slot, is_running)


def engine(made, variables, **options) -> Engine:
  """A small engine, by default compiled as one scan over layers."""
  return Engine(made, variables, **{'slots': 3, 'max_len': 64, 'chunks': (16,), 'unroll': False, **options})


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
  """Random token ids."""
  return tuple(np.random.default_rng(seed).integers(0, tiny.SHAPE['vocab_size'], length).tolist())


def requests(lengths: tuple[int, ...], **options) -> list[Request]:
  """Requests with random prompts of these lengths, each with a seed of its own."""
  return [
    Request(prompt(length, seed=index), **{'seed': index, **options}) for index, length in enumerate(lengths)
  ]


@dataclasses.dataclass(frozen=True)
class Row:
  """A request's answer beside the full forward pass (`ModelOutput`) of its tokens.

  Attributes:
    tokens_T: prompt and continuation, padded.
    computed: tokens of it that the engine computed: all but the last.
  """

  result: Result
  tokens_T: np.ndarray
  computed: int
  full: ModelOutput


def rows(made, variables, results: list[Result], max_len: int, slack: float) -> list[Row]:
  """The results with full forward passes, one by one, as a random router draws by place in the batch."""
  apply, found = tiny.apply(made, 'threshold'), []
  for result in results:
    tokens = (*result.request.prompt, *result.tokens)
    tokens_T = np.zeros((max_len,), np.int32)
    tokens_T[: len(tokens)] = tokens
    full = apply(variables, jnp.asarray(tokens_T[None]), max_len=max_len, slack=slack)
    found.append(Row(result, tokens_T, len(tokens) - 1, full))
  return found


def assert_as_full_forward(scheduler: KeepingScheduler, found: list[Row], atol=1e-4):
  """Logits and depths of the engine are those of the full threshold forward."""
  for row in found:
    sampled = slice(len(row.result.request.prompt) - 1, row.computed)
    np.testing.assert_allclose(scheduler.logits[row.result][sampled], row.full.logits[0, sampled], atol=atol)
    if row.full.routing is not None:
      np.testing.assert_array_equal(row.result.depths, row.full.routing.depth_BT[0, : row.computed])
