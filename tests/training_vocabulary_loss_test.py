"""The loss in chunks against the same loss of all logits at once, and the memory it takes."""

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from jax.sharding import NamedSharding, PartitionSpec

from mor_jax.config import DistillConfig, ModelConfig, ParallelConfig, with_changes
from mor_jax.parallel import mesh as mesh_lib
from mor_jax.planning.collectives import collective_bytes
from mor_jax.training import distillation
from mor_jax.training import loss as loss_lib
from mor_jax.training.vocabulary_loss import next_token_nll, sum_over_tokens

ROWS, LENGTH, WIDTH, VOCABULARY = 2, 25, 12, 37  # 50 tokens


def _inputs(dtype=jnp.float32):
  rng = np.random.default_rng(0)
  x_BTD = jnp.asarray(rng.normal(size=(ROWS, LENGTH, WIDTH)), dtype)
  kernel_DV = jnp.asarray(rng.normal(size=(WIDTH, VOCABULARY)), jnp.float32)
  targets_BT = jnp.asarray(rng.integers(0, VOCABULARY, (ROWS, LENGTH)), jnp.int32)
  mask_BT = jnp.asarray(rng.random((ROWS, LENGTH)) < 0.8).at[1, 17:].set(False)
  return x_BTD, kernel_DV, (targets_BT, mask_BT)


def _gradient(chunk, x_BTD, kernel_DV, per_token):
  def mean(x_BTD, kernel_DV):
    return sum_over_tokens(next_token_nll, x_BTD, kernel_DV, per_token, chunk) / 33

  return jax.jit(jax.value_and_grad(mean, argnums=(0, 1)))(x_BTD, kernel_DV)


def test_nll_is_that_of_float64():
  x_BTD, kernel_DV, (targets_BT, mask_BT) = _inputs()
  logits = np.asarray(x_BTD, np.float64) @ np.asarray(kernel_DV, np.float64)
  logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  nll_BT = -np.take_along_axis(logprobs, np.asarray(targets_BT)[..., None], -1)[..., 0]
  expected = nll_BT[np.asarray(mask_BT)].sum()
  for chunk in (0, 10, 16, 64):
    found = sum_over_tokens(next_token_nll, x_BTD, kernel_DV, (targets_BT, mask_BT), chunk)
    assert float(found) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize('chunk', [1, 10, 16, 49], ids='chunk={}'.format)
def test_chunks_change_neither_loss_nor_gradient(chunk):
  """Also where the last chunk is filled up: float32, relative to the norm."""
  found, expected = _gradient(chunk, *_inputs()), _gradient(0, *_inputs())
  _assert_close(found, expected, 1e-6)


def test_chunks_in_bfloat16_are_as_exact_as_all_at_once():
  x_BTD, *others = _inputs(jnp.bfloat16)
  exact = _gradient(0, x_BTD.astype(jnp.float32), *others)
  found = _gradient(10, x_BTD, *others)
  assert found[1][0].dtype == jnp.bfloat16
  assert found[1][1].dtype == jnp.float32
  _assert_close(found, exact, 1e-2)


@pytest.mark.parametrize(
  'tied', [pytest.param(True, id='tied'), pytest.param(False, id='untied', marks=pytest.mark.slow)]
)
def test_chunks_change_no_gradient_of_a_training_step(tied):
  """A whole model with padding, packed documents and two micro-batches, each in uneven chunks of 30 tokens."""
  shape = {'kind': 'vanilla', 'num_layers': 1, 'tie_embeddings': tied}
  config = with_changes(tiny_run.CONFIG, model=shape, train={'accumulation': 2})
  run = tiny_run.run(config)
  params = run.initial().params
  batch_ABT = {name: jnp.asarray(rows[-8:].reshape(2, 4, -1)) for name, rows in tiny_run.rows().items()}
  whole = loss_lib.normalizers(config.model, batch_ABT)

  @functools.partial(jax.jit, static_argnums=0)
  def gradient(chunk, params):
    loss = loss_lib.make_loss(run.model.apply, config.model, chunk)

    def total(params):
      losses_A = jax.lax.map(lambda batch: loss(params, batch, whole, {}, jax.random.key(0))[0], batch_ABT)
      return losses_A.sum()

    return jax.value_and_grad(total)(params)

  _assert_close(gradient(30, params), gradient(0, params), 1e-5)


