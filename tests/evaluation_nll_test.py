import jax
import numpy as np
import pytest
import tiny_run

from mor_jax.evaluation import nll


@pytest.fixture(scope='module')
def nll_step():
  run = tiny_run.run()
  return nll.make_nll_step(run.model, run.config, tiny_run.MESH)


def _evaluate(nll_step, batch_size):
  """All rows of the text in batches, the last one filled up with rows of padding."""
  missing = -len(tiny_run.rows()['tokens']) % batch_size
  filled = {name: np.pad(rows, ((0, missing), (0, 0))) for name, rows in tiny_run.rows().items()}
  count = len(filled['tokens'])
  batches = (
    {name: rows[first : first + batch_size] for name, rows in filled.items()}
    for first in range(0, count, batch_size)
  )
  variables = tiny_run.run().initial().variables
  with jax.transfer_guard('disallow'):  # as the training loop has it
    return nll.evaluate(nll_step, variables, batches, tiny_run.MESH), missing


def test_batch_size_and_filling_change_nothing(nll_step):
  small, few = _evaluate(nll_step, 8)
  large, many = _evaluate(nll_step, 64)
  assert few != many
  assert small == pytest.approx(large, rel=1e-5)
  assert small['nll'] == pytest.approx(np.log(257), abs=0.1), 'an untrained model knows nothing'


def test_loss_of_no_token_is_refused(nll_step):
  with pytest.raises(ValueError, match='no token to predict'):
    nll.evaluate(nll_step, tiny_run.run().initial().variables, [], tiny_run.MESH)


def test_bits_per_byte():
  """A uniform guess over 256 bytes costs 8 bits a byte, whether a token is one byte or two."""
  assert nll.bits_per_byte(np.log(256), tokens=1000, num_bytes=1000) == pytest.approx(8)
  assert nll.bits_per_byte(2 * np.log(256), tokens=500, num_bytes=1000) == pytest.approx(8)
