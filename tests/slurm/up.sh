#!/usr/bin/env bash
# A real Slurm on this one machine: NODES virtual nodes with GPUS fake GPUs each. Needs root, and apt-get install
# slurm-wlm munge gcc libslurm-dev.
# usage: up.sh DIR NODES GPUS [PORT...]; then SLURM_CONF=DIR/slurm.conf; down.sh DIR ends it
# The first PORT is the controller's, the others are the nodes'; without any, those from 16817 on.
set -euo pipefail
D=$1 N=$2 G=$3 H=$(hostname -s)
shift 3
if [ $# = 0 ]; then mapfile -t ports < <(seq 16817 $((16817 + N))); else ports=("$@"); fi
for port in "${ports[@]}"; do
  if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
    echo "port $port: in use; end the process that listens there (another Slurm? down.sh), or give other ports" >&2
    exit 1
  fi
done
node_ports=$(IFS=, && echo "${ports[*]:1}")
mkdir -p "$D"/{state,spool,log,dev}
for ((i = 0; i < G; i++)); do [ -e "$D/dev/gpu$i" ] || mknod "$D/dev/gpu$i" c 1 3; done # Slurm wants character devices
for ((i = 1; i <= N; i++)); do grep -qE "\sn$i$" /etc/hosts || echo "127.0.2.$i n$i" >>/etc/hosts; done # an address for each node
# config_overrides: more CPUs than there are. linuxproc: no cgroups. The rest makes Slurm quick: to notice, to schedule, to kill.
cat >"$D/slurm.conf" <<EOC
ClusterName=ci
SlurmctldHost=$H(127.0.0.1)
SlurmctldPort=${ports[0]}
AuthInfo=socket=$D/munge.sock,cred_expire=10
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool/%n
SlurmctldPidFile=$D/slurmctld.pid
SlurmdPidFile=$D/slurmd.%n.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
KillWait=5
GresTypes=gpu
PlugStackConfig=$D/plugstack.conf
NodeName=n[1-$N] Port=[$node_ports] CPUs=32 Sockets=2 CoresPerSocket=16 ThreadsPerCore=1 RealMemory=1000000 Gres=gpu:h100:$G
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE
EOC
echo "Name=gpu Type=h100 File=$D/dev/gpu[0-$((G - 1))]" >"$D/gres.conf"
gcc -shared -fPIC -o "$D/pyxis_stub.so" "$(dirname "$0")/pyxis_stub.c"
echo "required $D/pyxis_stub.so" >"$D/plugstack.conf"
head -c 128 /dev/urandom >"$D/munge.key"
chmod 400 "$D/munge.key"
export SLURM_CONF=$D/slurm.conf
munged --key-file="$D/munge.key" --socket="$D/munge.sock" --pid-file="$D/munged.pid" --log-file="$D/log/munged.log" --seed-file="$D/munge.seed"
slurmctld
for ((i = 1; i <= N; i++)); do slurmd -N "n$i"; done
for ((i = 0; i < 120; i++)); do
  [ "$(sinfo -h -t idle -o %D 2>/dev/null)" = "$N" ] && exit 0
  sleep 0.5
done
sinfo
exit 1
