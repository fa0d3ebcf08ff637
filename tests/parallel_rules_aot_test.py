import functools
import json
import subprocess
import sys

import mesh_check
import pytest

pytestmark = pytest.mark.aot

PROGRAM = """
import json, sys
import jax
from mor_jax.config import Config, with_changes
from mor_jax.parallel import mesh as mesh_lib
from mor_jax.planning import topology
from mor_jax.planning.collectives import total_bytes
from mor_jax.planning.ahead_of_time import compile_step

changes, shape, local = json.loads(sys.argv[1])
topology.prepare()
devices = topology.devices('v5e:2x4')
shard_map = jax.shard_map
if not local:  # routing is left to the compiler; what names its mesh (the loss) is not routing
  jax.shard_map = lambda f, mesh=None, **kw: shard_map(f, mesh=mesh, **kw) if mesh is not None else f
model = dict(vocab_size=512, num_layers=6, d_model=256, num_heads=4, num_kv_heads=2, mlp_dim=512)
parallel = dict(zip(('replica', 'fsdp', 'tensor'), shape))
config = with_changes(
  Config(), model=model | {'num_recursions': 2, 'attention': 'xla'} | changes,
  data={'seq_len': 256}, train={'global_batch': 16, 'steps': 10, 'warmup_steps': 0}, parallel=parallel,
)
program = compile_step(config, mesh_lib.make_mesh(config.parallel, devices))
print(json.dumps(total_bytes(program.collectives)))
"""


@functools.cache
def measure(changes: str, shape: tuple[int, int, int], local: bool = True) -> dict[str, int]:
  """Bytes of collectives by kind in the train step compiled for 8 TPUs."""
  arguments = json.dumps([json.loads(changes), shape, local])
  done = subprocess.run(
    [sys.executable, '-c', PROGRAM, arguments], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize('shape', [(1, 8, 1), (2, 2, 2)])
def test_routing_on_tpus_needs_no_communication(shape):
  vanilla, mor = measure('{"kind": "vanilla"}', shape), measure('{}', shape)
  assert mesh_check.communicates_no_more(mor, vanilla), (mor, vanilla)


def test_routing_left_to_the_compiler_would():
  vanilla = measure('{"kind": "vanilla"}', (1, 8, 1))
  left_to_compiler = measure('{}', (1, 8, 1), local=False)
  assert not mesh_check.communicates_no_more(left_to_compiler, vanilla), (left_to_compiler, vanilla)
