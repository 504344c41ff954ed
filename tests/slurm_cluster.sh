#!/usr/bin/env bash
# A SLURM cluster of one node, this machine, for tests: slurm_cluster.sh install | start DIR | stop DIR
#
# Needs root, and Debian's slurm-wlm and munge, which `install` installs. Everything that it writes lies in DIR; clients
# find the cluster with SLURM_CONF=DIR/slurm.conf. Processes are tracked through /proc, as containers have no cgroups
# to give away, and accounting is off. Credentials expire soon, as a requeued task waits until its old ones have.
set -euo pipefail

install() {
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge
}

start() {
    local dir=$1 host
    host=$(hostname -s)
    mkdir -p "$dir/state" "$dir/spool"
    chmod 755 "$dir"
    (umask 077 && head -c 128 /dev/urandom > "$dir/munge.key")
    cat > "$dir/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmctldPort=16817
SlurmdPort=16818
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket,cred_expire=10
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
KillWait=2
MinJobAge=10
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=test Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
    munged --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" \
        --log-file="$dir/munged.log" --seed-file="$dir/munged.seed"
    slurmctld -f "$dir/slurm.conf"
    slurmd -f "$dir/slurm.conf"
    for _ in $(seq 30); do
        [ "$(SLURM_CONF=$dir/slurm.conf sinfo --noheader --format=%T)" = idle ] && return
        sleep 1
    done
    echo "error: the node is not idle after 30 s; its logs:" >&2
    tail -n 20 "$dir"/*.log >&2
    exit 1
}

stop() {
    local dir=$1 daemon
    for daemon in slurmd slurmctld munged; do
        if [ -e "$dir/$daemon.pid" ]; then
            kill "$(cat "$dir/$daemon.pid")"
        fi
        for _ in $(seq 20); do # each removes its file when it ends
            [ -e "$dir/$daemon.pid" ] || break
            sleep 0.5
        done
    done
}

"$@"
