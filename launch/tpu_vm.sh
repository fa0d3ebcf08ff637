#!/usr/bin/env bash
# Trains on a TPU VM of any size: creates it, or uses the one of that name, copies the code, starts the
# training on all its workers, follows the log, and begins again where it was if the machine is taken away.
#
#   launch/tpu_vm.sh --name=mor --zone=us-east5-b --type=v5p-128 \
#     --config=configs/1p7b.py --workdir=/mnt/share/mor --config.checkpoint.folder=gs://BUCKET/mor
#
# Flags of the launcher; all others are those of `python -m mor_jax.train`:
#   --name=NAME       of the TPU VM
#   --zone=ZONE       where it is, or is to be
#   --type=TYPE       accelerator type, such as v5litepod-16, v5p-128, v6e-256
#   --version=NAME    software of the machine (by the type: v2-alpha-tpuv5-lite, v2-alpha-tpuv5, v2-alpha-tpuv6e,
#                     tpu-ubuntu2204-base)
#   --project=NAME    Google Cloud project (that of `gcloud config`)
#   --queued          asks for it by a queued resource of the same name, and waits for its turn
#   --spot            asks for capacity that is cheaper and may be taken away
#   --restarts=N      starts the training again after so many failures in a row (3); a machine that was taken
#                     away, a process that was told to end (129, 143) or hung (70) do not count
#   --delete          gives the machine back when the training has ended
#   --dry_run         prints the commands instead of running them
#   --help            prints this
#
# Needs gcloud, logged in. Checkpoints must outlive the machine: give --config.checkpoint.folder=gs://...;
# the run folder itself (--workdir) must be the same one for all workers and survive too, so put it on a
# shared disk. Ctrl-C ends the following, not the training: the same command follows it again.
# Exit code: that of the training.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
# shellcheck source=launch/common.sh
source launch/common.sh

name='' zone='' type='' version='' project='' queued='' spot='' restarts=3 delete=''
take_flags 'name zone type version project restarts' 'queued spot delete' "$@"
check_needed name "$name" mor
check_name name "$name"
check_needed zone "$zone" us-east5-b
check_needed type "$type" v5litepod-16
check_count restarts "$restarts"
check_training ${training[@]+"${training[@]}"}
if [[ -z $version ]]; then
  case $type in
  v5litepod-*) version=v2-alpha-tpuv5-lite ;;
  v5p-*) version=v2-alpha-tpuv5 ;;
  v6e-*) version=v2-alpha-tpuv6e ;;
  *) version='tpu-ubuntu2204-base' ;;
  esac
fi
[[ -n $dry_run ]] || command -v gcloud >/dev/null || die 'gcloud is not installed: https://cloud.google.com/sdk'

where=("--zone=$zone")
[[ -z $project ]] || where+=("--project=$project")
tpu=(gcloud compute tpus tpu-vm)
queue=(gcloud compute tpus queued-resources)
archive=${TMPDIR:-/tmp}/mor_jax-$name.tar.gz
wait_seconds=${MOR_JAX_WAIT_SECONDS:-30} # between two looks at the cloud

# on_workers WHICH COMMAND: runs a command line on a worker, or on all.
on_workers() { run "${tpu[@]}" ssh "$name" "${where[@]}" "--worker=$1" "--command=$2"; }

# state: of the machine, such as READY, CREATING, PREEMPTED, or of its place in the queue, such as
# WAITING_FOR_RESOURCES, SUSPENDED; nothing if there is neither.
state() {
  "${tpu[@]}" describe "$name" "${where[@]}" '--format=value(state)' 2>/dev/null && return
  [[ -z $queued ]] || "${queue[@]}" describe "$name" "${where[@]}" '--format=value(state.state)' 2>/dev/null || true
}

remove() {
  if [[ -n $queued ]]; then
    run "${queue[@]}" delete "$name" "${where[@]}" --force --quiet
  else
    run "${tpu[@]}" delete "$name" "${where[@]}" --quiet
  fi
}

