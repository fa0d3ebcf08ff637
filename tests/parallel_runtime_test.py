"""How processes find each other: by flags, by the cluster, or not at all; refusals say what to check."""

import socket
import time

import pytest

from mor_jax.config import ConfigError
from mor_jax.errors import RunError
from mor_jax.parallel import runtime
from mor_jax.parallel.runtime import Processes

SLURM = {'SLURM_PROCID': '1', 'SLURM_NTASKS': '4'}
POD = {'TPU_WORKER_HOSTNAMES': 'host-0,host-1'}


@pytest.mark.parametrize(
  ('flags', 'cluster', 'environment', 'found'),
  [
    (Processes(), None, {}, None),
    (Processes('h:1', 2, 1), None, {}, Processes('h:1', 2, 1)),
    (Processes('h:1', 1, 0), None, {}, None),
    (Processes('h:1', 2, 0), None, SLURM, Processes('h:1', 2, 0)),
    (Processes(), None, SLURM, Processes()),
    (Processes(), None, {'SLURM_NTASKS': '4'}, None),  # in an allocation, but not started by srun
    (Processes(), None, SLURM | {'SLURM_NTASKS': '1'}, None),
    (Processes(), None, POD, Processes()),
    (Processes(), None, {'TPU_WORKER_HOSTNAMES': 'localhost'}, None),
    (Processes(), True, {}, Processes()),
    (Processes(), False, SLURM, None),
  ],
)
def test_who_takes_part(flags, cluster, environment, found):
  assert runtime.find(flags, cluster, environment) == found


@pytest.mark.parametrize(
  ('flags', 'cluster', 'message'),
  [
    (Processes('h:1', None, None), None, '--coordinator needs --num_processes and --process_id too'),
    (Processes(None, 2, 1), None, '--num_processes needs --coordinator too'),
    (Processes('h', 2, 1), None, '--coordinator=h must be HOST:PORT'),
    (Processes('h:x', 2, 1), None, 'must be HOST:PORT'),
    (Processes('h:1', 0, 0), None, '--num_processes=0 is not allowed'),
    (Processes('h:1', 2, 2), None, r'--process_id=2 is not one of 0 to 1 \(--num_processes=2\)'),
    (Processes('h:1', 2, 1), True, 'leave --coordinator out'),
  ],
)
def test_flags_that_do_not_fit_are_refused(flags, cluster, message):
  with pytest.raises(ConfigError, match=message):
    runtime.find(flags, cluster, {})


def test_alone_nothing_is_connected():
  runtime.initialize(None)
  assert runtime.is_main()
  assert runtime.anywhere(True)
  assert not runtime.anywhere(False)
  runtime.barrier('alone')


def test_coordinator_that_does_not_answer_is_named_in_time(monkeypatch):
  monkeypatch.setattr(runtime, 'PATIENCE', 1)
  with socket.socket() as closed:
    closed.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{closed.getsockname()[1]}'
  begin = time.monotonic()
  with pytest.raises(
    RunError, match=f'--coordinator={address} cannot be reached .*check that process 0 runs'
  ):
    runtime.initialize(Processes(address, 2, 1))
  assert time.monotonic() - begin < 10
