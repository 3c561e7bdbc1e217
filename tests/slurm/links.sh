#!/usr/bin/env bash
#SBATCH --ntasks-per-node=1 --exclusive --mem=0 --time=5
# A job that is nothing but its preflight, of two nodes.
. "${SLURM_SUBMIT_DIR:-$PWD}/slurm/env.sh"
mkdir -p "$LOG"
env >"$LOG/env.txt"
preflight 2
