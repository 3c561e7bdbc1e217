#!/usr/bin/env bash
# End what up.sh started in DIR: its jobs, then its daemons by their recorded process ids.
export SLURM_CONF=$1/slurm.conf
scancel --me || true
sleep 1
for file in "$1"/slurmd.*.pid "$1"/slurmctld.pid "$1"/munged.pid; do
  if [ -s "$file" ]; then kill "$(cat "$file")" 2>/dev/null || true; fi
done
