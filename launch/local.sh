#!/usr/bin/env bash
# Train without SLURM, on this machine or, started by hand on each of several, on all of them.
#
#   launch/local.sh --config configs/lsun256.toml
#
#   DDPM_NODES=2 DDPM_NODE_RANK=0 DDPM_HEAD=alpha launch/local.sh --config configs/lsun256.toml   # on alpha
#   DDPM_NODES=2 DDPM_NODE_RANK=1 DDPM_HEAD=alpha launch/local.sh --config configs/lsun256.toml   # on the other
#
#   DDPM_NODES            machines (default 1)
#   DDPM_NODE_RANK        0 on DDPM_HEAD, 1, 2, ... on the others
#   DDPM_HEAD             name or address of the machine with rank 0, as the others reach it
#   DDPM_PORT             a free port there (default 29500; with one machine any that is free)
#   DDPM_PEER             on DDPM_HEAD: another machine, if the way to it cannot be guessed (see node.sh)
#   DDPM_PROCS_PER_NODE   processes here, the same everywhere (default: one for each GPU; one where there is none)
#   DDPM_ELASTIC_RESTARTS  how often the processes, if one of them fails, are started again (default 0)
#   DDPM_VENV             a Python environment (default: .venv of the repository; without it, the python on PATH)
#   DDPM_STAGE_DIR        folder on a disk of each machine, where shards are copied before they are read
#
# Ctrl-C, TERM and USR1 save and end, with status 0; the same command goes on.
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export DDPM_NODES=${DDPM_NODES:-1}
if [ "$DDPM_NODES" -gt 1 ]; then
  for name in DDPM_NODE_RANK DDPM_HEAD; do
    [ -n "${!name:-}" ] || { echo "error: $name: needed with DDPM_NODES = $DDPM_NODES; see $0" >&2; exit 2; }
  done
fi
export DDPM_NODE_RANK=${DDPM_NODE_RANK:-0} DDPM_HEAD=${DDPM_HEAD:-127.0.0.1}
if [ "$DDPM_NODES" -gt 1 ]; then default_port=29500; else default_port=0; fi
export DDPM_PORT=${DDPM_PORT:-$default_port}
if [ -z "${DDPM_PROCS_PER_NODE:-}" ]; then
  DDPM_PROCS_PER_NODE=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || :
  if [ "$DDPM_PROCS_PER_NODE" = 0 ]; then DDPM_PROCS_PER_NODE=1; fi
fi
export DDPM_PROCS_PER_NODE
if [ -z "${DDPM_VENV:-}" ] && [ -d "$repository/.venv" ]; then DDPM_VENV=$repository/.venv; fi
export DDPM_VENV=${DDPM_VENV:-}

answers=$(PYTHONPATH=$repository "${DDPM_VENV:+$DDPM_VENV/bin/}python" -m launch.preflight "$@")
export DDPM_RUN_DIR=${answers%%$'\n'*}
export DDPM_ATTEMPT=${DDPM_ATTEMPT:-$(hostname).$$}

# Launchers put their workers into sessions of their own, where no signal to this group arrives, and only hand on TERM.
bash "$repository/launch/node.sh" "$@" &
launcher=$!
trap 'kill -TERM "$launcher" 2>/dev/null || :' USR1 TERM INT HUP
status=0
while kill -0 "$launcher" 2>/dev/null; do
  status=0
  wait "$launcher" || status=$? # returns at every trapped signal, too
done
# After TERM the launcher fails although every trainer saved: the marker tells.
for marker in DONE STOPPED; do
  if grep -qsx "attempt $DDPM_ATTEMPT" "$DDPM_RUN_DIR/$marker"; then exit 0; fi
done
exit "$status"
