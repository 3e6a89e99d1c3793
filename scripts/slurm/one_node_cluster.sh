#!/usr/bin/env bash
# A real Slurm of one node on this machine, for the duration of a command; to try an sbatch file before a cluster does:
#
#   sudo bash scripts/slurm/one_node_cluster.sh DIRECTORY bash      # a shell in which sbatch, squeue and srun work
#   sudo bash scripts/slurm/one_node_cluster.sh DIRECTORY sbatch --wait --gres=none my.sbatch
#
# Starts munged, slurmctld and slurmd of its own (Debian, Ubuntu: apt-get install slurm-wlm munge) on free ports, with
# all their files in DIRECTORY, which is made; nothing else on the machine changes. Needs root: slurmd starts its jobs as their
# users. The node is called node1 and has CPUS processors (4), whatever the machine has; its jobs are ended with the
# command, and the daemons with them. Ends with the command's exit code.
set -euo pipefail

die() {
    echo "error: $*" >&2
    exit 2
}

[ "$#" -ge 2 ] || die "give a directory and a command, such as: $0 /tmp/slurm bash"
directory="$1" && shift
[ "$(id -u)" -eq 0 ] || die "only root can start slurmd; use sudo"
PATH="$PATH:/usr/sbin:/sbin"
for program in munged slurmctld slurmd sbatch setpriv python3; do
    command -v "$program" >/dev/null || die "$program not found; install it (Debian, Ubuntu: apt-get install slurm-wlm munge)"
done
mkdir -p "$directory"/{state,spool,munge}
directory="$(cd "$directory" && pwd)"
chmod 755 "$directory" "$directory/munge" # munged refuses places that others may write to, or where its socket cannot be reached

read -r controller_port node_port < <(python3 -c '
import socket
probes = [socket.socket() for _ in range(2)]
for probe in probes:
    probe.bind(("127.0.0.1", 0))
print(*(probe.getsockname()[1] for probe in probes))')

host="$(uname -n)" && host="${host%%.*}"
cat >"$directory/slurm.conf" <<CONF
ClusterName=one_node
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$controller_port
SlurmdPort=$node_port
SlurmUser=root
AuthType=auth/munge
# cred_expire is also how long a requeued job waits before it starts again (usually 120 s).
AuthInfo=socket=$directory/munge/socket,cred_expire=5
StateSaveLocation=$directory/state
SlurmdSpoolDir=$directory/spool
SlurmctldPidFile=$directory/slurmctld.pid
SlurmdPidFile=$directory/slurmd.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=1,sched_interval=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
KillWait=10
NodeName=node1 NodeHostname=$host NodeAddr=127.0.0.1 CPUs=${CPUS:-4} State=UNKNOWN
PartitionName=all Nodes=node1 Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF="$directory/slurm.conf"

daemons=()
# A daemon in the foreground: our child, ended with us however we end.
start() {
    setpriv --pdeathsig KILL "$@" </dev/null >>"$directory/daemons.log" 2>&1 &
    daemons+=("$!")
}

# shellcheck disable=SC2317,SC2329 # the trap calls it
stop() {
    trap - EXIT
    trap '' TERM INT HUP
    scancel --quiet --full --signal=KILL --user=root 2>/dev/null || true
    scancel --quiet --user=root 2>/dev/null || true
    for ((tries = 0; tries < 60; tries++)); do
        squeue --noheader --states=PENDING,CONFIGURING,RUNNING,COMPLETING --format=%T 2>/dev/null | grep -q . || break
        sleep 0.25
    done
    kill "${daemons[@]}" 2>/dev/null || true
    wait "${daemons[@]}" 2>/dev/null || true
}
trap stop EXIT
trap 'exit 143' TERM
trap 'exit 129' HUP

# Does the command within so many seconds come to succeed?
within() {
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$end" ] || return 1
        for daemon in "${daemons[@]}"; do kill -0 "$daemon" 2>/dev/null || return 1; done
        sleep 0.1
    done
}

dead() { die "$1 has not come up; $directory/daemons.log ends with: $(tail -n 3 "$directory/daemons.log" | tr '\n' ' ')"; }

head -c 128 /dev/urandom >"$directory/munge/key"
chmod 400 "$directory/munge/key"
start munged --foreground --force --socket="$directory/munge/socket" --key-file="$directory/munge/key" \
    --log-file="$directory/munge/log" --pid-file="$directory/munge/pid" --seed-file="$directory/munge/seed"
within 20 munge --no-input --socket="$directory/munge/socket" || dead munged
start slurmctld -D -f "$SLURM_CONF"
start slurmd -D -f "$SLURM_CONF"
# shellcheck disable=SC2317,SC2329 # `within` calls it
is_idle() { [ "$(sinfo --noheader --format=%t)" = idle ]; }
within 30 is_idle || dead Slurm

code=0
"$@" || code=$?
exit "$code"
