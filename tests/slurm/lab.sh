#!/usr/bin/env bash
# A real SLURM of several nodes on this one machine, for the tests; needs root and namespaces, and no systemd.
#
#   lab.sh install                 Debian's packages, if they are missing; starts nothing
#   lab.sh check                   one line on why there can be no lab here, and status 1
#   lab.sh start DIR NODES [PID]   start it; with PID, it is stopped when that process is gone
#   lab.sh crash DIR NODE          cut the power of node n1, n2, ...
#   lab.sh boot DIR NODE           switch it on again
#   lab.sh enter DIR NODE CMD...   run a command on a node, not through SLURM
#   lab.sh stop DIR
#
# A node is a set of namespaces: own hostname, address, processes, /dev/shm, and own disk at /mnt; the other files are
# everybody's, as on a cluster's shared file system. SLURM commands find the lab with SLURM_CONF=DIR/slurm.conf.
set -euo pipefail

CPUS=4 # that a node claims to have
GPUS=2

die() {
  echo "lab.sh: $*" >&2
  exit 1
}

alive() { [ -s "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null; }

# What tells this lab from others on the machine: its bridge, subnet and ports are numbered.
number() { cat "$dir/number"; }
bridge() { echo "slurmlab$(number)"; }
subnet() { echo "10.213.$(number)"; }
port() { echo $((13000 + $(number) * 100 + $1)); }

# The address of a network card, fixed: after a crash and a boot with another one, a node's neighbours would look for the
# old one for half a minute. A bridge without one of its own takes its ports', and so changes with each of them.
mac() { printf '02:00:0a:d5:%02x:%02x' "$(number)" "$1"; }

# One of this machine's cores for each node: processes that believe to have all of them get in each other's way.
core_of() { echo $((${1#n} % $(nproc))); }

install_packages() {
  for program in slurmctld slurmd sbatch ip; do
    command -v "$program" >/dev/null || missing=1
  done
  [ -n "${missing:-}" ] || return 0
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 0 # `check` will say what is missing
  local policy=/usr/sbin/policy-rc.d
  if [ ! -e $policy ]; then # packages must not start daemons of their own
    printf '#!/bin/sh\nexit 101\n' >$policy
    chmod +x $policy
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
  fi
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client iproute2 >/dev/null 2>&1 ||
    echo "lab.sh: apt-get could not install slurmctld, slurmd and slurm-client" >&2
}

check() {
  [ "$(id -u)" = 0 ] || die "needs root"
  for program in slurmctld slurmd sbatch ip unshare nsenter; do
    command -v "$program" >/dev/null || die "$program is not installed; 'make test-slurm' installs it on Debian"
  done
  unshare --net --uts --ipc --mount --pid --fork --mount-proc true 2>/dev/null || die "no namespaces can be made here"
  ip link add slurmlabcheck type bridge 2>/dev/null || die "no network bridge can be made here"
  ip link del slurmlabcheck
}

configure() { # NODES
  local first_free=0
  while ip link show "slurmlab$first_free" >/dev/null 2>&1; do first_free=$((first_free + 1)); done
  [ $first_free -lt 100 ] || die "a hundred labs are running: 'ip link' lists them"
  echo $first_free >"$dir/number"
  ip link add "$(bridge)" address "$(mac 1)" type bridge # from here on the number is taken
  ip addr add "$(subnet).1/24" dev "$(bridge)"
  ip link set "$(bridge)" up

  mkdir -p "$dir"/{controller,log,run,dev}
  chmod 755 "$dir"
  for gpu in $(seq 0 $((GPUS - 1))); do mknod "$dir/dev/nvidia$gpu" c 1 3; done # fake, but SLURM wants devices
  # No AuthInfo=cred_expire would make every requeue wait two minutes. The rest of the times are short for the same end.
  cat >"$dir/slurm.conf" <<CONF
ClusterName=lab$(number)
SlurmctldHost=$(hostname -s)($(subnet).1)
SlurmctldPort=$(port 17)
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
StateSaveLocation=$dir/controller
SlurmdSpoolDir=$dir/spool.%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
JobRequeue=1
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0
KillWait=10
OverTimeLimit=0
SlurmdTimeout=8
SlurmctldTimeout=8
InactiveLimit=0
BatchStartTimeout=10
CompleteWait=0
MessageTimeout=5
UnkillableStepTimeout=15
MinJobAge=600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
PartitionName=train Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=30 DefaultTime=10 State=UP
PartitionName=short Nodes=ALL Default=NO PriorityTier=1 PreemptMode=OFF DefaultTime=1 MaxTime=5 State=UP
PartitionName=urgent Nodes=ALL Default=NO PriorityTier=10 PreemptMode=OFF DefaultTime=10 State=UP
CONF
  echo "127.0.0.1 localhost" >"$dir/hosts"
  echo "$(subnet).1 $(hostname -s)" >>"$dir/hosts"
  for node in $(seq "$1"); do
    mkdir -p "$dir/spool.n$node"
    echo "$(subnet).$((10 + node)) n$node" >>"$dir/hosts"
    echo "NodeName=n$node Name=gpu File=$dir/dev/nvidia[0-$((GPUS - 1))]" >>"$dir/gres.conf"
    echo "NodeName=n$node NodeAddr=$(subnet).$((10 + node)) Port=$(port $((20 + node))) CPUs=$CPUS RealMemory=4000" \
      "Gres=gpu:$GPUS State=UNKNOWN" >>"$dir/slurm.conf"
  done

  cat >"$dir/node.sh" <<'NODE'
#!/bin/bash
# The first process in a node's namespaces: node.sh NAME ADDRESS DIR CORE
mount --make-rprivate /
mount --bind "$3/hosts" /etc/hosts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /mnt
hostname "$1"
ip link set lo up
until ip link show "v$1" >/dev/null 2>&1; do sleep 0.02; done
ip link set "v$1" name eth0
ip addr add "$2/24" dev eth0
ip link set eth0 up
taskset --cpu-list "$4" slurmd -D -N "$1" </dev/null >>"$3/log/slurmd.$1.out" 2>&1 &
while :; do wait; sleep 1; done # orphans of a node's jobs are this process's children
NODE
}

boot() { # NODE
  local node=$1 outer='' inner=''
  ! alive "$dir/run/$node.pid" || return 0
  setsid unshare --net --uts --ipc --mount --pid --fork --kill-child=KILL --mount-proc \
    bash "$dir/node.sh" "$node" "$(subnet).$((10 + ${node#n}))" "$dir" "$(core_of "$node")" </dev/null >>"$dir/log/$node.out" 2>&1 &
  outer=$!
  echo $outer >"$dir/run/$node.pid"
  for _ in $(seq 500); do # until the first process is in a network of its own
    inner=$(tr -d ' ' <"/proc/$outer/task/$outer/children" 2>/dev/null) || die "$node: did not start, see $dir/log"
    case $(readlink "/proc/${inner:-none}/ns/net") in
      '' | "$(readlink /proc/self/ns/net)") sleep 0.02 ;;
      *) break ;;
    esac
  done
  echo "$inner" >"$dir/run/$node.inner"
  ip link add "lab$(number)$node" type veth \
    peer name "v$node" address "$(mac $((10 + ${node#n})))" netns "$inner"
  ip link set "lab$(number)$node" master "$(bridge)" up
}

crash() { # NODE: everything on it ends at once and says goodbye to nobody
  ip link del "lab$(number)$1" 2>/dev/null || :
  [ ! -s "$dir/run/$1.pid" ] || kill -9 "$(cat "$dir/run/$1.pid")" 2>/dev/null || :
  rm -f "$dir/run/$1.pid"
}

start() { # NODES [PID]
  mkdir -p "$dir"
  [ ! -e "$dir/number" ] || die "$dir: a lab is there already"
  configure "$1"
  slurmctld
  for node in $(seq "$1"); do boot "n$node"; done
  if [ -n "${2:-}" ]; then
    # shellcheck disable=SC2016 # it is the inner shell that expands
    setsid bash -c 'while kill -0 "$1"; do sleep 2; done; exec bash "$2" stop "$3"' _ "$2" "$0" "$dir" \
      </dev/null >/dev/null 2>&1 &
    echo $! >"$dir/run/watcher.pid"
  fi
  for _ in $(seq 300); do
    [ "$(sinfo --noheader --partition=train --states=idle --format=%D 2>/dev/null)" != "$1" ] || return 0
    sleep 0.1
  done
  sinfo --Node >&2 || :
  die "the nodes did not come up; logs are in $dir/log"
}

stop() {
  [ -s "$dir/number" ] || return 0
  local pid
  for pid in "$dir"/run/n*.pid; do
    [ ! -e "$pid" ] || crash "$(basename "$pid" .pid)"
  done
  if alive "$dir/run/slurmctld.pid"; then
    pid=$(cat "$dir/run/slurmctld.pid")
    kill "$pid"
    for _ in $(seq 100); do
      kill -0 "$pid" 2>/dev/null || break
      sleep 0.1
    done
    kill -9 "$pid" 2>/dev/null || :
  fi
  ip link del "$(bridge)" 2>/dev/null || :
  rm -f "$dir/number"
  ! alive "$dir/run/watcher.pid" || kill -- "-$(cat "$dir/run/watcher.pid")" 2>/dev/null || :
}

command=${1:-}
case $command in
  install) install_packages ;;
  check) check ;;
  start | stop | crash | boot | enter)
    dir=${2:?lab.sh $command: needs the DIR of the lab}
    export SLURM_CONF=$dir/slurm.conf
    shift 2
    case $command in
      enter)
        inner=$(cat "$dir/run/$1.inner")
        core=$(core_of "$1")
        shift
        exec nsenter --target "$inner" --net --uts --ipc --mount --pid -- \
          taskset --cpu-list "$core" env --chdir="$PWD" "$@"
        ;;
      *) "$command" "$@" ;;
    esac
    ;;
  *)
    sed -n '2,14s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
