"""The inference engine: prefill prompts, insert them into slots, generate for all slots at once.

The vanilla model, recursive models (as many passes as they have recursions) and MoR run in the same
engine: they differ in how often a token comes back to the shared block.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mor_jax.config import ConfigError, ModelConfig
from mor_jax.inference import balance, costs, shards, speculation, ticks
from mor_jax.inference import prefill as prefill_lib
from mor_jax.inference import state as state_lib
from mor_jax.inference.limits import Limits
from mor_jax.inference.prefill import Filling, Prefix
from mor_jax.inference.requests import Request
from mor_jax.inference.speculation import Drafting
from mor_jax.inference.state import DecodeState, Rules
from mor_jax.model import cache as cache_lib
from mor_jax.model import cached_attention, decode
from mor_jax.model.transformer import Transformer, parameter_axes
from mor_jax.parallel import device_memory
from mor_jax.parallel import mesh as mesh_lib

DEFAULT_CHUNKS = (16, 64, 256)
DRAFT_LANES = (1, 4)  # numbers of sequences that are drafted together, beside all slots
NOTHING = Request((0,))  # in lanes without a prompt


class Engine:
  """A model ready to generate.

  Attributes:
    slots: sequences that can be resident together.
    max_len: longest sequence, prompt included.
    steps: most recursions of a token.
    batches: sizes of the batches of a tick, on each part of the mesh.
    prefill_lanes: prompts that are computed together.
    chunks: numbers of tokens in which prompts are computed, rising.
    parts: parts of the mesh, the first of which has the first slots and lanes, and so on.
    speculate: tokens of a draft; 0: there are none.
    draft_lanes: numbers of sequences that are drafted together, rising, on each part.
    batch_invariant: whether every sequence is computed by the same programs, in the same pieces, whoever is beside it.
  """

  def __init__(
    self,
    model: Transformer,
    variables: dict[str, Any],
    slots: int = 8,
    max_len: int = 512,
    lanes: int | None = None,
    boundary_lanes: int | None = None,
    slack: float | None = None,
    cache_dtype: str | None = None,
    max_recursions: int | None = None,
    prefill_lanes: int | None = None,
    chunks: Sequence[int] = DEFAULT_CHUNKS,
    unroll: bool | None = None,
    read: str | None = None,
    keep_logits: bool = False,
    top_logprobs: int | None = None,
    mesh: Mesh | None = None,
    speculate: int = 0,
    draft_recursions: int = 1,
    batch_invariant: bool = False,
    measure: bool = False,
  ):
    """Lays out the caches and brings the variables into the form that decoding reads.

    Args:
      lanes: sequences that one pass of the shared block takes; default: all slots.
      boundary_lanes: sequences that pass the last and first layer together; default: a quarter of the lanes
        on CPU, else as many.
      slack: places of a recursion step per token it takes on average; default: model.threshold_slack.
      cache_dtype: 'float32', 'bfloat16', 'int8' or 'int4'; default: the model's dtype.
      max_recursions: fewer recursions than the model was trained with; saves their caches too.
      prefill_lanes: prompts computed together; default: 4, or fewer if there are fewer slots.
      chunks: numbers of tokens in which prompts are computed, each compiled once.
      unroll: compile layers separately; default: on CPU.
      read: how the cache is read (`cached_attention`); default: 'lanes' on CPU, 'groups' on TPU, else 'gather'.
      keep_logits: keep the logits of every token in the state, for analysis.
      top_logprobs: keep the log-probability of every token, prompts included, and so many of the likeliest tokens
        in its place; 0: no others; None: nothing, which saves the head's work on prompts.
      mesh: devices to use (`shards`); sizes are those of all parts together. None: where the variables lie.
      speculate: tokens of a draft (`speculation`), for calls of `generate` that draft; 0: there are none.
      draft_recursions: recursions that write it.
      batch_invariant: give the same bits whatever else is computed: prompts take one size of chunks, the middle one, and
        all lanes. Costs time where prompts are short or come one by one.
      measure: choose those of `lanes` and `boundary_lanes` that are None by what passes cost on this device, which takes
        some seconds (`balance`). Another start may choose others, and sums of floats then differ by rounding.

    Raises:
      ConfigError: a size that cannot work, or two settings that exclude each other.
    """
    config, on_cpu = model.config, jax.default_backend() == 'cpu'
    asked = lanes, boundary_lanes
    if measure:
      costs.check(config, batch_invariant, mesh is not None)
    lanes = slots if lanes is None else lanes
    parts = shards.count(mesh)
    slots_each, lanes_each = shards.share(mesh, 'slots', slots), shards.share(mesh, 'lanes', lanes)
    if boundary_lanes is None:
      boundary_lanes = (-(-lanes_each // 4) if on_cpu else lanes_each) * parts
    if prefill_lanes is None:
      prefill_lanes = min(4, slots_each) * parts
    sizes = {'slots': slots, 'lanes': lanes, 'boundary_lanes': boundary_lanes, 'prefill_lanes': prefill_lanes}
    for name, value in {**sizes, 'chunks': min(chunks)}.items():
      if value < 1:
        raise ConfigError(f'{name}={value} is not allowed: must be >= 1')
    for name in ('boundary_lanes', 'prefill_lanes'):
      shards.share(mesh, name, sizes[name])
    if mesh is not None:
      mesh_lib.check_split(mesh, config, ('tensor',))
    if max_len < 2:
      raise ConfigError(f'max_len={max_len} is not allowed: must be >= 2, a token and its successor')
    if top_logprobs is not None and not 0 <= top_logprobs <= config.vocab_size:
      raise ConfigError(
        f'top_logprobs={top_logprobs} is not allowed: must be from 0 to the {config.vocab_size} ids'
      )
    if max(lanes, boundary_lanes) > slots:
      raise ConfigError(f'lanes={lanes} and boundary_lanes={boundary_lanes} must be at most slots={slots}')
    cache_dtype = cache_dtype or config.dtype
    if cache_dtype not in cache_lib.DTYPES:
      raise ConfigError(f'cache_dtype={cache_dtype} is not one of {", ".join(cache_lib.DTYPES)}')
    read = read or {'cpu': 'lanes', 'tpu': 'groups'}.get(jax.default_backend(), 'gather')
    if read not in cached_attention.READS:
      raise ConfigError(f'read={read} is not one of {", ".join(cached_attention.READS)}')
    if batch_invariant and speculate:
      raise ConfigError(
        f'batch_invariant cannot be used with speculate={speculate}: how many are drafted together depends on who is there'
      )
    slack = config.threshold_slack if slack is None else slack
    steps = recursions_of(config, max_recursions)
    tiled = jax.default_backend() == 'tpu' and (mesh is None or mesh.shape['tensor'] == 1)
    layout = cache_lib.make_layout(config, max_len, slack, steps, tiled)
    self.cached = decode.CachedModel(config, layout, on_cpu if unroll is None else unroll, read)
    prepare = functools.partial(decode.prepare, self.cached)
    self.params = shards.prepare(mesh, parameter_axes(config), prepare, variables)
    self.slots, self.max_len, self.steps = slots, max_len, steps
    self._limits = Limits(config, max_len, steps, speculate)
    speculation.check(speculate, draft_recursions, steps)
    self.speculate, self._draft_recursions = speculate, draft_recursions
    # Each is another program. Which part of a mesh has the sequences is not asked.
    self.draft_lanes = tuple(sorted({min(n, slots_each) for n in DRAFT_LANES} | {slots_each}))
    if parts > 1:
      self.draft_lanes = (slots_each,)
    self.parts, self._mesh = parts, mesh
    self._device = shards.device_of(self.params) if mesh is None else None
    self.batches = ticks.Batches(lanes_each, boundary_lanes // parts)
    if measure and None in asked:
      of = costs.measure(self.cached, self.params, slots, cache_dtype)
      shares = config.step_capacities if config.kind == 'mor' else (1.0,) * steps
      self.batches = balance.choose(of, slots, shares[:steps], *asked)
    self.prefill_lanes = prefill_lanes
    self.chunks = tuple(sorted({min(chunk, max_len) for chunk in chunks}))
    self.batch_invariant = batch_invariant
    if batch_invariant:
      self.chunks = (self.chunks[len(self.chunks) // 2],)
    self._dtype, self._keep_logits, self.top_logprobs = cache_dtype, keep_logits, top_logprobs

  # ---- what runs on the device ----

  def init_state(self) -> DecodeState:
    """A state with all slots idle."""
    sizes = self.slots, self._dtype, self._keep_logits, self.parts, self.top_logprobs
    return self._make(state_lib.init_state, self.cached, *sizes)

  def state_bytes(self) -> int:
    """What `init_state` allocates on each device, most of it keys and values, in bytes."""
    return device_memory.bytes_on_a_device(shards.placed(self._mesh, jax.eval_shape(self.init_state)))

  def _make(self, function: Callable[..., Any], *arguments: Any) -> Any:
    made = shards.make(self._mesh, function, *arguments)
    return shards.bound(made, self._device)

  def part_of(self, slot: int) -> int:
    """The part of the mesh that has a slot."""
    return slot // (self.slots // self.parts)

  def lanes_for(self, prompts: int, is_scored: bool) -> int:
    """Lanes that each part computes so many prompts in: one for one, else all, since each number is another program.

    Prompts to be scored, which seldom come alone, always take all.
    """
    is_scored &= self.top_logprobs is not None
    is_single = prompts == 1 and not is_scored and not self.batch_invariant
    return 1 if is_single else self.prefill_lanes // self.parts

  def begin(
    self,
    requests: Sequence[Request | None],
    state: DecodeState | None = None,
    reused: Sequence[tuple[int, int] | None] = (),
  ) -> Filling:
    """Prompts of up to `prefill_lanes` requests, to be computed together by `fill`, each but for its last token.

    Each part of the mesh has as many of the lanes, `lanes_for` its prompts.

    Args:
      requests: those of the lanes, in order; None: nothing.
      state: whose slots hold beginnings of the prompts.
      reused: for each lane the slot, of the same part of the mesh, and how many of its tokens begin the prompt.
    """
    if len(requests) > self.prefill_lanes:
      raise ValueError(f'{len(requests)} prompts are more than the {self.prefill_lanes} lanes of prefill')
    is_scored = any(request is not None and request.prompt_logprobs for request in requests)
    is_scored &= self.top_logprobs is not None
    lanes = self.parts * self.lanes_for(-(-len(requests) // self.parts), is_scored)
    requests = [*requests, *[None] * (lanes - len(requests))]
    rules = [self.rules(request or NOTHING) for request in requests]
    budget = (
      np.array([rule.recursions_N for rule in rules], np.int32),
      np.array([rule.shift_N for rule in rules], np.float32),
    )
    sizes = lanes, self._dtype, self.parts, self.top_logprobs if is_scored else None
    prefix = self._make(prefill_lib.empty, self.cached, *sizes)
    known = [entry[1] if entry else 0 for entry in reused] + [0] * (lanes - len(reused))
    if any(known):
      each = self.slots // self.parts
      slots = [entry[0] % each if entry else 0 for entry in reused] + [0] * (lanes - len(reused))
      prefix = _reuse(self._mesh, prefix, state, np.array(slots, np.int32), np.array(known, np.int32))
    pairs = list(zip(requests, known, strict=True))
    left = [list(request.prompt[length:-1]) if request else [] for request, length in pairs]
    following = [list(request.prompt[length + 1 :]) if request else [] for request, length in pairs]
    return Filling(prefix, left, following, budget, is_scored)

  def fill(self, filling: Filling, most: int | None = None) -> int:
    """Computes the next chunk of every lane.

    Args:
      most: tokens of a lane; more than the smallest chunk. None: no limit.

    Returns:
      Tokens of the longest lane that are left.
    """
    longest = max(map(len, filling.left))
    if not longest:
      return 0
    size = self._chunk(longest, most)
    lengths_B = np.array([min(size, len(tokens)) for tokens in filling.left], np.int32)
    tokens_BC, next_BC = _filled(filling.left, size), _filled(filling.following, size)
    filling.left = [tokens[size:] for tokens in filling.left]
    filling.following = [tokens[size:] for tokens in filling.following]
    scored = next_BC if filling.is_scored else None
    filling.prefix, _ = prefill_lib.extend(
      self.cached, self._mesh, self.params, filling.prefix, tokens_BC, lengths_B, filling.budget, scored
    )
    return max(longest - size, 0)

  def _chunk(self, longest: int, most: int | None) -> int:
    """The number of tokens to compute next: as many as are left, unless the chunk for it would be mostly empty."""
    allowed = [chunk for chunk in self.chunks if most is None or chunk <= most] or self.chunks[:1]
    enough = next((chunk for chunk in allowed if chunk >= longest), allowed[-1])
    if enough <= 2 * longest:
      return enough
    return max((chunk for chunk in allowed if chunk <= longest), default=allowed[0])

  def prefill(self, requests: Sequence[Request | None]) -> Prefix:
    """Computes the prompts of up to `prefill_lanes` requests together; see `begin`."""
    filling = self.begin(requests)
    while self.fill(filling):
      pass
    return filling.prefix

  def insert(
    self, state: DecodeState, prefix: Prefix | None, lane: int, slot: int, request: Request
  ) -> DecodeState:
    """The state with a request in a slot; `prefix` holds its prompt in `lane`, None: nothing of it.

    Raises:
      ValueError: slot and lane are not of the same part of the mesh.
    """
    part = self.part_of(slot)
    each = self.prefill_lanes // self.parts if prefix is None else len(prefix.lengths_B) // self.parts
    if lane // each != part and prefix is not None:
      raise ValueError(f'lane {lane} of prefill is not of part {part} of the mesh, as slot {slot} is')
    tokens_T = np.zeros((self.max_len,), np.int32)
    tokens_T[: len(request.prompt)] = request.prompt
    lanes_G = np.full((self.parts,), lane % each, np.int32)
    of_all = jax.tree.map(
      lambda leaf: np.repeat(leaf[None], self.parts, 0),
      (tokens_T, np.int32(len(request.prompt)), self.rules(request)),
    )
    return _insert(self._mesh, state, prefix, lanes_G, self._slots(slot), *of_all)

  def generate(
    self, state: DecodeState, max_ticks: int, max_finished: int | None = None, drafts_for: int = 0
  ) -> tuple[DecodeState, ticks.Tally]:
    """Ticks until `max_ticks` are done or `max_finished` sequences (default: all) have ended, on each part.

    Args:
      drafts_for: draft and check instead (`speculate`), as often as takes about as many passes of the block; with lanes
        for so many sequences, while others wait. 0: tick.
    """
    finished = np.int32(self.slots if max_finished is None else max_finished)
    run = functools.partial(ticks.run, self.cached, self.batches)
    if drafts_for:
      if not self.speculate:
        raise ValueError('drafts_for: an engine with speculate=0 has no drafts')
      lanes = next(lanes for lanes in self.draft_lanes if lanes >= min(drafts_for, self.draft_lanes[-1]))
      run = functools.partial(
        speculation.run, self.cached, Drafting(self.speculate, self._draft_recursions, lanes)
      )
      passes = self.speculate * self._draft_recursions + len(self.cached.layout.places)
      max_ticks = max(max_ticks // passes, 1)
    return run(self._mesh, self.params, state, np.int32(max_ticks), finished)

  def release(self, state: DecodeState, slot: int) -> DecodeState:
    """The state with a slot free again, whatever it did."""
    return _release(self._mesh, state, self._slots(slot))

  def _slots(self, slot: int) -> np.ndarray:
    """What each part of the mesh is told when a slot is meant: its own number, or one beyond its last."""
    each = self.slots // self.parts
    slots_G = np.full((self.parts,), each, np.int32)
    slots_G[self.part_of(slot)] = slot % each
    return slots_G

  # ---- requests ----

  def check(self, request: Request) -> None:
    """Raises RequestError for a request that cannot be answered."""
    self._limits.check(request)

  def rules(self, request: Request) -> Rules:
    """What a request asks for, as the state holds it."""
    return self._limits.rules(request)

  def cache_bytes(self) -> int:
    """Bytes of keys, values and scales of all slots."""
    layout, config = self.cached.layout, self.cached.config
    shapes = jax.eval_shape(lambda: cache_lib.init_cache(config, layout, self.slots, self._dtype))
    shapes = shapes.replace(versions=None, positions=None)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def recursions_of(config: ModelConfig, max_recursions: int | None) -> int:
  """Most recursions of a token. Raises ConfigError for a limit that the model cannot have."""
  most = cache_lib.num_steps(config)
  if max_recursions is None:
    return most
  if not 1 <= max_recursions <= config.recursions:
    raise ConfigError(
      f'max_recursions={max_recursions} is not allowed: must be from 1 to the {config.recursions} that the '
      f'model was trained with'
    )
  if most != config.recursions:
    raise ConfigError(
      f'max_recursions={max_recursions} cannot be used with model.sharing={config.sharing}, in which every '
      f'layer repeats by itself; leave it out'
    )
  return max_recursions


def _filled(rows: Sequence[Sequence[int]], size: int) -> np.ndarray:
  """The beginnings of rows of tokens, (rows, size)."""
  filled_BC = np.zeros((len(rows), size), np.int32)
  for filled_C, tokens in zip(filled_BC, rows, strict=True):
    filled_C[: len(tokens)] = tokens[:size]
  return filled_BC


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _reuse(mesh, prefix, state, slots_B, lengths_B):
  def local(_, prefix, state, slots_B, lengths_B):
    return state_lib.reuse(state, prefix, slots_B, lengths_B), ()

  return shards.run(mesh, local, (), prefix, state, slots_B, lengths_B)[0]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _insert(mesh, state, prefix, lanes_G, slots_G, tokens_GT, known_G, rules_G):
  def local(_, state, *rest):
    return state_lib.insert(state, *rest), ()

  return shards.run(mesh, local, (), state, prefix, lanes_G, slots_G, tokens_GT, known_G, rules_G)[0]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _release(mesh, state, slots_G):
  return shards.run(mesh, lambda _, *rest: (state_lib.release(*rest), ()), (), state, slots_G)[0]
