#!/usr/bin/env bash
# Trains on TPUs of a GKE cluster, as a JobSet (gke.yaml), and follows the log of the first process.
#
#   launch/gke.sh --name=mor --image=us-docker.pkg.dev/PROJECT/REPO/mor_jax --accelerator=tpu-v5p-slice \
#     --topology=4x4x8 --config=configs/1p7b.py --workdir=/share/mor --config.checkpoint.folder=gs://BUCKET/mor
#
# Flags of the launcher; all others are those of `python -m mor_jax.train`:
#   --name=NAME          of the JobSet
#   --image=IMAGE        has Python with mor_jax[tpu] installed, and the repository as working directory
#   --accelerator=NAME   tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice
#   --topology=AxB[xC]   chips of a slice; the node pools must have the same
#   --chips_per_host=N   (4)
#   --slices=N           (1)
#   --restarts=N         restarts of the JobSet after failures (100): Kubernetes does not tell a machine that was
#                        taken away from a failure, so all count; exit codes 2, 130, 131 and 141 end it
#   --namespace=NAME     (that of the current context of kubectl)
#   --dry_run            prints the commands, and what they apply, instead of running them
#   --help               prints this
#
# Needs kubectl with access to the cluster, and JobSet in it (https://jobset.sigs.k8s.io). --workdir must be on a
# volume that all Pods share: add it to gke.yaml. The checkpoints may be in gs://. Ctrl-C ends the following
# only; `kubectl delete jobset NAME` ends the training, which saves. Exit code: 0 finished, 1 failed.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
# shellcheck source=launch/common.sh
source launch/common.sh

name='' image='' accelerator='' topology='' chips_per_host=4 slices=1 restarts=100 namespace=''
take_flags 'name image accelerator topology chips_per_host slices restarts namespace' '' "$@"
check_needed name "$name" mor
check_name name "$name"
check_needed image "$image" us-docker.pkg.dev/PROJECT/REPO/mor_jax
check_needed accelerator "$accelerator" tpu-v5p-slice
check_needed topology "$topology" 4x4x8
[[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] ||
  die "--topology=$topology is not allowed: must be AxB or AxBxC, such as 4x4 or 4x4x8"
[[ $image =~ ^[a-zA-Z0-9._/:@-]+$ ]] || die "--image=$image is not the name of an image"
[[ $accelerator =~ ^[a-z0-9-]+$ ]] || die "--accelerator=$accelerator is not allowed: must be as in the node pool's label"
check_number chips_per_host "$chips_per_host"
check_number slices "$slices"
check_count restarts "$restarts"
check_training ${training[@]+"${training[@]}"}
total=$((${topology//x/*}))
((total % chips_per_host == 0)) ||
  die "--chips_per_host=$chips_per_host does not divide the $total chips of --topology=$topology"
hosts=$((total / chips_per_host))
((hosts * slices == 1)) || training+=(--cluster)
[[ -n $dry_run ]] || command -v kubectl >/dev/null || die 'kubectl is not installed: https://kubernetes.io/docs/tasks/tools'

kube=(kubectl)
[[ -z $namespace ]] || kube+=("--namespace=$namespace")

# json_list WORD...: a list that is JSON, and so YAML.
json_list() {
  local word line=''
  for word in "$@"; do
    word=${word//\\/\\\\}
    line+="\"${word//\"/\\\"}\", "
  done
  printf '[%s]' "${line%, }"
}

# manifest: gke.yaml with everything filled in.
manifest() {
  local text command
  command=$(json_list python -m mor_jax.train "${training[@]}")
  text=$(<launch/gke.yaml)
  # Without the quotes a & in a value would mean what was found.
  text=${text//@name@/"$name"}
  text=${text//@image@/"$image"}
  text=${text//@accelerator@/"$accelerator"}
  text=${text//@topology@/"$topology"}
  text=${text//@chips@/"$chips_per_host"}
  text=${text//@slices@/"$slices"}
  text=${text//@hosts@/"$hosts"}
  text=${text//@restarts@/"$restarts"}
  printf '%s\n' "${text//@command@/"$command"}"
}

# condition: how the JobSet ended, Completed or Failed; nothing while it runs.
condition() {
  "${kube[@]}" get jobset "$name" '-o=jsonpath={.status.terminalState}' 2>/dev/null || true
}

first=(logs --follow "--selector=jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0")
if [[ -n $dry_run ]]; then
  printf "%s <<'EOF'\n%s\nEOF\n" "$(quoted "${kube[@]}" apply -f -)" "$(manifest)"
  quoted "${kube[@]}" "${first[@]}"
  say 'again until the JobSet is Completed (exit code 0) or Failed (1)'
  exit 0
fi
manifest | "${kube[@]}" apply -f -
while :; do
  case $(condition) in
  Completed) exit 0 ;;
  Failed)
    say "the training failed; kubectl describe jobset $name"
    exit 1
    ;;
  esac
  "${kube[@]}" "${first[@]}" 2>/dev/null || true # there may be no such Pod yet, or it has just ended
  sleep "${MOR_JAX_WAIT_SECONDS:-10}"
done
