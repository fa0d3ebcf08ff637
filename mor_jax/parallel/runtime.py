"""Multi-process training: discovery, initialisation, collective helpers and shutdown.

A single process, the usual case on one machine, needs none of this. Several processes find each other
through explicit flags, SLURM or the metadata of a TPU pod. After `initialize` every process sees the devices
of all processes. Only process 0 prints and writes.
"""

import dataclasses
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from mor_jax.errors import ConfigError, RunError

PATIENCE = 30  # seconds to find the other processes, and to notice that one has died


@dataclasses.dataclass(frozen=True)
class Processes:
  """The place of this process in a multi-process run; a field is None if the cluster provides it.

  Attributes:
    coordinator: `host:port` of process 0.
    num_processes: number of processes.
    process_id: index of this process, from 0.
  """

  coordinator: str | None = None
  num_processes: int | None = None
  process_id: int | None = None


def find(
  flags: Processes, cluster: bool | None, environment: Mapping[str, str] = os.environ
) -> Processes | None:
  """Returns the place of this process in a multi-process run; None if it is the only process.

  Args:
    flags: the command-line flags.
    cluster: whether to use cluster discovery (SLURM, TPU pod); None: if the environment names several processes.
    environment: environment variables.

  Raises:
    ConfigError: the flags are incomplete or contradictory.
  """
  given = {name: value for name, value in dataclasses.asdict(flags).items() if value is not None}
  if given:
    missing = [f'--{name}' for name in dataclasses.asdict(flags) if name not in given]
    if missing:
      raise ConfigError(
        f'--{next(iter(given))} needs {" and ".join(missing)} too: give all three to every process'
      )
    if cluster:
      raise ConfigError('--cluster asks SLURM or the TPU pod who takes part; leave --coordinator out')
    _check(flags)
    return flags if flags.num_processes > 1 else None
  if cluster is None:
    tasks = environment.get('SLURM_NTASKS') if 'SLURM_PROCID' in environment else None
    workers = environment.get('TPU_WORKER_HOSTNAMES', '').split(',')
    if tasks and not tasks.isdigit():
      raise ConfigError(
        f'SLURM_NTASKS={tasks} in the environment is not a number; give --nocluster to train alone'
      )
    cluster = int(tasks or 1) > 1 or len(workers) > 1
  return Processes() if cluster else None


def _check(flags: Processes) -> None:
  host, _, port = flags.coordinator.rpartition(':')
  if not host or not port.isdigit():
    raise ConfigError(f'--coordinator={flags.coordinator} must be HOST:PORT, the same for every process')
  if flags.num_processes < 1:
    raise ConfigError(f'--num_processes={flags.num_processes} is not allowed: must be >= 1')
  if not 0 <= flags.process_id < flags.num_processes:
    raise ConfigError(
      f'--process_id={flags.process_id} is not one of 0 to {flags.num_processes - 1} (--num_processes='
      f'{flags.num_processes})'
    )


def initialize(processes: Processes | None) -> None:
  """Connects this process to the others. Call it before anything else asks JAX for its devices.

  Raises:
    RunError: the others cannot be reached within PATIENCE seconds; says what to check. This is not a
      ConfigError, because launchers do not retry those, and another process may merely have died during
      start-up.
  """
  if processes is None:
    return
  # CPU devices of several processes talk over gloo; other platforms bring their own collectives.
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  arguments = {name: value for name, value in dataclasses.asdict(processes).items() if value is not None}
  if 'coordinator' in arguments:
    arguments['coordinator_address'] = arguments.pop('coordinator')
    if processes.process_id > 0:
      _wait_for(processes.coordinator)
  deadline = threading.Timer(
    PATIENCE + 2, _give_up, (processes,)
  )  # before JAX ends the process with a core dump
  deadline.daemon = True
  deadline.start()
  try:
    jax.distributed.initialize(
      **arguments, initialization_timeout=PATIENCE, heartbeat_timeout_seconds=PATIENCE
    )
  except (RuntimeError, ValueError) as error:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    raise RunError(_not_found(processes, f' ({reason})')) from None
  finally:
    deadline.cancel()


def _not_found(processes: Processes, reason: str = '') -> str:
  who = processes.coordinator or 'the cluster'
  return (
    f'the processes did not find each other through {who} within {PATIENCE} s{reason}; check that all of them '
    f'were started, with the same --coordinator and --num_processes and different --process_id'
  )


def _give_up(processes: Processes) -> None:
  print(f'error: {_not_found(processes)}', file=sys.stderr)
  leave(1)


def _wait_for(coordinator: str) -> None:
  """Waits until the coordinator accepts connections; JAX itself would end the process without a message."""
  host, _, port = coordinator.rpartition(':')
  begin, problem = time.monotonic(), 'no answer'
  while time.monotonic() - begin < PATIENCE:
    try:
      socket.create_connection((host, int(port)), timeout=5).close()
      return
    except OSError as error:
      problem = error.strerror or str(error)
      time.sleep(0.3)
  raise RunError(
    f'--coordinator={coordinator} cannot be reached after {PATIENCE} s ({problem}); check that process 0 runs '
    f'there, that the address is the same for every process, and that no firewall closes the port'
  )


def is_main() -> bool:
  """Whether this is process 0, the only one that prints and writes."""
  return jax.process_index() == 0


def barrier(name: str) -> None:
  """Blocks until all processes have reached this point."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def anywhere(condition: bool) -> bool:
  """Whether the condition holds on any process; every process must call it."""
  if jax.process_count() == 1:
    return condition
  return bool(np.any(multihost_utils.process_allgather(np.array(condition))))


def require_agreement(values: Mapping[str, Any]) -> None:
  """Checks that all processes have the same values; every process must call it.

  Args:
    values: JSON by name.

  Raises:
    ConfigError: on every process, naming the first value that differs, and where.
  """
  if jax.process_count() == 1:
    return
  own = np.frombuffer(json.dumps(values, sort_keys=True, default=str).encode(), np.uint8)
  longest = int(multihost_utils.process_allgather(np.array(len(own))).max())
  padded = np.zeros(longest, np.uint8)
  padded[: len(own)] = own
  every = multihost_utils.process_allgather(padded)
  found = [json.loads(bytes(one).rstrip(b'\0')) for one in every]
  for name in sorted(set().union(*found)):
    for process, theirs in enumerate(found):
      if theirs.get(name) != found[0].get(name):
        raise ConfigError(
          f'the processes were started differently: {name} is {found[0].get(name)} on process 0 and '
          f'{theirs.get(name)} on process {process}; start all of them with the same command and code'
        )


def on_host(tree: Any) -> Any:
  """Gathers sharded arrays as full NumPy arrays on every process; every process must call it."""
  if jax.process_count() == 1:
    return jax.device_get(tree)
  return multihost_utils.process_allgather(tree, tiled=True)


def leave(code: int) -> NoReturn:
  """Ends a failed process of a multi-process run. An ordinary exit would deadlock with the other processes."""
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)
