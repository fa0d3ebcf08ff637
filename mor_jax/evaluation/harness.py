"""Adapter from a trained model to lm-evaluation-harness (the optional package `lm_eval`).

from lm_eval import simple_evaluate
model = harness.HarnessModel(load_run('runs/tiny-mor'))
simple_evaluate(model, tasks=['hellaswag'])
"""

import itertools
import sys
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from mor_jax.config import ConfigError
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.evaluation.scoring import Scorer
from mor_jax.inference.engine import Engine
from mor_jax.inference.requests import Request, RequestError
from mor_jax.inference.scheduler import Scheduler
from mor_jax.inference.state import STOP_TOKENS
from mor_jax.model import flops
from mor_jax.runs.restore import LoadedRun

MAX_NEW_TOKENS = 256  # where a task does not say, as the harness has it
SAID_ANYWAY = (('num_beams', 1), ('num_return_sequences', 1), ('use_cache', True))  # what is done in any case


class HarnessModel(TemplateLM):
  """Scores and continues texts with a run's model. Routing is by threshold, and thus causal, by default.

  Texts are encoded with the run's tokenizer, without additional tokens at the start. A text without context
  follows the prefix token, by default the end-of-document token, as in training. Texts longer than `max_len`
  are truncated at the start.
  """

  def __init__(
    self,
    run: LoadedRun,
    batch_size: int = 8,
    max_len: int | None = None,
    routing: str = 'threshold',
    prefix_token: str | None = None,
  ):
    """Wraps a loaded run.

    Args:
      batch_size: texts per batch.
      max_len: maximum length of a text in tokens; default: data.seq_len of the run.
      routing: 'threshold', or 'topk' as in training, which uses the whole text.
      prefix_token: token before a text without context; default: data.separator of the run.

    Raises:
      ConfigError: the tokenizer lacks the prefix token.
    """
    super().__init__()
    self.run, self.routing = run, routing
    self.max_length = max_len or run.config.data.seq_len
    self.batch_size = batch_size
    data = run.config.data
    self._tokenizer = Tokenizer.load(run.folder.tokenizer, data.separator, data.begin)
    self._ends = run.folder.conventions(run.config, self._tokenizer).ends[:STOP_TOKENS]
    begin = self._tokenizer.begin_of_text
    self._prefix = self._tokenizer.end_of_text if begin is None else begin
    if prefix_token is not None:
      self._prefix = self._tokenizer.token_to_id(prefix_token)
      if self._prefix is None:
        raise ConfigError(f'--prefix_token={prefix_token} is not a token of {run.folder.tokenizer}')
    self._scorer = Scorer(run.model, run.variables, self.max_length, batch_size, routing)

  # ---- what the harness asks about ----

  @property
  def eot_token_id(self) -> int:
    """The token that ends documents."""
    return self._tokenizer.end_of_text

  @property
  def prefix_token_id(self) -> int:
    """The token before a text without context."""
    return self._prefix

  @property
  def tokenizer_name(self) -> str:
    """The name of the tokenizer in the harness's caches."""
    return f'mor_jax-{self._tokenizer.digest[:16]}'

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
    """Token ids, after the token that begins texts for the model, if it has one; none is recognised in the text."""
    return (
      self._tokenizer.encode(string) if add_special_tokens is False else self._tokenizer.encode_text(string)
    )

  def get_model_info(self) -> dict[str, Any]:
    """The description of the model in the harness's JSON."""
    config = self.run.config.model
    return {
      'model_run': str(self.run.folder.path),
      'model_step': self.run.step,
      'model_kind': config.kind,
      'model_num_parameters': flops.count_parameters(config).total,
      'model_dtype': config.dtype,
      'model_routing': self.routing if config.kind == 'mor' else None,
      'model_max_length': self.max_length,
    }

  # ---- scores ----

  def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of a context, and those of what follows it, which together are those of the whole text.

    As in the harness, spaces at the end of the context belong to the continuation. Where the texts merge ('ret' and
    'urn'), the tokens part where those of the whole text leave those of the context, so that every character of the
    continuation counts.

    Raises:
      ConfigError: the continuation is a text without tokens.
    """
    told = context.rstrip()
    continuation = context[len(told) :] + continuation
    context_ids = self.tok_encode(told) if told else []
    whole_ids = self.tok_encode(told + continuation) if told else self._tokenizer.encode(continuation)
    pairs = zip(context_ids, whole_ids, strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    if continuation and shared == len(whole_ids):
      raise ConfigError(
        f'a task asks for the likelihood of {continuation!r} after {told[-20:]!r}, which the tokenizer gives no tokens'
      )
    return whole_ids[:shared] or [self.prefix_token_id], whole_ids[shared:]

  def _loglikelihood_tokens(
    self,
    requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
    disable_tqdm: bool = False,
    **kwargs,
  ) -> list[tuple[float, bool]]:
    with _bar(len(requests), 'Scoring log-likelihoods', disable_tqdm) as bar:
      scores = self._scorer.score([(context, rest) for _, context, rest in requests], bar.update)
    for (texts, _, _), score in zip(requests, scores, strict=True):
      self.cache_hook.add_partial('loglikelihood', texts, score)
    return scores

  def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
    """Log-likelihood of whole texts, in windows of `max_len` tokens that each predict only their new tokens."""
    texts = [request.args[0] for request in requests]
    windows, owners = [], []
    for owner, text in enumerate(texts):
      rolling = get_rolling_token_windows(
        self._tokenizer.encode(text),
        prefix_token=self.prefix_token_id,
        max_seq_len=self.max_length,
        context_len=1,
      )
      windows += [make_disjoint_window(window) for window in rolling]
      owners += [owner] * (len(windows) - len(owners))
    with _bar(len(windows), 'Scoring windows of texts', disable_tqdm) as bar:
      scores = self._scorer.score(windows, bar.update)
    totals = [0.0] * len(texts)
    for owner, (score, _) in zip(owners, scores, strict=True):
      totals[owner] += score
    for text, total in zip(texts, totals, strict=True):
      self.cache_hook.add_partial('loglikelihood_rolling', (text,), total)
    return totals

  # ---- generation ----

  def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
    """Continuations, without the text that ended them, by depth-wise batching; routing is always by threshold.

    Sampled ones (`do_sample`) have the number of their request as seed: repeats of a question differ.

    Raises:
      ConfigError: under top-k routing, or for a sampling option that does not exist.
    """
    if self.routing == 'topk' and self.run.config.model.kind == 'mor':
      raise ConfigError(
        '--routing=topk looks at the whole text and cannot generate one, which these tasks ask for: use '
        '--routing=threshold'
      )
    engine = Engine(
      self.run.model, self.run.variables, slots=min(self.batch_size, len(requests)), max_len=self.max_length
    )
    scheduler = Scheduler(engine, self._tokenizer)
    try:
      results = [
        scheduler.submit(self._request(*request.args, seed=seed)) for seed, request in enumerate(requests)
      ]
    except RequestError as error:
      raise ConfigError(f'a task asks for what cannot be generated: {error}') from None
    with _bar(len(requests), 'Generating texts', disable_tqdm) as bar:
      while scheduler.busy:
        bar.update(len(scheduler.step()))
    for request, result in zip(requests, results, strict=True):
      self.cache_hook.add_partial('generate_until', request.args, result.text)
    return [result.text for result in results]

  def _request(self, context: str, wishes: dict[str, Any], seed: int) -> Request:
    wishes = dict(normalize_gen_kwargs(wishes, MAX_NEW_TOKENS))
    max_new_tokens, until = wishes.pop('max_gen_toks'), wishes.pop('until')
    sampled = wishes.pop('do_sample')
    temperature = wishes.pop('temperature', 1.0 if sampled else 0.0)
    known = {name: wishes.pop(name) for name in ('top_k', 'top_p', 'repetition_penalty') if name in wishes}
    if known.get('top_k') in (-1, None):  # as transformers and vLLM say that there is no limit
      known.pop('top_k', None)
    wishes = {name: value for name, value in wishes.items() if (name, value) not in SAID_ANYWAY}
    if wishes:
      name, value = next(iter(wishes.items()))
      raise RequestError(
        f'{name}={value} is not supported; known are do_sample, temperature, top_k, top_p, repetition_penalty, '
        f'until and max_gen_toks'
      )
    room = self.max_length - max_new_tokens
    if room < 1:
      raise RequestError(
        f'max_gen_toks={max_new_tokens} leaves no room for a prompt; raise --max_len={self.max_length}'
      )
    prompt = (self.tok_encode(context) or [self.prefix_token_id])[-room:]
    return Request(
      tuple(prompt),
      max_new_tokens=max_new_tokens,
      temperature=float(temperature) if sampled else 0.0,
      stop_tokens=self._ends,
      stop_strings=tuple(stop for stop in until if stop),
      seed=seed,
      **known,
    )


def _bar(total: int, description: str, disable: bool) -> tqdm:
  """A progress bar on a terminal, otherwise occasional lines."""
  seconds = 0.1 if sys.stderr.isatty() else 30.0
  return tqdm(total=total, desc=description, disable=disable, mininterval=seconds)
