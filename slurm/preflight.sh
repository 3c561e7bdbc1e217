#!/usr/bin/env bash
# preflight.sh GPUS PYTHON: one line, "ok NODE VERSIONS" on a node fit to run on, "bad NODE: why" on one that is not.
# Versions that differ from those of most nodes make a node bad too; slurm/env.sh compares them.
fail() { echo "bad $SLURMD_NODENAME: $*"; exit 1; }
if command -v nvidia-smi >/dev/null; then
  used=$(nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits) || fail "nvidia-smi: $used"
  [ "$(wc -l <<<"$used")" -ge "$1" ] || fail "$(wc -l <<<"$used") GPUs, $1 are needed"
  awk '$1 > 2000 {exit 1}' <<<"$used" || fail "GPU memory in use: $(paste -sd' ' <<<"$used") MiB; something still runs there"
fi
[ "$(df --output=avail -m /dev/shm | tail -1)" -gt "${SHM_MIB:-1024}" ] || fail "/dev/shm has less than ${SHM_MIB:-1024} MiB left"
[ -e "$LOG/env.txt" ] || fail "$LOG/env.txt is not to be seen here: RUN must be in a shared folder"
touch "$LOG/.$SLURMD_NODENAME" || fail "$LOG cannot be written here"
rm "$LOG/.$SLURMD_NODENAME"
versions=$("$2" -m megatron_r1 doctor --versions) || fail "$2 -m megatron_r1 doctor: the environment is not there"
echo "ok $SLURMD_NODENAME $versions"
