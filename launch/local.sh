#!/usr/bin/env bash
# Trains with several processes on this machine, on its CPU.
#
#   launch/local.sh --config=configs/tiny.py [--processes=2] [--workdir=DIR] [--config.train.steps=N ...]
#
# Flags of the launcher; all others are those of `python -m mor_jax.train`, which --help there explains:
#   --processes=N   how many processes (2)
#   --port=PORT     where they meet on this machine (one that is free)
#   --restarts=N    starts the run again after so many failures in a row (3); a process that was
#                   told to end (code 129 or 143) or hung (70) is always started again
#   --dry_run       prints the commands instead of running them
#   --help          prints this
#
# Ctrl-C and SIGTERM are passed on: the run saves and ends. Exit code: that of the run: 0 finished, 2 wrong
# flags or settings, 130 and 143 stopped by a signal to this script, others failed.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/common.sh
source "$root/launch/common.sh"

processes=2 port='' restarts=3
take_flags 'processes port restarts' '' "$@"
check_number processes "$processes"
check_count restarts "$restarts"
[[ -z $port ]] || check_number port "$port"
check_training ${training[@]+"${training[@]}"}
environment=("JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}")
# Paths are those of the folder in which this script was called; settings may be those of the repository.
if [[ $PWD != "$root" ]]; then
  environment+=("PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}")
  settings_of "$root"
fi

# free_port: one that nobody listens at.
free_port() {
  python -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])'
}

# command_of NUMBER ADDRESS: sets `command` to the command line of a process.
command_of() {
  command=(env "${environment[@]}" python -m mor_jax.train "${training[@]}")
  if ((processes > 1)); then
    command+=("--coordinator=$2" "--num_processes=$processes" "--process_id=$1")
  fi
}

pids=() told=0
# pass_on CODE: a signal for this script is one for all processes.
pass_on() {
  told=$1
  ((${#pids[@]} == 0)) || kill -TERM "${pids[@]}" 2>/dev/null || true
}

# ended PID: its exit code, once it has ended; signals to this script do not end the waiting.
ended() {
  local code=0 again
  while :; do
    wait "$1" && code=0 || code=$?
    kill -0 "$1" 2>/dev/null || break
  done
  wait "$1" 2>/dev/null && again=0 || again=$?
  ((again == 127)) || code=$again
  result=$code
}

# attempt: runs all processes once; sets `code` to what became of the run.
attempt() {
  local number codes=() pid address
  address=localhost:${port:-$(free_port)}
  pids=()
  for ((number = 0; number < processes; number++)); do
    command_of "$number" "$address"
    "${command[@]}" &
    pids+=("$!")
  done
  ((told == 0)) || pass_on "$told"
  for pid in "${pids[@]}"; do
    ended "$pid"
    codes+=("$result")
  done
  pids=()
  judge "${codes[@]}"
  ((code == 0)) || say "exit codes: ${codes[*]}"
  ((told == 0)) || exit "$((code == 0 ? 0 : told))"
}

# judge CODE...: sets `code` to that of the process that the others ended because of.
judge() {
  local wanted one
  for wanted in 2 130 131 141 70 129 143; do
    for one in "$@"; do
      if ((one == wanted)); then
        code=$wanted
        return
      fi
    done
  done
  code=0
  for one in "$@"; do
    ((one <= code)) || code=$one
  done
}

if [[ -n $dry_run ]]; then
  for ((number = 0; number < processes; number++)); do
    command_of "$number" "localhost:${port:-A_FREE_PORT}"
    printf '%s &\n' "$(quoted "${command[@]}")"
  done
  printf 'wait\n'
  exit 0
fi

trap 'pass_on 130' INT
trap 'pass_on 143' TERM
keep_trying "$restarts"
exit "$code"
