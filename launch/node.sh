#!/usr/bin/env bash
# What one node does: prepare its environment, then become its launcher, which forks one trainer for each GPU.
# launch/train.sbatch and launch/local.sh run it; the arguments are trainer/train.py's.
#
#   DDPM_NODES DDPM_NODE_RANK DDPM_PROCS_PER_NODE   under SLURM the rank is SLURM_PROCID: one of these a node
#   DDPM_HEAD DDPM_PORT                             where the processes meet, on the node with rank 0
#   DDPM_PEER                                       another node, for the one with rank 0; DDPM_HEAD for the others
#   DDPM_ELASTIC_RESTARTS                           how often its processes, if one fails, are started again (default 0)
#   DDPM_RUN_DIR                                    for dumps of the flight recorder
#   DDPM_STAGE_DIR                                  folder on a disk of this node, for data.cache_dir; optional
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Read here and not where srun is called, where it would be the same on every node and all would wait for a rank 1.
rank=${DDPM_NODE_RANK:-${SLURM_PROCID:?node.sh: neither DDPM_NODE_RANK nor SLURM_PROCID is set}}
world=$((DDPM_NODES * DDPM_PROCS_PER_NODE))
python=python
if [ -n "${DDPM_VENV:-}" ]; then python=$DDPM_VENV/bin/python; fi

# A node may have been given fewer GPUs than the first: the ranks would not add up, and all would wait.
if [ -n "${SLURM_GPUS_ON_NODE:-}" ] && [ "$SLURM_GPUS_ON_NODE" -lt "$DDPM_PROCS_PER_NODE" ]; then
  echo "error: $(hostname) has $SLURM_GPUS_ON_NODE GPUs, but $DDPM_PROCS_PER_NODE processes a node were asked for" >&2
  exit 2
fi

export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
# The launcher kills after TERM what has not ended by then; a save may take longer than torch's 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}
# NCCL's flight recorder: the last collectives of every rank, dumped when one of them times out.
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
if [ -n "${DDPM_RUN_DIR:-}" ]; then
  mkdir -p "$DDPM_RUN_DIR/flight"
  export TORCH_FR_DUMP_TEMP_FILE=${TORCH_FR_DUMP_TEMP_FILE:-$DDPM_RUN_DIR/flight/${DDPM_ATTEMPT:-nccl}-rank-}
fi

# Gloo takes the interface that the host's name resolves to, which on Debian is the loopback.
if [ "$DDPM_NODES" -gt 1 ] && [ -z "${GLOO_SOCKET_IFNAME:-}" ]; then
  peer=$DDPM_HEAD
  if [ "$rank" = 0 ]; then peer=${DDPM_PEER:-$DDPM_HEAD}; fi
  GLOO_SOCKET_IFNAME=$("$python" "$repository/launch/interface.py" "$peer")
  export GLOO_SOCKET_IFNAME
fi

arguments=("$@")
if [ -n "${DDPM_STAGE_DIR:-}" ]; then
  if ! mkdir -p "$DDPM_STAGE_DIR"; then
    echo "error: DDPM_STAGE_DIR = $DDPM_STAGE_DIR: cannot be made on $(hostname)" >&2
    exit 2
  fi
  arguments+=(--set "data.cache_dir=$DDPM_STAGE_DIR")
fi

several=()
if [ "$world" -gt 1 ]; then several=(--multi_gpu); fi # without GPUs, too: it is what makes them one group
echo "node $rank of $DDPM_NODES: $(hostname), $DDPM_PROCS_PER_NODE of $world processes," \
  "gloo on ${GLOO_SOCKET_IFNAME:-any interface}, meeting at $DDPM_HEAD:$DDPM_PORT"
export DDPM_LAUNCHER_PID=$$ # workers whose parent is another have been adopted: the launcher is dead
trap '' USR1 # would kill the launcher and orphan its workers; ignored, it is inherited, and the trainer takes it over
exec "$python" "$repository/launch/launcher.py" "${several[@]}" \
  --num_machines "$DDPM_NODES" --machine_rank "$rank" --num_processes "$world" \
  --main_process_ip "$DDPM_HEAD" --main_process_port "$DDPM_PORT" \
  --rdzv_backend static --max_restarts "${DDPM_ELASTIC_RESTARTS:-0}" --mixed_precision no --dynamo_backend no --log_dir /dev/null \
  "$repository/trainer/train.py" "${arguments[@]}"
