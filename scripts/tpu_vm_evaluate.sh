#!/usr/bin/env bash
# Shows the commands that run a sweep of restkv-jax on a TPU VM, or on all hosts of a slice. It creates and runs nothing.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: scripts/tpu_vm_evaluate.sh NAME ZONE MODEL [GRID] [BUCKET]

  NAME    of the TPU VM or of the slice
  ZONE    it is in, such as us-central1-a
  MODEL   id of a model on the hub, or a directory that all hosts have
  GRID    YAML file with the grid of the sweep; docs/report/grid.yaml by default
  BUCKET  gs://... of your own for the results; without it they stay on the hosts
TEXT
}

if [[ $# -lt 3 || $1 == --help ]]; then
  usage
  [[ ${1:-} == --help ]] && exit 0
  exit 2
fi
name=$1 zone=$2 model=$3 grid=${4:-docs/report/grid.yaml} bucket=${5:-}
at="--zone=$(printf %q "$zone")"
name=$(printf %q "$name")
sweep="restkv evaluate --grid grid.yaml --model $(printf %q "$model") --output sweep"

cat <<TEXT
# 1. A TPU VM: one host with 8 chips, or a slice of several hosts (v5litepod-16 has 4).
gcloud compute tpus tpu-vm create $name $at --accelerator-type=v5litepod-8 --version=v2-alpha-tpuv5-lite

# 2. The package and the grid, on every host.
gcloud compute tpus tpu-vm scp dist/restkv_jax-*.whl $name: $at --worker=all
gcloud compute tpus tpu-vm scp $(printf %q "$grid") $name:grid.yaml $at --worker=all
gcloud compute tpus tpu-vm ssh $name $at --worker=all \\
  --command='python3 -m pip install "\$(ls restkv_jax-*.whl)[tpu,eval]"'

# 3a. One host: its chips share the prompts of a batch, so give a multiple of them.
gcloud compute tpus tpu-vm ssh $name $at --command="$sweep --batch-size 64"

# 3b. Several hosts: the same command on each; batches are shared out by the number of the process.
gcloud compute tpus tpu-vm ssh $name $at --worker=all --command="$sweep --batch-size 64 --distributed"

# 4. The same command goes on where a preempted one stopped.

TEXT
if [[ -n $bucket ]]; then
  cat <<TEXT
# 5. The results of all hosts in one place, and their report.
gcloud compute tpus tpu-vm ssh $name $at --worker=all --command="gcloud storage cp sweep/* $bucket/sweep/"
mkdir -p sweep && gcloud storage cp "$bucket/sweep/*" sweep/
TEXT
else
  cat <<TEXT
# 5. The results of all hosts in one place (worker 0, 1, ...), and their report.
mkdir -p sweep
gcloud compute tpus tpu-vm scp "$name:sweep/*" sweep/ $at --worker=0
gcloud compute tpus tpu-vm scp "$name:sweep/results-*.jsonl" sweep/ $at --worker=1
TEXT
fi
cat <<TEXT
restkv report sweep

# 6. The end.
gcloud compute tpus tpu-vm delete $name $at
TEXT
