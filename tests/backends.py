"""Attention backends of other platforms, made to run here: their kernels interpreted, cuDNN's done by XLA."""

from functools import partial

import jax
import pytest

from mor_jax.model import attention, attention_pallas, attention_splash

OTHERS = tuple(name for name in attention.BACKENDS if name != 'xla')  # which is what `auto` means here


def run_anywhere(patch: pytest.MonkeyPatch) -> None:
  """Lets every backend run on this machine in float32, slowly, while the patch lasts."""
  dot_product_attention = jax.nn.dot_product_attention

  def instead_of_cudnn(q, k, v, mask, implementation):
    assert implementation == 'cudnn'
    assert q.shape[1] % 2 == k.shape[1] % 2 == 0, 'it takes even sizes only'
    return dot_product_attention(q, k, v, mask=mask, implementation='xla')

  patch.setattr(attention, 'unfit', lambda *which: '')
  patch.setattr(jax.nn, 'dot_product_attention', instead_of_cudnn)
  patch.setattr(attention_splash, 'attend', partial(attention_splash.attend, interpret=True))
  patch.setattr(
    attention_pallas, 'attend', partial(attention_pallas.attend, interpret=True, smallest_block=8)
  )