create() {
  if [[ -n $queued ]]; then
    run "${queue[@]}" create "$name" "--node-id=$name" "${where[@]}" "--accelerator-type=$type" \
      "--runtime-version=$version" ${spot:+--spot}
  else
    run "${tpu[@]}" create "$name" "${where[@]}" "--accelerator-type=$type" "--version=$version" ${spot:+--spot}
  fi
}

# get_machine: returns when it is ready, whatever was there before.
get_machine() {
  if [[ -n $dry_run ]]; then
    say "unless $name is there already (PREEMPTED, TERMINATED, STOPPED, SUSPENDED or FAILED it is removed first):"
    create
    say "wait until it is READY"
    return
  fi
  local now asked=''
  while :; do
    now=$(state)
    case $now in
    READY) return ;;
    PREEMPTED | TERMINATED | STOPPED | SUSPENDED | FAILED)
      say "$name is $now"
      remove
      asked=''
      ;;
    '')
      if [[ -z $asked ]]; then
        create
        asked=1
        continue
      fi
      ;;
    esac
    sleep "$wait_seconds"
  done
}

# The commands for the workers. A training goes on when the connection does not: it is a session of its own.
flags=$(quoted "${training[@]}")
[[ $flags == *--config.train.exit_on_hang* ]] || flags+=' --config.train.exit_on_hang'
install="mkdir -p mor_jax && tar -xzf mor_jax.tar.gz -C mor_jax && cd mor_jax && python3 -m venv .venv && \
.venv/bin/pip install --quiet -e .[tpu]"
start="cd mor_jax && rm -f exit_code && (setsid nohup sh -c '.venv/bin/python -m mor_jax.train --cluster \"\$@\" \
>>train.log 2>&1; echo \$? >exit_code.new; mv exit_code.new exit_code' train $flags >/dev/null 2>&1 &)"
follow="tail -n 100 -F mor_jax/train.log & until [ -e mor_jax/exit_code ]; do sleep 2; done; sleep 2; kill \$!"
running="test -d mor_jax/.venv && pgrep -f '[m]or_jax.train' >/dev/null"

copy_code() {
  run tar -czf "$archive" --exclude=__pycache__ mor_jax configs pyproject.toml requirements*.txt README.md LICENSE
  run "${tpu[@]}" scp "$archive" "$name:mor_jax.tar.gz" "${where[@]}" --worker=all
  on_workers all "$install"
}

# attempt: the training from its start to its end; sets `code`, to 143 if the machine was lost.
attempt() {
  get_machine
  if [[ -z $dry_run ]] && on_workers 0 "$running"; then
    say "the training runs already"
  else
    copy_code
    on_workers all "$start"
  fi
  on_workers 0 "$follow" || true # the connection may break; what counts is the exit code
  if [[ -n $dry_run ]]; then
    on_workers all 'cat mor_jax/exit_code'
    return
  fi
  judge
}

# judge: sets `code` to what became of the training, once that is known.
judge() {
  local codes one
  while :; do
    if [[ $(state) != READY ]]; then
      say "$name was taken away"
      code=143
      return
    fi
    codes=$("${tpu[@]}" ssh "$name" "${where[@]}" --worker=all '--command=cat mor_jax/exit_code' 2>/dev/null) && break
    sleep "$wait_seconds"
  done
  code=0
  for one in $codes; do
    [[ $one =~ ^[0-9]+$ ]] || continue
    ((one <= code)) || code=$one
  done
  for one in 143 129 70 141 131 130 2; do # the last one that is there counts
    [[ " ${codes//$'\n'/ } " != *" $one "* ]] || code=$one
  done
}

keep_trying "$restarts"
if [[ -n $dry_run ]]; then
  say "exit code 0, 2, 130, 131 or 141: the end; 70, 129, 143 or a machine taken away: all of it again; others: $restarts times"
fi
[[ -z $delete ]] || remove
exit "$code"
