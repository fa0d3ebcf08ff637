"""The engine's programs compiled for devices that are not there: figures of a CPU, and, marked aot, bytes on a TPU."""

import json
import subprocess
import sys

import pytest

from mor_jax.config import resolve, with_changes
from mor_jax.model import flops
from tests.compile_test import TINY, run
from tests.configs_tiny_test import get_config

PROGRAM = """
import json, sys
from mor_jax.config import Config, with_changes
from mor_jax.model import cache, cached_attention
from mor_jax.planning import decoding, topology

topology.prepare()
device = topology.devices('v5e:1x1')[0]
if sys.argv[1] == 'no tiles':
  make = cache.make_layout
  cache.make_layout = lambda *arguments, tiled: make(*arguments)
if sys.argv[1] == 'one length':
  cached_attention.lengths = lambda region: (region,)
model = dict(vocab_size=512, num_layers=8, d_model=320, num_heads=5, num_kv_heads=5, mlp_dim=512, num_recursions=3)
config = with_changes(Config(), model=model | {'dtype': 'bfloat16'}).model
plan = decoding.compile_decoding(config, device, decoding.Asked(1024, 'bfloat16', slots=32))
print(json.dumps(decoding.as_json(plan)))
"""


def test_figures_of_a_processor():
  done = run(
    *TINY, '--topology=cpu:1', '--program=decode', '--slots=4', '--max_len=48', '--speculate=2', '--json'
  )
  assert done.returncode == 0, done.stderr
  figures = json.loads(done.stdout)
  assert set(figures['programs']) == {'block', 'boundary', 'round', 'chunk'}
  assert figures['slots'] == figures['block_lanes'] == 4
  assert figures['depth'] == pytest.approx(2.0)  # of three recursions, by their capacities
  assert figures['tokens_per_second'] is None, 'nobody knows how fast a processor is'
  block = figures['programs']['block']
  assert block['peak_bytes'] > figures['cache_bytes']
  settings = {'d_model': 32, 'mlp_dim': 48, 'num_layers': 5, 'vocab_size': 257}
  layer = flops.layer_parameters(with_changes(resolve(get_config()), model=settings).model) - 2 * 32
  # Every lane has the products of the block's one layer, and its attention to the largest region.
  assert block['flops'] == pytest.approx(4 * (2 * layer + 4 * 48 * 32), rel=0.05)
  # A round is three tokens of drafts and two further passes of the block for each.
  assert figures['programs']['round']['flops'] > 3 * block['flops']
  assert 'roofline' not in done.stderr
  assert 'HBM traffic' in done.stderr


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--suggest'], '--suggest is for --program=train; with --program=decode leave it out'),
    ([], '--slots: the memory of cpu is unknown; say how many sequences'),
  ],
)
def test_what_cannot_work_is_refused(arguments, message):
  done = run(*TINY, '--topology=cpu:1', '--program=decode', *arguments)
  assert done.returncode == 2
  assert message in done.stderr


@pytest.mark.aot
def test_a_tpu_moves_what_is_read_and_no_pool():
  """Of a pass of the block: weights, and of each lane the region of its own recursion.

  Unless entries end within a tile, or all lanes read as much as the longest region has.
  """

  def traffic(how: str) -> tuple[float, float]:
    done = subprocess.run([sys.executable, '-c', PROGRAM, how], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    layers, width = 2, 3 * 128  # of the block, and of an entry
    seen = (
      (1 + (2 / 3) ** 2 + (1 / 3) ** 2) / 2 * 1024
    )  # in the mean over the passes of tokens of even depths
    regions = figures['block_lanes'] * layers * seen * 2 * width * 2
    return figures['programs']['block']['traffic_bytes'], regions + figures['parameter_bytes']

  found, least = traffic('as it is')
  assert 0.9 * least < found < 1.15 * least
  found, least = traffic('one length')
  assert found > 1.15 * least
  found, least = traffic('no tiles')
  assert found > 2 * least
