#!/usr/bin/env bash
# The same run on one machine, in a Slurm step, in a Kubernetes pod or on a SkyPilot node:
#   launch/torchrun.sh gpt2-124m --data.dir fineweb10B       (DRY_RUN=1 before it: checks and prints)
# One copy a node; each starts a rank for every GPU (one rank without GPUs). All arguments go to
# train_gpt2.py. torchrun's own variables hold where set: PET_MAX_RESTARTS=0, PET_LOG_DIR=logs ...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
fail() { echo "error: $*" >&2; exit 2; }
nodes=1 node=0 head=localhost port=29400 id=gpt2
if [[ -n ${SKYPILOT_NODE_RANK:-} ]]; then
  mapfile -t ips <<< "$SKYPILOT_NODE_IPS" # host names don't resolve on every cloud: PET_LOCAL_ADDR
  nodes=${#ips[@]} node=$SKYPILOT_NODE_RANK head=${ips[0]} id=$SKYPILOT_TASK_ID
  export PET_LOCAL_ADDR=${PET_LOCAL_ADDR:-${ips[node]}}
elif [[ -n ${SLURM_STEP_ID:-} ]]; then # inside srun; a batch script by itself is one machine
  nodes=$SLURM_STEP_NUM_NODES node=$SLURM_NODEID port=$((20000 + SLURM_JOB_ID % 10000))
  head=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)}
  id=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
  (( SLURM_STEP_NUM_TASKS == nodes )) || fail "$SLURM_STEP_NUM_TASKS tasks on $nodes nodes:" \
    "one task a node is right (srun --ntasks-per-node=1), torchrun starts a rank for every GPU"
elif [[ -n ${PET_MASTER_ADDR:-} ]]; then # Kubeflow Trainer's names; jobset.yaml sets them too
  nodes=$PET_NNODES node=$PET_NODE_RANK head=$PET_MASTER_ADDR port=$PET_MASTER_PORT
  unset PET_NODE_RANK PET_MASTER_ADDR PET_MASTER_PORT # torchrun warns of each beside c10d
fi

# Flags and data are checked on every node before torchrun starts: a wrong flag would otherwise be
# reported by the ranks, once for every restart, and a missing folder on a cluster after the queue.
checked=$(RANK=$node python -c 'import os, train_gpt2 as run
from data.dataset import open_data
with run.one_line_errors():  # node 0 alone speaks of flags, every node of its own data
    config = run.cli.parse(run.TrainConfig, run.PRESETS)
    config.check()
    del os.environ["RANK"]
    open_data(config.data)
    print(run.torch.cuda.device_count(), config.planning.preflight, file=open(3, "w"))' "$@" 3>&1 1>&2)
[[ -n $checked ]] || exit 0 # --help
read -r gpus preflight <<< "$checked"
ranks=${PET_NPROC_PER_NODE:-auto}
[[ $ranks =~ ^[0-9]+$ ]] || ranks=$(( gpus > 0 ? gpus : 1 ))

# torch 2.13 hands a restarted group the keys of its predecessor; of 9 restarts 6 lost a rank.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# torchrun gives each rank one thread; a rank on a CPU computes with its share of the cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( (cores = $(nproc)) > ranks ? cores / ranks : 1 ))}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN} # or NCCL fails without a word on why
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000} # after a hang: who waited, and for what

meet=(--standalone)
(( nodes == 1 )) || meet=(--nnodes="$nodes" --rdzv-backend=c10d --rdzv-endpoint="$head:$port"
  --rdzv-id="$id" --rdzv-conf="is_host=$(( node == 0 ))") # a name may differ from the host's own
restarts=${PET_MAX_RESTARTS:-3}
[[ $preflight != True ]] || restarts=0 # a check that fails is not to be repeated
if [[ -n ${PET_LOG_DIR:-} ]]; then
  export PET_TEE=${PET_TEE:-3} PET_LOG_DIR="$PET_LOG_DIR/node$node"
  [[ -n ${DRY_RUN:-} ]] || mkdir -p "$PET_LOG_DIR"
fi

# These reach the ranks, which save. SIGUSR1, Slurm's early warning, kills torchrun and orphans its
# ranks unless it's named. torchrun would handle a named SIGHUP under nohup too, so there it isn't
# named: a signal that is ignored stays so in every process that is started from here.
signals=SIGTERM,SIGINT,SIGQUIT,SIGUSR1
[[ -n $(trap -p HUP) ]] || signals+=,SIGHUP # this script sets no trap: what is listed is ignored
# The last save gets 120 s: 19 GB, GPT-2 1558M with its optimizer, at 160 MB/s.
command=(torchrun "${meet[@]}" --nproc-per-node="$ranks" --max-restarts="$restarts"
  --signals-to-handle="$signals" --shutdown-timeout=120 train_gpt2.py "$@")
[[ -n ${DRY_RUN:-} ]] || exec "${command[@]}"
for word in "${command[@]}"; do # quoted where a shell would read it otherwise
  [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
  printf '%s ' "$word"
done
echo
