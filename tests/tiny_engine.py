"""Engines of tiny models for tests, and what they computed beside the full forward pass."""

import jax.numpy as jnp
import numpy as np

from mor_jax.inference.engine import Engine
from mor_jax.inference.requests import Request, Result
from mor_jax.inference.scheduler import Scheduler
from tests import tiny


class KeepingScheduler(Scheduler):
  """Also keeps, of every request that has ended, the logits of all its tokens (`keep_logits`)."""

  def __init__(self, *args, **options):
    super().__init__(*args, **options)
    self.logits: dict[Result, np.ndarray] = {}

  def _free(self, slot: int) -> None:
    self.logits[self._resident[slot]] = np.asarray(self._state.logits_NTV[slot])
    super()._free(slot)


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


def rows(results: list[Result], max_len: int) -> tuple[np.ndarray, np.ndarray]:
  """Prompts with their continuations (B, T), padded, and how many of each row's tokens were computed."""
  tokens_BT, computed_B = np.zeros((len(results), max_len), np.int32), []
  for row, result in enumerate(results):
    tokens = (*result.request.prompt, *result.tokens)
    tokens_BT[row, : len(tokens)] = tokens
    computed_B.append(len(tokens) - 1)
  return tokens_BT, np.array(computed_B)


def assert_as_full_forward(made, variables, scheduler, results, max_len, slack, atol=1e-4):
  """Logits and depths of the engine against the full threshold forward; returns its RoutingOutput per row."""
  tokens_BT, computed_B = rows(results, max_len)
  apply, routings = tiny.apply(made, 'threshold'), []
  for row, result in enumerate(results):  # one by one, as a random router draws by place in the batch
    full = apply(variables, jnp.asarray(tokens_BT[row : row + 1]), max_len=max_len, slack=slack)
    sampled = slice(len(result.request.prompt) - 1, computed_B[row])
    np.testing.assert_allclose(scheduler.logits[result][sampled], full.logits[0, sampled], atol=atol)
    if full.routing is not None:
      np.testing.assert_array_equal(result.depths, full.routing.depth_BT[0, : computed_B[row]])
    routings.append(full.routing)
  return routings, computed_B
