"""Distillation against closed forms and against a loss written out; a teacher that is the student costs nothing."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_run
from flax import linen as nn
from scipy.special import log_softmax, rel_entr, softmax

from mor_jax.config import ConfigError, with_changes
from mor_jax.interop.weights import HeldWeights
from mor_jax.model.transformer import Transformer
from mor_jax.parallel import mesh as mesh_lib
from mor_jax.training import distillation
from mor_jax.training import loss as loss_lib
from mor_jax.training import targets as targets_lib
from mor_jax.training.optimizer import make_optimizer
from mor_jax.training.state import initializer
from mor_jax.training.step import make_train_step, split_batch

RNG = np.random.default_rng(3)
STUDENT_NV, TEACHER_NV = RNG.normal(size=(2, 7, 20)).astype(np.float32) * 3


@pytest.mark.parametrize('temperature', [1.0, 2.5])
def test_divergence_of_all_tokens_is_relative_entropy(temperature):
  found = distillation.divergence(jnp.asarray(STUDENT_NV), jnp.asarray(TEACHER_NV), temperature, None)
  p, q = softmax(TEACHER_NV / temperature, -1), softmax(STUDENT_NV / temperature, -1)
  np.testing.assert_allclose(found, temperature**2 * rel_entr(p, q).sum(-1), rtol=1e-4)


def test_divergence_of_the_most_probable_tokens():
  found = distillation.divergence(jnp.asarray(STUDENT_NV), jnp.asarray(TEACHER_NV), 1.0, 4)
  for n in range(7):
    kept = np.argsort(TEACHER_NV[n])[-4:]
    p = softmax(TEACHER_NV[n, kept])
    expected = (p * (np.log(p) - log_softmax(STUDENT_NV[n])[kept])).sum()
    np.testing.assert_allclose(found[n], expected, rtol=1e-4)
  everything = distillation.divergence(jnp.asarray(STUDENT_NV), jnp.asarray(TEACHER_NV), 1.0, 20)
  np.testing.assert_allclose(
    everything, distillation.divergence(jnp.asarray(STUDENT_NV), jnp.asarray(TEACHER_NV), 1.0, None)
  )


def settings(**change):
  """A vanilla teacher and a recursive student of one vocabulary."""
  return with_changes(
    tiny_run.CONFIG, model={'kind': 'recursive'}, distill={'weight': 0.7, 'temperature': 2.0} | change
  )


def teacher_of(config):
  """A teacher and its parameters."""
  theirs = dataclasses.replace(config.model, kind='vanilla', num_layers=3)
  teacher = distillation.make_teacher(config.distill, theirs, config.model)
  params = nn.unbox(teacher.model.init(jax.random.key(9), jnp.zeros((1, 4), jnp.int32)))['params']
  return teacher, jax.tree.map(lambda leaf: leaf * 3, params)


@pytest.mark.parametrize(('chunk', 'top_k'), [pytest.param(0, 10, marks=pytest.mark.slow), (48, None)])
def test_loss_and_gradient_are_those_written_out(chunk, top_k):
  config = settings(top_k=top_k)
  (teacher, theirs), model = teacher_of(config), Transformer(config.model)
  params = nn.unbox(model.init(jax.random.key(1), jnp.zeros((1, 4), jnp.int32)))['params']
  batch = next(tiny_run.batches())
  whole = loss_lib.normalizers(config.model, {'segment_ids': batch['segment_ids'][None]})
  loss = loss_lib.make_loss(model.apply, config.model, chunk, teacher=teacher)

  def written_out(params):
    seen = {'segment_ids': batch['segment_ids'], 'positions': batch['positions']}
    logits, wanted = (
      module.apply({'params': leaves}, batch['tokens'], **seen).logits[:, :-1]
      for module, leaves in ((model, params), (teacher.model, theirs))
    )
    mask = targets_lib.predicted(batch)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch['tokens'][:, 1:, None], -1)[..., 0]
    kl = distillation.divergence(logits.reshape(-1, 257), wanted.reshape(-1, 257), 2.0, top_k).reshape(
      nll.shape
    )
    nll, kl = ((values * mask).sum() / mask.sum() for values in (nll, kl))
    return nll + 0.7 * kl, {'loss': nll, 'distill_loss': kl}

  found, gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
    params, batch, whole, {}, jax.random.key(0), theirs
  )
  expected, reference = jax.jit(jax.value_and_grad(written_out, has_aux=True))(params)
  chex.assert_trees_all_close(found, expected, rtol=1e-4)
  tiny.assert_same_gradients(gradient, reference)


def test_a_teacher_that_is_the_student_adds_nothing():
  config = settings()
  model = Transformer(config.model)
  teacher = distillation.make_teacher(config.distill, config.model, config.model)
  params = nn.unbox(model.init(jax.random.key(1), jnp.zeros((1, 4), jnp.int32)))['params']
  batch = next(tiny_run.batches())
  whole = loss_lib.normalizers(config.model, {'segment_ids': batch['segment_ids'][None]})
  loss = loss_lib.make_loss(model.apply, config.model, teacher=teacher)
  total, parts = loss(params, batch, whole, {}, jax.random.key(0), params)
  np.testing.assert_allclose(parts['distill_loss'], 0, atol=1e-6)
  np.testing.assert_allclose(total, parts['loss'], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('trainable', ['all', '^embed,^block/,^last/'])
def test_steps_bring_the_model_closer_to_the_teacher_and_leave_the_teacher_alone(trainable):
  config = with_changes(settings(weight=50.0), train={'accumulation': 2, 'trainable': trainable})
  (teacher, theirs), model = teacher_of(config), Transformer(config.model)
  held = HeldWeights(teacher.model.config, {'params': theirs})
  abstract = distillation.abstract_parameters(teacher, tiny_run.MESH)
  loaded = distillation.load_parameters(abstract, held)
  chex.assert_trees_all_equal(loaded, theirs)
  optimizer = make_optimizer(config.train)
  step = make_train_step(model, config, optimizer, tiny_run.MESH, teacher)
  state = initializer(model, optimizer, tiny_run.MESH, tiny_run.SEQ_LEN)(jnp.uint32(0))
  divergences = []
  batch = split_batch(next(tiny_run.batches(config)), 2)
  rows = mesh_lib.put(batch, mesh_lib.micro_batch_sharding(tiny_run.MESH))
  for _ in range(12):
    state, metrics = step(state, rows, loaded)
    divergences.append(float(metrics['distill_loss']))
  assert divergences[-1] < 0.8 * divergences[0]
  assert ('grad_norm/first.mlp' in metrics) == (trainable == 'all')
  chex.assert_trees_all_equal(loaded, theirs)


def test_settings_that_cannot_work_are_refused():
  with pytest.raises(ConfigError, match=r'distill\.temperature=2\.0 has no effect with distill\.weight=0'):
    with_changes(tiny_run.CONFIG, distill={'temperature': 2.0})
  with pytest.raises(ConfigError, match=r'distill\.top_k=0 is not allowed'):
    settings(top_k=0)
  config = settings()
  theirs = dataclasses.replace(config.model, vocab_size=100)
  with pytest.raises(ConfigError, match=r'needs a teacher with the model\.vocab_size=257 .* it has 100'):
    distillation.make_teacher(config.distill, theirs, config.model)
