#!/usr/bin/env bash
# Shows the commands that run a sweep of restkv-jax on a TPU VM, a slice of several hosts and a cluster. It runs none of them.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: scripts/tpu_vm_evaluate.sh NAME ZONE MODEL [GRID] [BUCKET]

  NAME    of the TPU VM or slice to be
  ZONE    it is to be in, such as us-central1-a
  MODEL   id of a model on the hub, or a directory that all hosts have
  GRID    YAML file with the grid of the sweep; docs/report/grid.yaml by default
  BUCKET  gs://... of your own: the first host brings results from there, and puts them there every five minutes, so that
          a preempted sweep goes on; without it they stay on the host until they are fetched
TEXT
}

if [[ $# -lt 3 || $1 == --help ]]; then
  usage
  [[ ${1:-} == --help ]] && exit 0
  exit 2
fi
name=$(printf %q "$1") at="--zone=$(printf %q "$2")" model=$(printf %q "$3")
grid=$(printf %q "${4:-docs/report/grid.yaml}") bucket=${5:-}
sweep="env/bin/restkv evaluate --grid grid.yaml --model $model --output sweep --batch-size 64"
first="gcloud compute tpus tpu-vm ssh $name $at --worker=0"
bring="" put=""
if [[ -n $bucket ]]; then  # the first process writes, so that other hosts have nothing to put
  there=$(printf %q "$bucket")/sweep
  keep="nohup sh -c 'while sleep 300; do gcloud storage rsync sweep $there; done' < /dev/null > /dev/null 2>&1 &"
  bring="$first --command=\"mkdir -p sweep; gcloud storage rsync $there sweep; $keep\""$'\n'
  put="$first --command=\"gcloud storage rsync sweep $there\""$'\n'
fi

# Commands for all hosts of a machine: $1 its accelerator type, $2 options of the sweep, $3 how it is made.
show() {
  cat <<TEXT
$3
gcloud compute tpus tpu-vm scp dist/restkv_jax-*.whl $name: $at --worker=all
gcloud compute tpus tpu-vm scp $grid $name:grid.yaml $at --worker=all
gcloud compute tpus tpu-vm ssh $name $at --worker=all \\
  --command='python3 -m pip install uv && python3 -m uv venv --python 3.12 env && python3 -m uv pip install --python env "\$(ls restkv_jax-*.whl)[tpu,eval]"'
${bring}gcloud compute tpus tpu-vm ssh $name $at --worker=all --command="$sweep$2"
${put}mkdir -p sweep
gcloud compute tpus tpu-vm scp "$name:sweep/*.json*" sweep/ $at --worker=0
restkv report sweep
gcloud compute tpus tpu-vm delete $name $at
TEXT
}

cat <<TEXT
# The package as a wheel. Files of own prompts, if the grid names any, must be copied to every host as the grid is.
make wheel

# One VM with 8 chips, which share the prompts of a batch.
$(show v5litepod-8 "" "gcloud compute tpus tpu-vm create $name $at --accelerator-type=v5litepod-8 --version=v2-alpha-tpuv5-lite")

# A slice of 4 hosts with 4 chips each, of which 8 share the weights: all hosts run the same command, the first writes.
# Queued, since slices are seldom free; ask for its state with \`gcloud compute tpus queued-resources describe\`.
$(show v5litepod-16 " --distributed --model-parallel 8" "gcloud compute tpus queued-resources create $name --node-id=$name $at --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite")

# The same slice of a cluster (GKE): an indexed job with a pod for each host. IMAGE has the package installed; RESULTS is a
# claim of a volume that all pods can write to, such as a bucket's, from where results are fetched.
kubectl create configmap restkv --from-file=grid.yaml=$grid
kubectl apply -f - <<'YAML'
apiVersion: v1
kind: Service
metadata: {name: restkv}
spec: {clusterIP: None, selector: {job-name: restkv}}
---
apiVersion: batch/v1
kind: Job
metadata: {name: restkv}
spec:
  completions: 4
  parallelism: 4
  completionMode: Indexed
  backoffLimit: 4
  template:
    spec:
      subdomain: restkv
      restartPolicy: Never
      nodeSelector: {cloud.google.com/gke-tpu-accelerator: tpu-v5-lite-podslice, cloud.google.com/gke-tpu-topology: 4x4}
      containers:
        - name: restkv
          image: IMAGE
          command: [restkv, evaluate, --grid, /grid/grid.yaml, --model, $model, --output, /results/sweep, --batch-size, "64", --distributed, --model-parallel, "8"]
          resources: {limits: {google.com/tpu: 4}}
          volumeMounts: [{name: grid, mountPath: /grid}, {name: results, mountPath: /results}]
      volumes:
        - {name: grid, configMap: {name: restkv}}
        - {name: results, persistentVolumeClaim: {claimName: RESULTS}}
YAML

# A sweep that was stopped, or that lost a host, goes on with the same command, where its results are still on the first
# host, in the bucket or in the volume.
TEXT