def test_memory_does_not_grow_with_tokens_times_vocabulary():
  """Compiled temporaries, less what has the size of the hidden states (their gradient)."""
  width, vocabulary, chunk = 16, 4096, 64

  def temporaries(tokens, chunk):
    def loss(x_BTD, kernel_DV, targets_BT):
      return sum_over_tokens(next_token_nll, x_BTD, kernel_DV, (targets_BT, targets_BT > 0), chunk)

    arguments = (
      jax.ShapeDtypeStruct((1, tokens, width), jnp.float32),
      jax.ShapeDtypeStruct((width, vocabulary), jnp.float32),
      jax.ShapeDtypeStruct((1, tokens), jnp.int32),
    )
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  logits = 4 * 1024 * vocabulary
  assert temporaries(2048, chunk) - temporaries(1024, chunk) < 4 * (1024 * width * 4)
  assert temporaries(2048, 0) - temporaries(1024, 0) >= logits


def test_devices_add_up_the_gradient_of_the_head_once():
  """8 CPU devices in a process of their own: same loss and gradients, and the collectives of all logits at once."""
  script = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]}
import training_vocabulary_loss_test
training_vocabulary_loss_test.check_meshes()
"""
  environment = os.environ | {'XLA_FLAGS': '--xla_force_host_platform_device_count=8'}
  done = subprocess.run([sys.executable, '-c', script], env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


def check_meshes():
  """What the process with 8 devices does."""
  rng = np.random.default_rng(0)
  x_BTD, kernel_VD = rng.normal(size=(8, 16, 8)), rng.normal(size=(32, 8))
  arguments = x_BTD.astype(np.float32), kernel_VD.astype(np.float32), rng.integers(0, 32, (8, 16))

  def gradient(chunk, mesh, **shardings):
    def loss(x_BTD, kernel_VD, targets_BT):
      per_token = targets_BT, targets_BT > 0
      return sum_over_tokens(next_token_nll, x_BTD, kernel_VD.T, per_token, chunk, mesh)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), **shardings).lower(*arguments).compile()

  expected = gradient(0, None)(*arguments)
  for sizes in ({'replica': 8}, {'replica': 2, 'fsdp': 2, 'tensor': 2}):
    mesh = mesh_lib.make_mesh(ParallelConfig(**sizes))
    rows, kernel = mesh_lib.batch_sharding(mesh), NamedSharding(mesh, PartitionSpec('tensor', 'fsdp'))
    shardings = {'in_shardings': (rows, kernel, rows), 'out_shardings': (None, (rows, kernel))}
    found = {chunk: gradient(chunk, mesh, **shardings) for chunk in (0, 4)}
    sharded = jax.device_put(arguments, shardings['in_shardings'])
    _assert_close(found[4](*sharded), expected, 1e-6)
    traffic = {chunk: collective_bytes(compiled.as_text()) for chunk, compiled in found.items()}
    assert traffic[4] == traffic[0], sizes
  _check_teacher_on_meshes(rng, *arguments)


def _check_teacher_on_meshes(rng, x_BTD, kernel_VD, targets_BT):
  """What all tokens share, here the head of a teacher, is the same on every device; sums come out whole."""
  theirs_BTD = rng.normal(size=(8, 16, 4)).astype(np.float32)
  theirs_DV = rng.normal(size=(4, 32)).astype(np.float32)
  model = dataclasses.replace(ModelConfig(), vocab_size=32)
  token_loss = distillation.make_teacher(DistillConfig(weight=0.5, temperature=2.0), model, model).loss

  def gradient(chunk, mesh):
    def loss(x_BTD, kernel_VD, theirs_BTD, theirs_DV):
      per_token = targets_BT, targets_BT > 3, theirs_BTD
      return sum_over_tokens(token_loss, x_BTD, kernel_VD.T, per_token, chunk, mesh, theirs_DV)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))

  expected = gradient(0, None)(x_BTD, kernel_VD, theirs_BTD, theirs_DV)
  mesh = mesh_lib.make_mesh(ParallelConfig(replica=2, fsdp=2, tensor=2))
  rows, split = mesh_lib.batch_sharding(mesh), NamedSharding(mesh, PartitionSpec('fsdp', 'tensor'))
  for chunk in (0, 4):
    arguments = jax.device_put(
      (x_BTD, kernel_VD, theirs_BTD, theirs_DV), (rows, mesh_lib.replicated(mesh), rows, split)
    )
    _assert_close(gradient(chunk, mesh)(*arguments), expected, 1e-6)


def _assert_close(found, expected, relative):
  for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    left, right = np.asarray(left, np.float32), np.asarray(right, np.float32)
    assert np.linalg.norm(left - right) <= relative * np.linalg.norm(right)
