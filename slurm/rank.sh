#!/usr/bin/env bash
# One trainer rank: Slurm's names for it become torch's.
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
exec "$@"
